"""
HellaSwag: which of four endings does a language model find the most likely? (Zellers et al., 2019.)

    python hellaswag.py --hf gpt2                      # score a Hugging Face model: calibrates this scorer
    python hellaswag.py --hf gpt2 --file my.jsonl      # items from a file of yours

The training scripts import it. Two conventions are in use and differ by points, so both are here, by name:

    nanogpt   build-nanogpt and llm.c: the raw ctx; acc by the summed loss of an ending, acc_norm by its mean
              loss per token. OpenAI's GPT-2 124M scores 28.59 / 29.55.
    harness   lm-evaluation-harness: activity label, ctx_a and capitalised ctx_b, brackets cleaned up; acc by
              the summed loss, acc_norm by the loss per character. The same model scores 28.92 / 31.14.

Chance is 25; the standard error at 30% of 10,042 items is 0.46 points, so always quote both. For the offline
dataset there is a cloze task in the same format (fineweb.cloze_items), which is not HellaSwag.
"""
import argparse
import json
import os
import re
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from fineweb import fail, parse_strictly, retrying, say, write_atomic

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
N_ITEMS = 10_042
DEFAULT_FILE = "data/hellaswag/hellaswag_val.jsonl"
CONVENTIONS = ("nanogpt", "harness")
ITEMS_PER_BATCH = 16  # 64 rows; fixed, so that every machine computes the same batches


# ----------------------------------------------------------------------------------------------------------
# Items


def load(path, n_items=None):
    """The items of a .jsonl file: a list of dicts. Raises SystemExit for a missing or malformed file."""
    path, items = Path(path), []
    if not path.exists():
        fail(f"{path} does not exist: give the HellaSwag validation set's .jsonl file")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            item = json.loads(line)
            item["label"] = int(item["label"])
            complete = len(item["endings"]) == 4 and 0 <= item["label"] < 4 and all(map(str.strip, item["endings"]))
            if not complete or not item["ctx"].strip() or not {"ctx_a", "ctx_b", "activity_label"} <= item.keys():
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            fail(f"{path}, line {number} is not a HellaSwag item: remove the file to have it downloaded again")
        items.append(item)
    if not items or n_items not in (None, len(items)):
        fail(f"{path} has {len(items):,} items, not {n_items or 'any'}: remove it to have it downloaded again")
    return items


def download(path):
    """Downloads the validation set to path, whole or not at all. Raises SystemExit if it can't be had."""
    import requests

    def get():
        response = requests.get(os.environ.get("HELLASWAG_URL", URL), timeout=20)
        response.raise_for_status()
        if response.content.count(b"\n") < N_ITEMS - 1:
            raise OSError(f"only {response.content.count(bytes([10])):,} of {N_ITEMS:,} lines arrived")
        return response.content

    content = retrying("the HellaSwag validation set", get, pauses=(1, 2, 4))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda f: f.write(content))


