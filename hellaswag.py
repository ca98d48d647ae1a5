"""
HellaSwag: which of four endings does a language model find the most likely?
(Zellers et al., 2019.)

    python hellaswag.py --hf gpt2                  # score a model, in float32
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
always quote both. Models of bytes get a task in the same format out of their
validation text, the cloze, which is not HellaSwag.
"""
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fineweb
from fineweb import fail, say, write_atomic

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
N_ITEMS = 10_042
DEFAULT_FILE = "data/hellaswag/hellaswag_val.jsonl"
CONVENTIONS = ("nanogpt", "harness")
CLOZE_ITEMS = 250
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
    with fineweb.one_line(f"{path} can't be read: give the HellaSwag validation set's .jsonl file"):
        lines = path.read_bytes().splitlines()  # of bytes, which know no other line breaks than \n and \r
    again = "or move it away to have it downloaded" if n_items else "or give another"
    items = []
    for number, line in enumerate(lines, 1):
        try:
            item = msgspec.json.decode(line, type=Item, strict=False)  # "label": "3" will do
        except (ValueError, RecursionError) as error:
            fail(f"{path}, line {number} is not a HellaSwag item ({error}): correct it, {again}")
        items.append(msgspec.structs.asdict(item))
    if not items or n_items not in (None, len(items)):
        fail(f"{path} has {len(items):,} items, not {n_items or 'any'}: correct it, {again}")
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

    content = fineweb.retrying("the HellaSwag validation set", get, pauses=(1, 2, 4))
    with fineweb.one_line(f"{path.parent} can't be made a folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda f: f.write(content))


def load_published(path):
    """The items of the file that download() made, or that a user has put there.

    A warning says if they are not the published ones, to whose scores a user may compare.
    """
    items = load(path, N_ITEMS)
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        say(f"warning: {path} is not the published file, so published scores may not be compared; "
            "move it away to have that downloaded")
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


def cloze_items(documents, n_items=CLOZE_ITEMS):
    """Four-way items in HellaSwag's format: six words that continue a text, and three shuffles of them.

    documents: a list of str. Wrong endings from other texts would leave small models at chance; the
    order of words is something that they do learn. The endings have small letters and spaces only: a
    full stop or a capital in an odd place would give the wrong ones away. They are drawn without a
    look at them.
    """
    rng = np.random.default_rng(0)
    windows = []  # of six words of context and six of the ending
    for text in documents:
        words = text.split()
        start = 0
        while start + 12 <= len(words):
            ending = words[start + 6 : start + 12]
            plain = all(re.fullmatch("[a-z]+", word) for word in ending)
            # a word twice would give shuffles like each other, and 100 characters fit into --tiny's 128
            short = len(" ".join(words[start : start + 12])) <= 100
            if plain and short and len(set(ending)) == 6:
                windows.append((" ".join(words[start : start + 6]), ending))
                start += 12
            else:
                start += 1
    items = []
    for number in rng.permutation(len(windows))[:n_items]:
        context, ending = windows[number]
        endings = [" ".join(ending)]
        while len(endings) < 4:
            shuffled = " ".join(rng.permutation(ending))
            if shuffled not in endings:
                endings.append(shuffled)
        order = rng.permutation(4)
        label = int(np.flatnonzero(order == 0)[0])
        items.append({"ctx": context, "endings": [endings[i] for i in order], "label": label})
    return items


def validation_documents(data_dir):
    """The texts in a folder's validation shard of bytes, of its first 4 MB if it is larger."""
    path = min(Path(data_dir).glob("*_val_*.bin"))
    tokens = fineweb.map_shard(path, at_random=False)[: 1 << 22]
    content = tokens.astype(np.uint8).tobytes()  # which makes a 0 of 256, <|endoftext|>
    return content.decode(errors="replace").split("\0")


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
            # SentencePiece would begin an ending of its own with another token than the same one here
            tokens = encode(context + spaces + " " + ending)[len(prefix) :]
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
def score(logits_of, batches, labels, convention, device="cpu", rank=0, world=1):
    """Accuracy of a model on the batches of make_batches(); batch j is computed by rank j % world.

    logits_of(inputs) takes (B, W) int64 and returns (B, W, V) logits, V at least the vocabulary.
    Returns a dict, the same on every rank:
        n: the number of items
        acc, acc_norm: fractions, and their standard errors acc_se and acc_norm_se
        predictions, predictions_norm: each item's chosen ending, as a string of digits 0 to 3
    """
    chosen = torch.zeros(2, len(labels), dtype=torch.int64, device=device)
    for numbers, inputs, targets, characters in batches[rank::world]:
        inputs = torch.from_numpy(inputs).to(device, torch.int64)
        targets = torch.from_numpy(targets).to(torch.int64)
        scored = targets >= 0
        logits = logits_of(inputs)[scored.to(device)].float()  # (number of scored tokens, V)
        losses = F.cross_entropy(logits, targets[scored].to(device), reduction="none")
        # summed in double, so that the padding's width can't tip a close choice
        sums = torch.zeros(targets.shape, dtype=torch.float64)
        sums[scored] = losses.cpu().double()
        n_rows = 4 * len(numbers)
        sums = sums.sum(1)[:n_rows].view(-1, 4)  # (items, endings)
        if convention == "nanogpt":
            lengths = scored.sum(1)[:n_rows].view(-1, 4)  # in tokens
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
    """The four-way task that fits a dataset: HellaSwag for GPT-2 tokens, the cloze for bytes.

    Made by open_scorer(). batches: {convention: its batches}.
    """

    def __init__(self, task, labels, batches, device, rank, world):
        self.task = task
        self.labels = np.array(labels)
        self.batches = batches
        self.where = (device, rank, world)

    def score(self, logits_of, convention, step, folder):
        """The result of score() on this task, with its task and convention.

        Rank 0 also writes it, with step and the labels, to folder/TASK_CONVENTION.json, so that two
        runs can be compared item by item.
        """
        result = {"task": self.task, "convention": convention}
        result |= score(logits_of, self.batches[convention], self.labels, convention, *self.where)
        if self.where[1] == 0:
            labels = "".join(map(str, self.labels))
            content = json.dumps({"step": step, **result, "labels": labels}).encode()
            write_atomic(Path(folder) / f"{self.task}_{convention}.json", lambda f: f.write(content))
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
        items = cloze_items(validation_documents(data_dir))
        if len(items) < CLOZE_ITEMS // 2:
            say(f"no four-way score: {data_dir} has text for {len(items)} items only")
            return None
    else:
        task = "hellaswag"
        conventions = CONVENTIONS
        items = hellaswag_items(Path(path))
        if items is None:
            return None
    labels = [item["label"] for item in items]
    batches = {}
    for convention in conventions:
        batches[convention] = make_batches(items, convention, tokenizer.encode_ordinary, block_size)
    return task, labels, batches


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


@dataclass
class Args:
    hf: str  # name or folder of a Hugging Face causal language model
    file: Path = Path(DEFAULT_FILE)  # items; the default is downloaded
    convention: Literal["nanogpt", "harness", "both"] = "both"  # how prompts are worded and scores made
    device: str | None = None  # where to run; None: cuda if there is one, else cpu
    limit: int | None = None  # score only this many items, the first ones; None: all


def main():
    import tyro

    plain = (tyro.conf.FlagCreatePairsOff,)
    args = tyro.cli(Args, description=__doc__, use_underscores=True, config=plain)
    if args.limit is not None and args.limit < 1:
        fail(f"--limit {args.limit}: must be at least 1")
    if args.file == Path(DEFAULT_FILE):
        if not args.file.exists():
            download(args.file)
        items = load_published(args.file)
    else:
        items = load(args.file)
    items = items[: args.limit]
    labels = np.array([item["label"] for item in items])
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_hugging_face(args.hf)
    try:
        model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {device} can't be used: {str(error).splitlines()[0]}")
    say(f"{args.hf} in float32 on {device}")

    starts = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]  # if the tokenizer begins texts with <s>

    def encode(text):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        return [tokenizer.bos_token_id] + tokens if starts else tokens

    block_size = getattr(model.config, "max_position_embeddings", None) or 1024
    conventions = CONVENTIONS if args.convention == "both" else (args.convention,)
    for convention in conventions:
        batches = make_batches(items, convention, encode, block_size, items_per_batch=4)
        result = {"task": "hellaswag", "convention": convention}
        result |= score(lambda inputs: model(inputs).logits, batches, labels, convention, device)
        print(one_line(result), flush=True)


def load_hugging_face(name):
    """(model, tokenizer) by name or folder. Raises SystemExit, with one line, if they can't be loaded."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        fail("scoring a Hugging Face model needs the package transformers: pip install transformers")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a damaged folder can raise anything
        reason = str(error).strip() or type(error).__name__
        fail(f"{name} can't be loaded: {reason.splitlines()[0]}")
    return model, tokenizer


if __name__ == "__main__":
    main()
