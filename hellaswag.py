"""
HellaSwag: which of four endings does a language model find the most likely?
(Zellers et al., 2019.)

    python hellaswag.py --hf gpt2                  # score a Hugging Face model
    python hellaswag.py --hf gpt2 --file my.jsonl  # items from a file of yours

The training scripts import it. Two conventions are in use and differ by
points, so both are here:

    nanogpt   build-nanogpt and llm.c: the raw ctx; acc by the summed loss of
              an ending, acc_norm by its mean loss per token. OpenAI's GPT-2
              124M scores 28.59 / 29.55.
    harness   lm-evaluation-harness: activity label, ctx_a and capitalised
              ctx_b, brackets cleaned up; acc by the summed loss, acc_norm by
              the loss per character. The same model scores 28.92 / 31.14.

Chance is 25; the standard error at 30% of 10,042 items is 0.46 points, so
always quote both. The offline dataset has a task in the same format, its cloze
(fineweb.cloze_items), which is not HellaSwag.
"""
import argparse
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fineweb import fail, make_folder, parse_strictly, retrying, say, with_estimate, write_atomic

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
N_ITEMS = 10_042
DEFAULT_FILE = "data/hellaswag/hellaswag_val.jsonl"
CONVENTIONS = ("nanogpt", "harness")
ITEMS_PER_BATCH = 16  # 64 rows; fixed, so that every machine computes the same batches


# ==========================================================================
# Items


Text = Annotated[str, msgspec.Meta(pattern=r"\S")]  # not blank


class Item(msgspec.Struct):
    """An item as it must be in the file, which may say more about it."""

    label: Annotated[int, msgspec.Meta(ge=0, le=3)]
    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: Text
    endings: Annotated[list[Text], msgspec.Meta(min_length=4, max_length=4)]


def load(path, n_items=None):
    """The items of a .jsonl file: a list of dicts.

    Raises SystemExit for a missing or malformed file, or if it has not n_items items (None: any).
    """
    path = Path(path)
    if not path.exists():
        fail(f"{path} does not exist: give the HellaSwag validation set's .jsonl file")
    again = "correct it, or remove the file to have it downloaded again"
    try:
        lines = path.read_bytes().splitlines()  # of bytes, which know no other line breaks than \n and \r
    except OSError as error:
        fail(f"{path} can't be read ({error.strerror}): give the HellaSwag validation set's .jsonl file")
    items = []
    for number, line in enumerate(lines, 1):
        try:
            item = msgspec.json.decode(line, type=Item, strict=False)  # "label": "3" will do
        except (ValueError, RecursionError) as error:
            fail(f"{path}, line {number} is not a HellaSwag item ({error}): {again}")
        items.append(msgspec.structs.asdict(item))
    if not items or n_items not in (None, len(items)):
        fail(f"{path} has {len(items):,} items, not {n_items or 'any'}: "
             "remove it to have it downloaded again")
    return items


def download(path):
    """Downloads the validation set to path, the whole of it or nothing. SystemExit if that fails."""
    import requests

    def get():
        response = requests.get(os.environ.get("HELLASWAG_URL", URL), timeout=20)
        response.raise_for_status()
        n_lines = response.content.count(b"\n")
        if n_lines < N_ITEMS - 1:
            raise OSError(f"only {n_lines:,} of {N_ITEMS:,} lines arrived")
        if hashlib.sha256(response.content).hexdigest() != SHA256:
            raise OSError("it arrived damaged: its checksum is another")
        return response.content

    content = retrying("the HellaSwag validation set", get, pauses=(1, 2, 4))
    make_folder(path.parent)
    write_atomic(path, lambda f: f.write(content))


def load_published(path):
    """The items of the file that download() made, or that a user has put there.

    A warning says if they are not the published ones, to whose scores a user may compare.
    """
    items = load(path, N_ITEMS)
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        say(f"warning: {path} is not the published file, so published scores may not be compared; "
            "remove it to have that downloaded")
    return items


def prompt_and_endings(item, convention):
    """An item's context and its four endings as the convention words them, without the space between."""
    if convention == "nanogpt":
        return item["ctx"], item["endings"]
    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    return clean(context), [clean(ending) for ending in item["endings"]]


def clean(text):
    """Takes WikiHow's tags out, as lm-evaluation-harness does (lm_eval/tasks/hellaswag/utils.py)."""
    text = text.strip()
    text = text.replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)
    return text.replace("  ", " ")


# ==========================================================================
# Batches