def clean(text):
    """lm-evaluation-harness' preprocessing (lm_eval/tasks/hellaswag/utils.py): WikiHow's tags taken out."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def prompt_and_endings(item, convention):
    """The context and the four endings of an item as the convention words them; an ending follows a space."""
    if convention == "nanogpt":
        return item["ctx"], item["endings"]
    context = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    return context, [clean(ending) for ending in item["endings"]]


# ----------------------------------------------------------------------------------------------------------
# Batches


def make_batches(items, convention, encode, block_size, items_per_batch=ITEMS_PER_BATCH):
    """The items as a fixed list of padded batches, in four widths at most.

    encode(text) -> list of token ids. Returns a list of (item numbers (n,), inputs (4 * items_per_batch, W),
    targets of the same shape, characters per ending (n, 4)); targets are -1 wherever no ending is scored.
    A context too long for block_size loses its beginning. Who scores which batch is up to the caller; what
    is in it depends on nothing but the arguments.
    """
    rendered = []
    for item in items:
        context, endings = prompt_and_endings(item, convention)
        prefix, rows = encode(context), []
        for ending in endings:
            tokens = encode(" " + ending)
            row = (prefix + tokens)[-(block_size + 1):]
            rows.append((row, min(len(tokens), len(row) - 1)))
        rendered.append((rows, [len(ending) for ending in endings]))
    lengths = np.array([max(len(row) for row, _ in rows) - 1 for rows, _ in rendered])
    widths = np.quantile(lengths, (0.25, 0.5, 0.75, 1.0), method="higher")
    widths = np.unique(np.minimum(-(-widths // 8) * 8, block_size))  # multiples of 8 suit the matrix units
    batches = []
    for k, width in enumerate(widths):
        members = np.flatnonzero((lengths <= width) & (lengths > (widths[k - 1] if k else 0)))
        for start in range(0, len(members), items_per_batch):
            numbers = members[start : start + items_per_batch]
            inputs = np.zeros((4 * items_per_batch, width), dtype=np.int32)
            targets = np.full_like(inputs, -1)  # a last batch that is not full keeps rows without any target
            for at, number in enumerate(numbers):
                for ending, (row, n_scored) in enumerate(rendered[number][0]):
                    inputs[4 * at + ending, : len(row) - 1] = row[:-1]
                    targets[4 * at + ending, len(row) - 1 - n_scored : len(row) - 1] = row[-n_scored:]
            batches.append((numbers, inputs, targets, np.array([rendered[number][1] for number in numbers])))
    return batches


# ----------------------------------------------------------------------------------------------------------
# Scores


@torch.no_grad()
def score(losses_of, batches, labels, convention, device="cpu", rank=0, world=1):
    """Accuracy of a model on batches that make_batches() made, batch j computed by rank j % world.

    losses_of(inputs, targets) takes two (B, W) int64 tensors and returns the (B, W) cross-entropy in nats
    wherever targets >= 0 (anything elsewhere). Returns a dict with n, acc, acc_norm, their standard errors
    acc_se and acc_norm_se (all fractions), and the chosen ending of every item, predictions and
    predictions_norm, as strings of the digits 0 to 3. The same on every rank.
    """
    chosen = torch.zeros(2, len(labels), dtype=torch.int64, device=device)
    for numbers, inputs, targets, characters in batches[rank::world]:
        inputs, targets = (torch.from_numpy(array).to(device, torch.int64) for array in (inputs, targets))
        losses = losses_of(inputs, targets)
        scored = targets >= 0
        sums = losses.float().masked_fill(~scored, 0).cpu().double().sum(1)
        lengths = scored.cpu().sum(1) if convention == "nanogpt" else torch.from_numpy(characters).flatten()
        n = 4 * len(numbers)
        sums, lengths = sums[:n].view(-1, 4), lengths[:n].view(-1, 4)  # (items, endings)
        chosen[0, numbers] = sums.argmin(1).to(device)
        chosen[1, numbers] = (sums / lengths).argmin(1).to(device)
    if world > 1:
        dist.all_reduce(chosen)  # each item was somebody's, and zero for everybody else
    chosen = chosen.cpu().numpy()
    result = {"n": len(labels)}
    for name, choice in zip(("", "_norm"), chosen):
        p = float((choice == labels).mean())
        result[f"acc{name}"], result[f"acc{name}_se"] = p, (p * (1 - p) / len(labels)) ** 0.5
        result[f"predictions{name}"] = "".join(map(str, choice))
    return result


class Scorer:
    """The four-way task that fits a dataset: HellaSwag for GPT-2 tokens, the folder's cloze for bytes.

    Rank 0 reads, downloads and tokenises; the others are sent the batches. Made by open_scorer().
    """

    def __init__(self, task, labels, batches, device, rank, world):
        self.task, self.labels, self.batches = task, np.array(labels), batches
        self.device, self.rank, self.world = device, rank, world

    def score(self, losses_of, convention, step, folder):
        """score() of this task, with task and convention; "nanogpt", or for HellaSwag "harness" too.

        Rank 0 also writes it, with step and the labels, to folder/TASK_CONVENTION.json, so that two runs can be
        compared item by item.
        """
        result = score(losses_of, self.batches[convention], self.labels, convention, self.device, self.rank, self.world)
        result = {"task": self.task, "convention": convention, **result}
        if self.rank == 0:
            content = json.dumps({"step": step, **result, "labels": "".join(map(str, self.labels))}).encode()
            write_atomic(Path(folder) / f"{self.task}_{convention}.json", lambda f: f.write(content))
        return result


def open_scorer(path, data_dir, tokenizer, block_size, device="cpu", rank=0, world=1):
    """The Scorer of a dataset, or None (said in a line) if its items or the tokenizer can't be had.

    tokenizer: a tiktoken.Encoding on rank 0, or None; path: HellaSwag's .jsonl, downloaded if it is not
    there. Raises SystemExit for a malformed file.
    """
    parcel = [None]
    if rank == 0 and tokenizer is not None:
        try:
            items = None
            if tokenizer.name == "bytes":
                task, conventions = "cloze", ("nanogpt",)
                if (Path(data_dir) / "cloze.jsonl").exists():
                    items = load(Path(data_dir) / "cloze.jsonl")
                else:
                    say(f"no four-way score: {data_dir} has no cloze.jsonl")
            else:
                task, conventions, path = "hellaswag", CONVENTIONS, Path(path)
                if not path.exists():
                    try:
                        download(path)
                    except SystemExit as error:
                        say(f"HellaSwag will not be scored: {error}; or give the file with --hellaswag")
                if path.exists():
                    items = load(path, N_ITEMS if path == Path(DEFAULT_FILE) else None)
            if items:
                def encode(text):
                    return tokenizer.encode_ordinary(text)

                parcel = [(task, [item["label"] for item in items],
                           {name: make_batches(items, name, encode, block_size) for name in conventions})]
        except SystemExit as error:
            parcel = [error]
    if world > 1:
        dist.broadcast_object_list(parcel, src=0)
    if isinstance(parcel[0], SystemExit):
        raise parcel[0]
    return None if parcel[0] is None else Scorer(*parcel[0], device, rank, world)


def one_line(result):
    """A result in words: percent and standard error."""
    figures = [f"{name} {100 * result[name]:.2f} ± {100 * result[name + '_se']:.2f}" for name in ("acc", "acc_norm")]
    return f"{result['task']} ({result['convention']}): {', '.join(figures)} ({result['n']:,} items, chance 25)"


# ----------------------------------------------------------------------------------------------------------
# Command line: score a Hugging Face model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, help="name or folder of a Hugging Face causal language model")
    parser.add_argument("--file", default=DEFAULT_FILE, help=f"the validation set (default: {DEFAULT_FILE}, downloaded)")
    parser.add_argument("--convention", default="both", choices=(*CONVENTIONS, "both"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=int, help="score the first so many items only")
    args = parse_strictly(parser)
    path = Path(args.file)
    if not path.exists() and path == Path(DEFAULT_FILE):
        download(path)
    items = load(path, N_ITEMS if path == Path(DEFAULT_FILE) else None)[: args.limit]
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        fail("scoring a Hugging Face model needs the package transformers: pip install transformers")
    try:
        model = AutoModelForCausalLM.from_pretrained(args.hf).to(args.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.hf)
    except (OSError, ValueError) as error:
        fail(f"{args.hf} can't be loaded: {str(error).splitlines()[0]}")

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    def losses_of(inputs, targets):
        logits = model(inputs).logits.float()
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="none")

    block_size = getattr(model.config, "max_position_embeddings", None) or 1024
    labels = np.array([item["label"] for item in items])
    for convention in CONVENTIONS if args.convention == "both" else (args.convention,):
        # four items a batch: the full logits of a batch are in memory at once
        batches = make_batches(items, convention, encode, block_size, items_per_batch=4)
        result = score(losses_of, batches, labels, convention, args.device)
        print(one_line({"task": "hellaswag", "convention": convention, **result}), flush=True)


if __name__ == "__main__":
    main()