def make_batches(items, convention, encode, block_size, items_per_batch=ITEMS_PER_BATCH):
    """The items as a list of padded batches, in four widths at most.

    Items of similar length share a batch, so that little is computed on padding; only four widths,
    so that a compiled model or a GPU's memory meets few shapes. What is in a batch depends on nothing
    but the arguments. A context too long for block_size loses its beginning.

    encode(text) -> list of token ids. Returns a list of tuples:
        numbers (n,): the items in this batch, n <= items_per_batch
        inputs (4 * items_per_batch, W) int32: four rows per item
        targets of the same shape: the next token where it belongs to an ending, else -1
        characters (n, 4): the length of each ending
    """
    rows_of = []  # per item: its four (tokens, number of scored tokens)
    characters = []
    for item in items:
        context, endings = prompt_and_endings(item, convention)
        spaces = ""
        if convention == "harness":  # it moves a context's trailing spaces into the ending
            spaces = context[len(context.rstrip()) :]
            context = context.rstrip()
        prefix = encode(context)
        rows = []
        for ending in endings:
            tokens = encode(spaces + " " + ending)
            row = (prefix + tokens)[-(block_size + 1) :]
            rows.append((row, min(len(tokens), len(row) - 1)))
        rows_of.append(rows)
        characters.append([len(ending) for ending in endings])

    # width of an item: its longest row, without the last token, which is only a target
    lengths = np.array([max(len(row) for row, _ in rows) - 1 for rows in rows_of])
    widths = np.quantile(lengths, (0.25, 0.5, 0.75, 1.0), method="higher")
    widths = -(-widths // 8) * 8  # multiples of 8 suit the matrix units
    widths = np.unique(np.minimum(widths, block_size))

    batches = []
    narrower = 0
    for width in widths:
        members = np.flatnonzero((narrower < lengths) & (lengths <= width))
        narrower = width
        for start in range(0, len(members), items_per_batch):
            numbers = members[start : start + items_per_batch]
            # all batches are full; in the last one rows without any target stand for missing items
            inputs = np.zeros((4 * items_per_batch, width), dtype=np.int32)
            targets = np.full_like(inputs, -1)
            for place, number in enumerate(numbers):
                for k, (row, n_scored) in enumerate(rows_of[number]):
                    end = len(row) - 1
                    inputs[4 * place + k, :end] = row[:-1]
                    targets[4 * place + k, end - n_scored : end] = row[-n_scored:]
            sizes = np.array([characters[number] for number in numbers])
            batches.append((numbers, inputs, targets, sizes))
    return batches


# ==========================================================================
# Scores


@torch.no_grad()
def score(losses_of, batches, labels, convention, device="cpu", rank=0, world=1):
    """Accuracy of a model on the batches of make_batches(); batch j is computed by rank j % world.

    losses_of(inputs, targets) takes two (B, W) int64 tensors and returns the (B, W) cross-entropy in
    nats wherever targets >= 0 (anything elsewhere). Returns a dict, the same on every rank:
        n: the number of items
        acc, acc_norm: fractions, and their standard errors acc_se and acc_norm_se
        predictions, predictions_norm: each item's chosen ending, as a string of digits 0 to 3
    """
    chosen = torch.zeros(2, len(labels), dtype=torch.int64, device=device)
    mine = with_estimate(batches[rank::world], "scoring", "a file with fewer items takes less")
    for numbers, inputs, targets, characters in mine:
        inputs = torch.from_numpy(inputs).to(device, torch.int64)
        targets = torch.from_numpy(targets).to(device, torch.int64)
        losses = losses_of(inputs, targets).float()
        scored = targets >= 0
        # summed in double, so that the padding's width can't tip a close choice
        sums = losses.masked_fill(~scored, 0).cpu().double().sum(1)
        n_rows = 4 * len(numbers)
        sums = sums[:n_rows].view(-1, 4)  # (items, endings)
        if convention == "nanogpt":
            lengths = scored.cpu().sum(1)[:n_rows].view(-1, 4)  # in tokens
        else:
            lengths = torch.from_numpy(characters)
        chosen[0, numbers] = sums.argmin(1).to(device)
        chosen[1, numbers] = (sums / lengths).argmin(1).to(device)
    if world > 1:
        dist.all_reduce(chosen)  # one rank has each item's choice, the others have 0
    result = {"n": len(labels)}
    for name, choice in zip(("", "_norm"), chosen.cpu().numpy()):
        p = float((choice == labels).mean())
        result[f"acc{name}"] = p
        result[f"acc{name}_se"] = (p * (1 - p) / len(labels)) ** 0.5
        result[f"predictions{name}"] = "".join(map(str, choice))
    return result


def one_line(result):
    """A result in words, in percent with standard errors."""
    figures = []
    for name in ("acc", "acc_norm"):
        figures.append(f"{name} {100 * result[name]:.2f} ± {100 * result[name + '_se']:.2f}")
    task = f"{result['task']} ({result['convention']})"
    return f"{task}: {', '.join(figures)} ({result['n']:,} items, chance 25)"


class Scorer:
    """The four-way task that fits a dataset: HellaSwag for GPT-2 tokens, the folder's cloze for bytes.

    Made by open_scorer(). batches: {convention: its batches}.
    """

    def __init__(self, task, labels, batches, device, rank, world):
        self.task = task
        self.labels = np.array(labels)
        self.batches = batches
        self.device = device
        self.rank = rank
        self.world = world

    def score(self, losses_of, convention, step, folder):
        """The result of score() on this task, with its task and convention.

        Rank 0 also writes it, with step and the labels, to folder/TASK_CONVENTION.json, so that two
        runs can be compared item by item.
        """
        result = {"task": self.task, "convention": convention}
        batches = self.batches[convention]
        distributed = (self.device, self.rank, self.world)
        result |= score(losses_of, batches, self.labels, convention, *distributed)
        if self.rank == 0:
            labels = "".join(map(str, self.labels))
            content = json.dumps({"step": step, **result, "labels": labels}).encode()
            path = Path(folder) / f"{self.task}_{convention}.json"
            write_atomic(path, lambda f: f.write(content))
        return result


def open_scorer(path, data_dir, tokenizer, block_size, device="cpu", rank=0, world=1):
    """The Scorer of a dataset; None, with a warning, if its items or the tokenizer are not available.

    path: HellaSwag's .jsonl, downloaded if it doesn't exist. tokenizer: a tiktoken.Encoding on rank 0,
    or None. Rank 0 reads, downloads and tokenises, and sends the batches to the others. Raises
    SystemExit for a malformed file, on every rank.
    """
    parcel = [None]
    if rank == 0 and tokenizer is not None:
        try:
            parcel = [prepare_task(path, data_dir, tokenizer, block_size)]
        except SystemExit as error:  # the others must end too, rather than wait for a parcel
            parcel = [error]
    if world > 1:
        dist.broadcast_object_list(parcel, src=0)
    task = parcel[0]
    if isinstance(task, SystemExit):
        raise task
    if task is None:
        return None
    return Scorer(*task, device, rank, world)


def prepare_task(path, data_dir, tokenizer, block_size):
    """(task, labels, {convention: batches}), or None with a warning if there are no items."""
    if tokenizer.name == "bytes":
        task = "cloze"
        conventions = ("nanogpt",)
        items = cloze_items(data_dir)
    else:
        task = "hellaswag"
        conventions = CONVENTIONS
        items = hellaswag_items(Path(path))
    if items is None:
        return None

    labels = [item["label"] for item in items]
    batches = {}
    for convention in conventions:
        encode = tokenizer.encode_ordinary
        batches[convention] = make_batches(items, convention, encode, block_size)
    return task, labels, batches


def cloze_items(data_dir):
    path = Path(data_dir) / "cloze.jsonl"
    if not path.exists():
        say(f"no four-way score: {data_dir} has no cloze.jsonl")
        return None
    return load(path)


def hellaswag_items(path):
    if not path.exists():
        try:
            download(path)
        except SystemExit as error:  # training goes on without
            say(f"HellaSwag will not be scored: {error}; or give the file with --hellaswag")
            return None
    return load_published(path) if path == Path(DEFAULT_FILE) else load(path)


# ==========================================================================
# Command line: score a Hugging Face model


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--hf", required=True, help="name or folder of a Hugging Face causal language model")
    add("--file", default=DEFAULT_FILE, help=f"items [{DEFAULT_FILE}, downloaded]")
    add("--convention", default="both", choices=(*CONVENTIONS, "both"),
        help="how prompts are worded and scores made [both]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    add("--limit", type=int, help="score only this many items, the first ones [all]")
    args = parse_strictly(parser)
    if args.limit is not None and args.limit < 1:
        fail(f"--limit {args.limit}: must be at least 1")
    path = Path(args.file)
    if path != Path(DEFAULT_FILE):
        items = load(path)
    else:
        if not path.exists():
            download(path)
        items = load_published(path)
    items = items[: args.limit]
    labels = np.array([item["label"] for item in items])
    model, tokenizer = load_hugging_face(args.hf)
    try:
        model.to(args.device).eval()
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} can't be used: {str(error).splitlines()[0]}")

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    def losses_of(inputs, targets):
        logits = model(inputs).logits.float().transpose(1, 2)  # (B, vocabulary, W)
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")

    block_size = getattr(model.config, "max_position_embeddings", None) or 1024
    conventions = CONVENTIONS if args.convention == "both" else (args.convention,)
    for convention in conventions:
        # four items a batch: unlike the training scripts', this model returns all logits at once
        batches = make_batches(items, convention, encode, block_size, items_per_batch=4)
        result = {"task": "hellaswag", "convention": convention}
        result |= score(losses_of, batches, labels, convention, args.device)
        print(one_line(result), flush=True)


def load_hugging_face(name):
    """(model, tokenizer) by name or folder. Raises SystemExit, with one line, if they can't be loaded."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        fail("scoring a Hugging Face model needs the package transformers: pip install transformers")
    try:
        model = AutoModelForCausalLM.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a damaged folder can raise anything
        reason = str(error).strip() or type(error).__name__
        fail(f"{name} can't be loaded: {reason.splitlines()[0]}")
    return model, tokenizer


if __name__ == "__main__":
    main()
