"""
FineWeb as token shards: the writer (run this file) and the loader (the
training scripts import it).

    python fineweb.py                        # FineWeb sample-10BT
    python fineweb.py --shards 10            # a small start; more to continue
    python fineweb.py --pretokenized         # the same tokens, ready-made
    python fineweb.py --dataset fineweb-edu  # the educational subset
    python fineweb.py --sample               # 5 MB of English, no network
    python fineweb.py --verify --out DIR     # check every shard
    python fineweb.py --files a.jsonl b.txt c.parquet --out data/mine

Every command can be killed at any time and run again: it goes on after the
last finished shard, and the bytes come out the same. Nothing in the folder
that this program didn't write is changed or removed.

A shard is a file in the format of llm.c and modded-nanogpt:

    256 int32     header: magic 20240520, version 1, number of tokens, zeros
    n uint16      the tokens; every document starts with <|endoftext|>

The first shard is for validation. manifest.json beside the shards names the
tokenizer, the source and each shard's checksum.
"""
import argparse
import collections
import contextlib
import dataclasses
import difflib
import errno
import functools
import hashlib
import importlib.util
import json
import math
import mmap
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import zipfile
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import msgspec
import numpy as np
import tiktoken

# torch, pyarrow, huggingface_hub and tqdm are imported where they are used: a tokenizer process needs
# at most one of them, and torch alone would cost each process 200 MB.

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
SHARD_TOKENS = 100_000_000
VOCAB_SIZE = {"gpt2": 50257, "bytes": 257}  # the last id is <|endoftext|>

DATASETS = {
    "fineweb": {
        "repository": "HuggingFaceFW/fineweb",
        "folder": "sample/10BT",  # in the repository
        "ready_made": "kjj0/fineweb10B-gpt2",  # repository of its shards
        "out": "data/fineweb10B",
    },
    "fineweb-edu": {
        "repository": "HuggingFaceFW/fineweb-edu",
        "folder": "sample/10BT",
        "ready_made": "kjj0/finewebedu10B-gpt2",
        "out": "data/fineweb-edu10B",
    },
}
SAMPLE = "data/sample"
NO_VOCABULARY = 120  # seconds for tiktoken to fetch its 1.5 MB
NO_ANSWER = 30  # seconds without a byte from the hub, after which we ask again
CLOZE = 2  # version of cloze_items(): a folder with another one's items gets new ones

# The training scripts' defaults: next_command() scales them down to a smaller dataset.
BATCH_TOKENS = 2**19
MAX_STEPS = 19_073
WARMUP_STEPS = 715


# ==========================================================================
# File format


def shard_header(n_tokens):
    """The first 1,024 bytes of a shard."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = MAGIC, VERSION, n_tokens
    return header.tobytes()


def shard_tokens(path):
    """The number of tokens in a shard, from its header, checked against the file's size.

    Raises SystemExit for a missing, foreign or truncated file.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "is missing"
        fail(f"{path} {what}: run the fineweb.py command that made the folder again")
    with one_line(f"{path} can't be read"), open(path, "rb") as f:
        content = f.read(HEADER_BYTES)
    if len(content) < HEADER_BYTES:  # comes first: an odd number of bytes is no array of int32
        fail(f"{path} is truncated ({len(content):,} bytes, and its header has {HEADER_BYTES:,}): "
             "remove it and run the fineweb.py command that made it again")
    header = np.frombuffer(content, dtype=np.int32)
    if header[0] != MAGIC or header[1] != VERSION:
        fail(f"{path} is not a token shard (magic {MAGIC}, version {VERSION}): "
             "remove it, or write it again")
    n_tokens = int(header[2])
    size = path.stat().st_size
    expected = HEADER_BYTES + 2 * n_tokens
    if size != expected:
        fail(f"{path} is truncated ({size:,} of {expected:,} bytes): "
             "remove it and run the fineweb.py command that made it again")
    return n_tokens


Count = Annotated[int, msgspec.Meta(ge=0)]
FileName = Annotated[str, msgspec.Meta(pattern=r"^[^/\\]+\.bin$")]  # nothing outside the folder


class Shard(TypedDict):
    name: FileName
    tokens: Count
    sha256: str
    # where the next shard begins: [file, document, tokens of it already written]; null after the last
    # shard; not there if ready-made
    next: NotRequired[Annotated[list[Count], msgspec.Meta(min_length=3, max_length=3)] | None]


class Manifest(TypedDict):
    """manifest.json: where a folder's tokens come from, and which files are ours."""

    dataset: str
    revision: NotRequired[str | None]
    files: NotRequired[list]  # the source's, in the order in which they are read
    tokenizer: str
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    # sizes of a training shard and of the first one; not there if ready-made
    shard_tokens: NotRequired[Annotated[int, msgspec.Meta(ge=1)]]
    val_tokens: NotRequired[Annotated[int, msgspec.Meta(ge=1)]]
    complete: NotRequired[bool]  # the source has been read to its end
    shards: list[Shard]
    cloze: NotRequired[int]  # which version of cloze_items() is beside the offline sample


def read_manifest(folder):
    """The folder's Manifest, None if there is none; SystemExit if it is unreadable."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path} is not a manifest of fineweb.py ({error}): "
             "choose another folder, or write the shards again without it")


def write_manifest(folder, manifest):
    content = json.dumps(manifest, indent=1).encode()
    write_atomic(Path(folder) / "manifest.json", lambda f: f.write(content))


def open_manifest(folder, wanted):
    """The folder's manifest, or a new one; wanted: {key: value} that it must agree with.

    Raises SystemExit if the folder holds shards of something else.
    """
    manifest = read_manifest(folder)
    if manifest and (manifest["shards"] or begun_with(manifest, wanted)):
        for key, value in wanted.items():
            if manifest.get(key) != value:
                fail(f"{folder} holds shards with {key} = {manifest.get(key)!r}, not {value!r}: "
                     "choose another folder for these")
        manifest.setdefault("complete", False)
        return manifest
    if list(folder.glob("*.bin")):
        fail(f"{folder} holds shards that its manifest.json doesn't list: choose another folder")
    return {**wanted, "complete": False, "shards": []}


def begun_with(manifest, wanted):
    """Whether a manifest is of this source, so that files which it doesn't list yet may be ours."""
    return all(manifest.get(key) == value for key, value in wanted.items())


def is_whole(folder, shard):
    """Whether a shard of the manifest is in the folder, with the size that it should have."""
    path = folder / shard["name"]
    return path.is_file() and path.stat().st_size == HEADER_BYTES + 2 * shard["tokens"]


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(folder):
    """Checks every shard against the manifest. Raises SystemExit that names the bad ones."""
    manifest = read_manifest(folder)
    if manifest is None:
        fail(f"{folder} has no manifest.json, so there is nothing to check against")
    if not manifest["shards"]:
        fail(f"{folder}/manifest.json lists no shards: run the command that made the folder again")
    bad = []
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        if not path.exists():
            verdict = "MISSING"
        elif not is_whole(folder, shard) or sha256(path) != shard["sha256"]:
            verdict = "BAD"
        else:
            verdict = "ok"
        print(f"{path}: {verdict}")
        if verdict != "ok":
            bad.append(str(path))
    if bad:
        fail(f"{len(bad)} of {len(manifest['shards'])} shards are bad: remove {' '.join(bad)} and run "
             "the command that made the folder again; it rebuilds what is missing")


# ==========================================================================
# Writer: documents -> tokens -> shards

# ---- Reading documents


def read_documents(path, first_row=0):
    """Yields (row, documents, new, read): consecutive documents of a .parquet, .jsonl or .txt file.

    row: the number of the first of them in the file; those before first_row are left out.
    documents: a list of str; for parquet the arguments of read_row_group(), so that the process that
    tokenises them reads them too.
    new: False if the text continues the one before. Only a .txt file does this: it is one document,
    in pieces of about 1 MB that end at a line break, and row is the number of the piece.
    read: how much of the file has been read with these, from 0 to 1.

    Raises SystemExit for a file that is not what its name says.
    """
    readers = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_txt}
    try:
        yield from readers[path.suffix](path, first_row)
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 text ({error.reason} near byte {error.start:,})")


def open_parquet(path):
    """A pyarrow.parquet.ParquetFile. Raises SystemExit if it is none, or has no column of texts."""
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(path)
        schema = parquet.schema_arrow
    except (OSError, ValueError, pyarrow.ArrowException):
        fail(f"{path} is not a parquet file, or only part of one")
    if schema.names.count("text") != 1:
        fail(f"{path} has no column 'text' (it has {', '.join(schema.names)})")
    kind = schema.field("text").type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        fail(f"{path}: its column 'text' holds {kind}, not strings")
    return parquet


def text_bytes(path):
    """The size of the text in a file, for .jsonl with what JSON adds to it."""
    if path.suffix != ".parquet":
        return path.stat().st_size
    metadata = open_parquet(path).metadata
    n_bytes = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for column in range(row_group.num_columns):
            if row_group.column(column).path_in_schema == "text":
                n_bytes += row_group.column(column).total_uncompressed_size
    return n_bytes


def read_parquet(path, first_row):
    parquet = open_parquet(path)
    row = 0
    for group in range(parquet.num_row_groups):
        n_rows = parquet.metadata.row_group(group).num_rows
        skip = max(0, first_row - row)
        if skip < n_rows:
            read = (row + n_rows) / parquet.metadata.num_rows
            yield row + skip, (path, group, skip), True, read
        row += n_rows


def read_row_group(path, group, skip):
    """The texts of one row group of a parquet file without the first skip ones: a list of str."""
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(path)
        # no threads: every core has a process that does this
        table = parquet.read_row_group(group, columns=["text"], use_threads=False)
        texts = table.column(0).to_pylist()[skip:]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = str(error).split("\n")[0]
        fail(f"{path} is damaged in row group {group} ({reason}): replace it or leave it out")
    return [text or "" for text in texts]


def read_jsonl(path, first_row):
    size = path.stat().st_size
    n_bytes = 0
    texts = []
    with open(path, "rb") as f:
        for row, line in enumerate(f):
            n_bytes += len(line)
            if row < first_row:
                continue
            texts.append(parse_line(path, row, line))
            if len(texts) == 256:
                yield row - 255, texts, True, n_bytes / size
                texts = []
    if texts:
        yield row - len(texts) + 1, texts, True, 1.0


def parse_line(path, row, line):
    """The text in a line of a .jsonl file, given as bytes."""
    try:
        text = json.loads(line.decode())["text"]
        text.encode()  # not every string of JSON is text: "\ud800" is half a character
    except UnicodeDecodeError:
        fail(f"{path}, line {row + 1} is not UTF-8 text: correct it or leave it out")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fail(f'{path}, line {row + 1} is not {{"text": "…"}}: correct it or leave it out')
    return text


def read_txt(path, first_row):
    size = path.stat().st_size
    row = 0
    with open(path, encoding="utf-8") as f:
        while lines := f.readlines(1 << 20):
            if row >= first_row:
                read = f.buffer.tell() / size  # the buffer is a little ahead of the text
                yield row, ["".join(lines)], row == 0, read
            row += 1


# ---- Tokenizers


def get_tokenizer(name):
    """The tiktoken.Encoding called name: "gpt2", or "bytes" (256 byte values and end-of-text).

    GPT-2's vocabulary is read from data/gpt2/{vocab.bpe,encoder.json} if they exist, else from
    tiktoken's cache, else downloaded by tiktoken. Raises SystemExit if none of these works, and for
    an unknown name.
    """
    if name == "bytes":
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"[\s\S]{1,64}",  # there are no merges, so any cut of the text will do
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256},
        )
    if name != "gpt2":
        fail(f"unknown tokenizer {name!r}: choose {' or '.join(VOCAB_SIZE)}")
    try:
        if Path("data/gpt2/vocab.bpe").exists():
            return gpt2_from_files(Path("data/gpt2"))
        return within(NO_VOCABULARY, lambda: tiktoken.get_encoding("gpt2"))
    except Exception as error:  # of the network, a proxy or a file: the way out is the same
        fail(f"GPT-2's vocabulary can't be loaded ({type(error).__name__}): connect to the network "
             "once, set TIKTOKEN_CACHE_DIR to a filled tiktoken cache, or put vocab.bpe and "
             "encoder.json into data/gpt2/")


def within(seconds, action):
    """What action() returns. Raises TimeoutError if it takes longer; its thread is left to itself.

    For a library that waits for ever if the network stalls.
    """
    future = Future()

    def run():
        try:
            future.set_result(action())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)


def gpt2_from_files(folder):
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    vocabulary = str(folder / "vocab.bpe")
    encoder = str(folder / "encoder.json")
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(vocabulary, encoder),
        special_tokens={"<|endoftext|>": 50256},
    )


def try_tokenizer(name):
    """get_tokenizer(name); if it fails, a warning of what will be missing, and None."""
    try:
        return get_tokenizer(name)
    except SystemExit as reason:
        say(f"no samples and no HellaSwag: {reason}")
        return None


# ---- Tokenising in order, on all cores


encoding = None  # in a tokenizer process: its tokenizer, set by start_worker


def start_worker(tokenizer):
    global encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    threading.Thread(target=end_with_main, daemon=True).start()
    encoding = get_tokenizer(tokenizer)


def end_with_main():
    """Ends this process when the main one ends, which may have been killed and then says nothing."""
    multiprocessing.parent_process().join()
    os._exit(1)


def tokenize_in_worker(documents, new):
    return tokenize(documents, new, encoding)


def tokenize(documents, new, encoding):
    """(all tokens, uint16; the number of tokens of each document) of what read_documents() yields.

    Each document is preceded by <|endoftext|>, unless new is False.
    """
    if not isinstance(documents, list):
        documents = read_row_group(*documents)
    parts = []
    for text in documents:
        tokens = encoding.encode_to_numpy(text, disallowed_special=())
        if new:
            tokens = np.concatenate(([encoding.eot_token], tokens))
        parts.append(tokens)
    counts = np.array([len(part) for part in parts])
    return np.concatenate(parts).astype(np.uint16), counts


def tokenized(sizes, open_file, position, tokenizer, workers):
    """Yields (file, row, tokens, counts, share) in the order of the source, from one position on.

    sizes: of each file, in any unit. position: (file, row) of the first document. open_file(i,
    first_row) yields the documents of file number i as read_documents() does. share: how much of the
    source has been read with these tokens, from 0 to 1. The result is the same for any number of
    workers; 0 tokenises in this process.
    """
    first_file, first_row = position

    def batches():
        for i in range(first_file, len(sizes)):
            start = first_row if i == first_file else 0
            for row, documents, new, read in open_file(i, start):
                share = (sum(sizes[:i]) + read * sizes[i]) / sum(sizes)
                yield i, row, share, documents, new

    if workers == 0:
        encoder = get_tokenizer(tokenizer)
        for i, row, share, documents, new in batches():
            yield i, row, *tokenize(documents, new, encoder), share
        return
    # spawn, not fork: a forked child inherits locks that pyarrow's or the download's threads may hold
    # at that moment, and can hang. And it is the only way under Windows.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, start_worker, (tokenizer,))
    try:
        queue = collections.deque()
        for i, row, share, documents, new in batches():
            queue.append((i, row, share, pool.submit(tokenize_in_worker, documents, new)))
            # enough waiting that no worker is idle, few enough to bound the memory
            if len(queue) > 4 * workers:
                i, row, share, future = queue.popleft()
                yield i, row, *future.result(), share
        for i, row, share, future in queue:
            yield i, row, *future.result(), share
    finally:
        pool.shutdown(cancel_futures=True)


# ---- Writing shards


# what write_atomic() leaves when it is killed
PARTIAL = re.compile(r"(manifest\.json|cloze\.jsonl|fineweb_(val|train)_\d{6}\.bin)\.\d+\.tmp")


def start_folder(folder, manifest):
    """Makes the folder and its manifest, which comes first: what stands in it is known to be ours."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if PARTIAL.fullmatch(path.name) and path.is_file():
            path.unlink()
    if not manifest["shards"]:
        write_manifest(folder, manifest)


def write_shards(folder, manifest, source, last_shard, total):
    """Writes the shards that are missing or not yet in the manifest, up to number last_shard.

    source(file, row) returns an iterator like tokenized(). last_shard None: all shards.
    total: a first estimate of the number of tokens, for the progress bar.

    Raises SystemExit if the source has not a single document.
    """
    start_folder(folder, manifest)
    shards = manifest["shards"]
    if any(shard.get("next") is None for shard in shards[:-1]):
        fail(f"{folder}/manifest.json doesn't say where each shard begins: choose another folder")
    if shards and shards[-1].get("next") is None and not manifest["complete"]:
        manifest["complete"] = True  # an older version could be killed in between
        write_manifest(folder, manifest)
    lost = []
    done = 0
    for number, shard in enumerate(shards):
        if is_whole(folder, shard):
            done += shard["tokens"]
        else:
            lost.append(number)
            if (folder / shard["name"]).exists():
                say(f"{folder / shard['name']} is damaged: writing it again")
    with progress_bar(folder, total, done) as bar:
        for number in lost:
            write_range(folder, manifest, source, number, number, bar)
        begun = len(shards)
        if not manifest["complete"] and (last_shard is None or begun <= last_shard):
            write_range(folder, manifest, source, begun, last_shard, bar)
        bar.total = bar.n
    if not shards:
        fail("there is no text in the source, so no shard was written: give files with text")


def write_range(folder, manifest, source, first, last, bar):
    """Writes shards number first to last; last None, or beyond the end of the source: to the end.

    New shards make the bar's total more exact with each batch.
    """
    file = row = skip = 0
    if first > 0:
        file, row, skip = manifest["shards"][first - 1]["next"]
    known = len(manifest["shards"])
    number = first
    size = manifest["shard_tokens"] if first else manifest["val_tokens"]
    limit = math.inf if last is None else manifest["val_tokens"] + last * manifest["shard_tokens"]
    buffer = np.empty(size, dtype=np.uint16)
    filled = 0
    batches = source(file, row)
    for file, row, tokens, counts, share in batches:
        ends = np.cumsum(counts)
        taken = skip  # the beginning of the very first document may stand in the shard before
        skip = 0
        if first == known:
            read = bar.n + len(tokens) - taken
            bar.total = min(limit, int(read / share))
        while taken < len(tokens):
            n = min(len(tokens) - taken, len(buffer) - filled)
            buffer[filled : filled + n] = tokens[taken : taken + n]
            filled += n
            taken += n
            bar.update(n)
            if filled < len(buffer):
                continue
            document = int(np.searchsorted(ends, taken, side="right"))  # the next token's
            begin = int(ends[document - 1]) if document else 0
            finish_shard(folder, manifest, number, buffer, [file, row + document, taken - begin])
            if number == last:
                batches.close()
                return
            number += 1
            buffer = np.empty(manifest["shard_tokens"], dtype=np.uint16)
            filled = 0
    if number < known and not filled:
        fail_changed(folder, manifest["shards"][number]["name"])
    if filled:
        finish_shard(folder, manifest, number, buffer[:filled], None)
    elif number > 0:
        manifest["complete"] = True
        write_manifest(folder, manifest)


def finish_shard(folder, manifest, number, tokens, position):
    """Writes a shard's file, then its line in the manifest; position: where the next one begins.

    A shard that the manifest knows must come out as it says, else SystemExit.
    """
    split = "train" if number else "val"
    name = f"fineweb_{split}_{number:06d}.bin"
    header = shard_header(len(tokens))
    digest = hashlib.sha256(header)
    digest.update(tokens.data)
    checksum = digest.hexdigest()
    shard = {"name": name, "tokens": len(tokens), "sha256": checksum, "next": position}
    shards = manifest["shards"]
    if number < len(shards) and shards[number] != shard:
        fail_changed(folder, name)

    def write(f):
        f.write(header)
        f.write(tokens.data)

    write_atomic(folder / name, write)
    if number == len(shards):
        shards.append(shard)
        manifest["complete"] = position is None
        write_manifest(folder, manifest)


def fail_changed(folder, name):
    fail(f"{name} came out different from what {folder}/manifest.json says, so the source has "
         "changed: choose another folder and start again")


@contextlib.contextmanager
def locked(folder, advice, wait=False):
    """A context that has a folder's lock; the arguments are lock_folder()'s."""
    lock_folder(folder, advice, wait)
    try:
        yield
    finally:
        unlock_folder(folder)


def missing_bytes(folder, manifest, all_bytes):
    """How many of a dataset's all_bytes, at most, are still to be written."""
    missing = 0 if manifest["complete"] else all_bytes
    for shard in manifest["shards"]:
        if not manifest["complete"]:
            missing -= 2 * shard["tokens"]
        if not is_whole(folder, shard):
            missing += 2 * shard["tokens"]
    return max(0, missing)


def check_disk(folder, need):
    """Prints the bytes needed and free on the folder's disk. Raises SystemExit if they don't fit."""
    if need == 0:
        return
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    line = f"{folder} needs up to {need / 1e9:.1f} GB of disk space, {free / 1e9:.1f} GB are free"
    if free < need:
        fail(f"{line}: make room, choose another --out, or start small with --shards N")
    say(line)


def progress_bar(folder, total, done):
    from tqdm import tqdm

    pause = 1 if sys.stderr.isatty() else 30  # seconds between updates: a log file needs fewer
    unit = {"unit": " tokens", "unit_scale": True}
    return tqdm(desc=folder.name, total=total, initial=done, mininterval=pause, **unit)


# ---- Source: local files


def tokenize_files(folder, paths, last_shard, shard_tokens, tokenizer, workers):
    """Writes the tokens of local .jsonl, .txt and .parquet files as shards."""
    for path in paths:
        if not path.is_file():
            fail(f"{path} is not a file")
        if path.suffix not in (".jsonl", ".txt", ".parquet"):
            fail(f"{path}: the text must be a .jsonl, .txt or .parquet file")
    n_bytes = sum(text_bytes(path) for path in paths)
    sizes = [path.stat().st_size for path in paths]
    wanted = {
        "dataset": "files", "revision": None,
        "files": [[str(path), size] for path, size in zip(paths, sizes)],
        "tokenizer": tokenizer, "vocab_size": VOCAB_SIZE[tokenizer],
        "shard_tokens": shard_tokens,
        # about a tenth of a small text, so that something is left to train on
        "val_tokens": min(shard_tokens, max(1024, sum(sizes) // 40)),
    }  # fmt: skip
    manifest = open_manifest(folder, wanted)
    most = n_bytes + len(paths)  # no document has more tokens than bytes, but for its <|endoftext|>
    total = n_bytes // (4 if tokenizer == "gpt2" else 1)
    if last_shard is not None:
        limit = manifest["val_tokens"] + last_shard * shard_tokens
        most = min(most, limit)
        total = min(total, limit)
    check_disk(folder, missing_bytes(folder, manifest, 2 * most))

    def open_file(i, first_row):
        return read_documents(paths[i], first_row)

    def source(file, row):
        return tokenized(sizes, open_file, (file, row), tokenizer, workers)

    write_shards(folder, manifest, source, last_shard, total)


# ---- Source: a dataset on the Hugging Face hub


class Large(msgspec.Struct):
    """What the hub knows of a large file."""

    oid: str  # SHA-256
    size: Count


class Entry(msgspec.Struct):
    """A file or folder in the hub's list."""

    path: str
    size: Count = 0
    lfs: Large | None = None


class Revision(msgspec.Struct):
    sha: str


def hub_files(repo, prefix, suffix, revision):
    """(revision, {file: Entry}) of a dataset repository, sorted by name; revision None: the newest.

    Raises SystemExit if there is no such file.
    """
    from huggingface_hub import constants

    url = f"{constants.ENDPOINT}/api/datasets/{repo}"
    what = f"the file list of {repo}"
    if revision is None:
        answer, _ = retrying(what, lambda: ask_hub(url, Revision))
        revision = answer.sha
    page = f"{url}/tree/{revision}/{prefix}".rstrip("/")
    entries = {}
    while page:
        answer, page = retrying(what, lambda page=page: ask_hub(page, list[Entry]))
        for entry in answer:
            if entry.path.endswith(suffix):
                entries[entry.path] = entry
    if not entries:
        fail(f"{repo} has no {suffix} files{' in ' + prefix if prefix else ''}")
    return revision, dict(sorted(entries.items()))


def ask_hub(url, kind):
    """(the hub's answer as an object of this type, the address of the next page or None).

    Not by huggingface_hub.HfApi, which waits for ever if no answer comes.
    """
    import requests
    from huggingface_hub.utils import build_hf_headers

    response = requests.get(url, headers=build_hf_headers(), timeout=NO_ANSWER)
    response.raise_for_status()
    try:
        answer = msgspec.json.decode(response.content, type=kind)
    except (ValueError, RecursionError):
        fail(f"{url} doesn't answer as the hub does: does this network want a login first?")
    return answer, response.links.get("next", {}).get("url")


def fetch(repo, name, revision, folder, entry):
    """Downloads a file of a dataset repository below folder, or the rest of it; returns its path.

    entry: its Entry in the hub's list. A file that is not as it says is fetched again, twice at most.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # ours counts tokens
    stalls = 0
    again = False

    def download():
        nonlocal stalls
        where = {"repo_type": "dataset", "revision": revision, "local_dir": folder}
        try:
            return hf_hub_download(repo, name, force_download=again, **where)
        except Exception as error:
            # the hub's client has waited six times by then, for ten seconds each
            stalls += "Timeout" in type(error).__name__
            if stalls == 2:
                fail(f"{name}: nothing arrives any more: run the same command again later; "
                     "it goes on from here")
            raise

    for _ in range(3):
        path = Path(retrying(name, download))
        size = path.stat().st_size
        if size == entry.size and (entry.lfs is None or sha256(path) == entry.lfs.oid):
            return path
        path.unlink()
        again = True
        say(f"{name} arrived damaged ({size:,} of {entry.size:,} bytes, or another checksum): "
            "thrown away")
    fail(f"{name} arrived damaged three times: run the same command again later; "
         "it goes on from here")


DOWNLOADS = ".download"  # below a dataset's folder; made by us, which raw/ or .cache/ might not be


def remove_downloads(folder, names):
    """Removes what fetch() made below folder, and nothing else that may be there."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / ".cache/huggingface", ignore_errors=True)  # the hub client's
    for path, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(path)


def tokenize_hub(folder, dataset, last_shard, shard_tokens, tokenizer, workers):
    """Writes the tokens of a dataset's parquet files as shards.

    The files are downloaded one by one, the next one while the one before is tokenised, and deleted
    when they are done.
    """
    repo = DATASETS[dataset]["repository"]
    prefix = DATASETS[dataset]["folder"]
    name = f"{repo} {prefix}"
    revision, entries = hub_files(repo, prefix, ".parquet", begun_revision(folder, name))
    files = list(entries)
    sizes = [entry.size for entry in entries.values()]
    wanted = {
        "dataset": name, "revision": revision, "files": files,
        "tokenizer": tokenizer, "vocab_size": VOCAB_SIZE[tokenizer],
        "shard_tokens": shard_tokens, "val_tokens": shard_tokens,
    }  # fmt: skip
    manifest = open_manifest(folder, wanted)
    # a byte of parquet is about two bytes of text, or a third of a GPT-2 token
    total = sum(sizes) * 2 // (6 if tokenizer == "gpt2" else 1)
    if last_shard is not None:
        total = min(total, (last_shard + 1) * shard_tokens)
    missing = missing_bytes(folder, manifest, 2 * total)
    if missing:
        check_disk(folder, missing + 2 * max(sizes))
    raw = folder / DOWNLOADS
    ahead = {}  # {file number: its download}
    fetcher = ThreadPoolExecutor(1)

    def download(i):
        return fetcher.submit(fetch, repo, files[i], revision, raw, entries[files[i]])

    def open_file(i, first_row):
        path = (ahead.pop(i, None) or download(i)).result()
        for n, batch in enumerate(read_documents(path, first_row)):
            # far into this file, after 250 row groups of 1,000 documents: get the next one
            if n == 250 and i + 1 < len(files):
                ahead[i + 1] = download(i + 1)
            yield batch

    def source(file, row):
        for batch in tokenized(sizes, open_file, (file, row), tokenizer, workers):
            for done in range(file, batch[0]):  # all of its tokens have been handed on
                (raw / files[done]).unlink(missing_ok=True)
            file = batch[0]
            yield batch

    try:
        write_shards(folder, manifest, source, last_shard, total)
    finally:
        fetcher.shutdown(cancel_futures=True)
    remove_downloads(raw, files)


def begun_revision(folder, dataset):
    """The revision of a dataset that a folder was begun with, to finish it with that; None if new."""
    manifest = read_manifest(folder)
    return manifest.get("revision") if manifest and manifest["dataset"] == dataset else None


# ---- Source: ready-made shards


def validation_first(name):
    """The key that sorts shards: the validation shard, then the training shards by number."""
    return "_val_" not in name, name


def download_shards(folder, dataset, last_shard):
    """Downloads ready-made shards of GPT-2 tokens, up to number last_shard (None: all)."""
    repo = DATASETS[dataset]["ready_made"]
    revision, entries = hub_files(repo, "", ".bin", begun_revision(folder, repo))
    names = sorted(entries, key=validation_first)
    if last_shard is not None:
        names = names[: last_shard + 1]
    wanted = {
        "dataset": repo, "revision": revision, "files": list(entries),
        "tokenizer": "gpt2", "vocab_size": VOCAB_SIZE["gpt2"],
    }  # fmt: skip
    manifest = open_manifest(folder, wanted)
    have = {}
    for shard in manifest["shards"]:
        if is_whole(folder, shard):
            have[shard["name"]] = shard
    todo = [name for name in names if name not in have]
    n_bytes = sum(entries[name].size for name in names)
    n_bytes_todo = sum(entries[name].size for name in todo)
    check_disk(folder, n_bytes_todo)
    start_folder(folder, manifest)
    raw = folder / DOWNLOADS
    with progress_bar(folder, n_bytes // 2, (n_bytes - n_bytes_todo) // 2) as bar:
        for name in todo:
            path = fetch(repo, name, revision, raw, entries[name])
            have[name] = {"name": name, "tokens": shard_tokens(path), "sha256": sha256(path)}
            os.replace(path, folder / name)
            manifest["shards"] = [have[known] for known in sorted(have, key=validation_first)]
            manifest["complete"] = len(have) == len(entries)
            write_manifest(folder, manifest)
            bar.update(entries[name].size // 2)
        bar.total = bar.n
    remove_downloads(raw, names)


# ---- Source: the offline sample, and its four-way task


def write_sample(folder=SAMPLE):
    """Writes the offline dataset (bytes) and its cloze.jsonl into folder, if it isn't there yet.

    If another process is writing it, waits for that. Raises SystemExit if something else is there.
    """
    folder = Path(folder)
    if sample_is_there(folder):
        say(f"{folder} already exists")
        return
    with locked(folder, "wait until it ends", wait=True):
        if not sample_is_there(folder):  # nobody else has written it meanwhile
            write_missing_sample(folder)


def sample_is_there(folder):
    """Whether a folder holds the whole offline dataset. SystemExit if it holds something else."""
    manifest = read_manifest(folder)
    if manifest is None:
        if (folder / "cloze.jsonl").exists():
            fail(f"{folder / 'cloze.jsonl'} is in the way of the offline dataset's: "
                 "choose another folder, or move the file")
        return False
    if manifest["dataset"] != "sample":
        fail(f"{folder} holds another dataset, {manifest['dataset']}: "
             "choose another folder for the offline one")
    shards_are_there = all(is_whole(folder, shard) for shard in manifest["shards"])
    cloze_is_there = manifest.get("cloze") == CLOZE and (folder / "cloze.jsonl").is_file()
    return manifest.get("complete", False) and shards_are_there and cloze_is_there


def write_missing_sample(folder):
    manifest = read_manifest(folder)
    begun = manifest is not None and manifest.get("complete", False)
    if not begun or not all(is_whole(folder, shard) for shard in manifest["shards"]):
        manifest = write_sample_shards(folder)
    documents = documents_of(folder / manifest["shards"][0]["name"])
    content = "".join(json.dumps(item) + "\n" for item in cloze_items(documents)).encode()
    write_atomic(folder / "cloze.jsonl", lambda f: f.write(content))
    write_manifest(folder, manifest | {"cloze": CLOZE})
    say(f"wrote {folder / 'cloze.jsonl'}, the four-way task")


def write_sample_shards(folder):
    """Writes the offline dataset's shards; returns the manifest."""
    documents = sample_documents()
    wanted = {
        "dataset": "sample", "revision": None,
        "files": ["documentation of Python, numpy and torch"],
        "tokenizer": "bytes", "vocab_size": VOCAB_SIZE["bytes"],
        "shard_tokens": SHARD_TOKENS, "val_tokens": 400_000,
    }  # fmt: skip

    def open_file(_, first_row):
        for row in range(first_row, len(documents), 256):
            batch = documents[row : row + 256]
            yield row, batch, True, (row + len(batch)) / len(documents)

    def source(file, row):
        return tokenized([1], open_file, (file, row), "bytes", 0)

    open_manifest(folder, wanted)  # ends the program if the folder holds something else
    # it takes seconds, and the documentation may be another than when it was begun: from the start
    manifest = {**wanted, "complete": False, "shards": []}
    n_tokens = sum(len(text) + 1 for text in documents)
    write_shards(folder, manifest, source, None, n_tokens)
    say(f"wrote {n_tokens:,} bytes of English to {folder}")
    return manifest


def documents_of(path):
    """The texts in a shard of bytes, without the last one, which may go on in the next shard."""
    tokens = map_shard(path, at_random=False)
    begins = np.flatnonzero(tokens == VOCAB_SIZE["bytes"] - 1)  # each document's <|endoftext|>
    documents = []
    for begin, end in zip(begins, begins[1:]):
        content = tokens[begin + 1 : end].astype(np.uint8).tobytes()
        documents.append(content.decode(errors="replace"))
    return documents


def sample_documents():
    """English that is on any machine after the install: docstrings of Python, numpy and torch.

    Paragraphs of prose from triple-quoted strings, each once, in a fixed order. About 5 MB; the
    details depend on the installed versions.
    """
    seen = set()
    documents = []
    for string in documentation():
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", string):
            text = " ".join(paragraph.split())
            if is_prose(text) and text not in seen:
                seen.add(text)
                paragraphs.append(text)
        if paragraphs:
            documents.append("\n\n".join(paragraphs) + "\n")
    # shuffled, so that the beginning, which is for validation, is a fair sample of the whole
    order = np.random.default_rng(0).permutation(len(documents))
    return [documents[i] for i in order]


def documentation():
    """The topics of Python's help() and all triple-quoted strings of three packages: a list of str."""
    from pydoc_data.topics import topics

    strings = list(topics.values())
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in ("numpy", "torch"):
        package = importlib.util.find_spec(name)
        roots.append(Path(package.submodule_search_locations[0]))
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if left_out.isdisjoint(path.relative_to(root).parts):
                source = path.read_text(encoding="utf-8", errors="ignore")
                strings += re.findall(r'"""(.*?)"""', source, re.DOTALL)
    return strings


def is_prose(text):
    """Whether a paragraph is English sentences rather than code, a table or a heading."""
    letters = sum(c.isalpha() or c == " " for c in text)
    long_enough = len(text) >= 80 and text.count(" ") >= 11
    return long_enough and letters >= 0.86 * len(text) and text.isascii() and ">>>" not in text


def cloze_items(documents, n_items=1000):
    """Four-way items in HellaSwag's format: six words that continue a text, and three shuffles of them.

    Wrong endings from other texts would leave models as small as these at chance; the order of words
    is something that they do learn. The endings have small letters and spaces only: a full stop or a
    capital in an odd place would give the wrong ones away. They are drawn without a look at them.
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
        items.append({
            "ind": len(items), "activity_label": "",
            "ctx_a": context, "ctx_b": "", "ctx": context,
            "endings": [endings[i] for i in order], "label": int(np.flatnonzero(order == 0)[0]),
        })  # fmt: skip
    return items


# ==========================================================================
# Loader: shards -> batches


def open_dataset(folder, vocab_size=1 << 16, train_shards=None, before=None):
    """Checks every shard of a folder and describes the dataset.

    Returns a dict: dataset, tokenizer, vocab_size, and fingerprint, a hash that is equal for equal
    tokens in the validation shard and the first train_shards training shards (None: all).
    before: what this returned when the run began; other tokens than then give a warning.

    Raises SystemExit, with the command that helps, for a missing folder, no shards, a foreign or
    truncated one, a manifest that doesn't match, a vocabulary of more than vocab_size, or another
    tokenizer than before.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        fail(f"{folder} is a file, not a folder of token shards")
    names = sorted(path.name for path in folder.glob("*.bin"))
    if not names:
        fail(f"no token shards in {folder}: run `python fineweb.py` (or `--pretokenized`, "
             "`--shards 1`), or train on the offline dataset with --tiny")
    manifest = read_manifest(folder)
    counts = {name: shard_tokens(folder / name) for name in names}
    if manifest is None:
        say(f"{folder} has no manifest.json: taking its shards for GPT-2 tokens, as llm.c writes them")
        manifest = {
            "dataset": "unknown", "tokenizer": "gpt2", "vocab_size": VOCAB_SIZE["gpt2"],
            "shards": [{"name": name, "tokens": counts[name]} for name in names],
        }  # fmt: skip
    listed = {shard["name"]: shard["tokens"] for shard in manifest["shards"]}
    for name in sorted(listed.keys() | counts.keys()):
        if listed.get(name) != counts.get(name):
            fail(f"{folder / name} has {counts.get(name, 'no')} tokens, "
                 f"by manifest.json {listed.get(name, 'none')}: run the fineweb.py command that made "
                 "the folder again, or remove the file if it is not of this dataset")
    if manifest["vocab_size"] > vocab_size:
        enough = -(-manifest["vocab_size"] // 128) * 128  # a multiple of 128 suits a GPU
        fail(f"{folder} has a vocabulary of {manifest['vocab_size']:,}, the model one of "
             f"{vocab_size:,}: use another --data_dir or --vocab_size {enough}")
    # the Loader looks at each training batch; the validation shard is looked at once, here
    for name in names:
        if "_val_" in name and counts[name]:
            largest = map_shard(folder / name, at_random=False).max()
            if largest >= manifest["vocab_size"]:
                fail(f"token {largest} in {folder / name} is beyond the vocabulary of "
                     f"{manifest['vocab_size']:,}: run `python fineweb.py --verify --out {folder}`")
    data = {
        "dataset": manifest["dataset"],
        "tokenizer": manifest["tokenizer"],
        "vocab_size": manifest["vocab_size"],
        "fingerprint": fingerprint(manifest["shards"], train_shards),
    }
    if before and before["tokenizer"] != data["tokenizer"]:
        fail(f"{folder} holds {data['tokenizer']} tokens, the model was trained on "
             f"{before['tokenizer']} tokens: choose the right --data_dir")
    if before and before["fingerprint"] not in ("", data["fingerprint"]):  # "" if imported
        say(f"warning: {folder} is not the data that the run began with, "
            "so from here on its batches are others")
    return data


def fingerprint(shards, train_shards):
    """A hash of the manifest's lines on the validation shard and the first train_shards others."""
    training = sorted(shard["name"] for shard in shards if "_train_" in shard["name"])
    unused = set(training) - set(training[:train_shards])
    identity = []
    for shard in shards:
        if shard["name"] not in unused:
            identity.append([shard["name"], shard["tokens"], shard.get("sha256")])
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


class Windows:
    """The windows of block_size + 1 tokens in a folder's "train" or "val" shards, in their order.

    One token more than a model sees, because its targets are its inputs moved on by one. So the last
    token of a window, only a target there, is the first of the next window, only an input there: no
    prediction is lost between the two. A window never crosses the end of a shard.

    Only the first max_shards shards and max_tokens tokens are used, so that a folder that holds more
    gives the same windows; with less than max_tokens there is a warning. Raises SystemExit if there
    is not a single window.
    """

    def __init__(self, folder, split, block_size, max_shards=None, max_tokens=None):
        self.block_size = block_size
        paths = sorted(Path(folder).glob(f"*_{split}_*.bin"))[:max_shards]
        self.shards = [map_shard(path, at_random=split == "train") for path in paths]
        counts = [(len(shard) - 1) // block_size for shard in self.shards]
        # (number of shards + 1,): the number of each shard's first window, then of all windows
        self.first = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        self.n_windows = int(self.first[-1])
        if self.n_windows < 1:
            fail(f"{folder} has no {split} shard that holds {block_size + 1} tokens: "
                 "write more text, or use a smaller --block_size")
        if max_tokens is not None:
            n_tokens = self.n_windows * block_size
            if n_tokens < max_tokens:
                say(f"warning: {folder} has only {n_tokens:,} of {max_tokens:,} {split} tokens")
            self.n_windows = min(self.n_windows, max(1, max_tokens // block_size))

    def __len__(self):
        return self.n_windows

    def rows(self, ids):
        """The windows with these numbers: (len(ids), block_size + 1) int64."""
        rows = np.empty((len(ids), self.block_size + 1), dtype=np.int64)
        shards = np.searchsorted(self.first, ids, side="right") - 1
        for row, i, shard in zip(rows, ids, shards):
            start = (i - self.first[shard]) * self.block_size
            row[:] = self.shards[shard][start : start + self.block_size + 1]
        return rows


def map_shard(path, at_random):
    """A shard's tokens (n,) uint16, read from the disk by the system when they are looked at."""
    with open(path, "rb") as f:
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    # A read of a mapped file makes the system fetch what follows too, in case it is next. Shuffled
    # windows lie anywhere, so on a disk with nothing cached that is 40 times what we need.
    if at_random and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype=np.uint16, offset=HEADER_BYTES)


def permute(i, n, seed, epoch):
    """Where the pseudo-random permutation number (seed, epoch) of range(n) takes i, an int array.

    A shuffled list of ten million windows would have to be made anew for each epoch and stored. A
    Feistel network is a permutation by construction and needs neither: it splits a number into two
    halves (left, right) and maps them to (right, left ^ hash(right)), six times over. Each of these
    rounds can be undone, whatever the hash, so no two numbers end up in one place.

    It permutes the numbers below a power of four. Where it takes i to n or beyond, it is applied again
    until it lands below n ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains,
    2002). That is again a permutation, of range(n), and takes fewer than four steps on average.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # bits of a half
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)
    x = np.asarray(i).astype(np.uint64)
    outside = np.ones(x.shape, dtype=bool)
    while outside.any():
        left = x[outside] >> half
        right = x[outside] & mask
        for key in keys:
            # multiply and fold the high bits down, twice: the constants are splitmix64's
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed >> np.uint64(32)) & mask
            left, right = right, left ^ mixed
        x[outside] = (left << half) | right
        outside = x >= n
    return x.astype(np.int64)


class Loader:
    """Training batches. Batch number step is a function of the data, the seed and step alone.

    Row j of a batch is window number step * batch_rows + j of an endless sequence of epochs; an epoch
    is all windows in an order of its own. The batch is the same for any number of processes, and each
    gets a slice of its rows. Nothing is remembered from step to step, so resuming costs nothing. A
    background thread reads the next batches ahead.

    If the data are used up before max_steps, a warning says from which step on they are repeated.
    """

    def __init__(self, windows, batch_rows, seed, rank=0, world=1, device="cpu",
                 vocab_size=1 << 16, max_steps=0):  # fmt: skip
        self.windows = windows
        self.batch_rows = batch_rows
        self.seed = seed
        self.device = device
        self.vocab_size = vocab_size
        begin = rank * batch_rows // world
        end = (rank + 1) * batch_rows // world
        self.slice = slice(begin, end)
        self.thread = ThreadPoolExecutor(1)
        self.ahead = {}  # {step: the future of its rows}
        if max_steps * batch_rows > len(windows):
            steps = len(windows) // batch_rows
            say(f"warning: the data last for {steps:,} steps of {max_steps:,}: "
                f"from step {steps} on the same windows come again, in another order")

    def ids(self, step):
        """The window numbers of this rank's rows of batch number step: (batch_rows / world,) int64."""
        n = len(self.windows)
        positions = step * self.batch_rows + np.arange(self.batch_rows)[self.slice]
        epochs = positions // n  # a batch may hold the end of one epoch and the beginning of the next
        parts = []
        for epoch in np.unique(epochs):
            in_epoch = positions[epochs == epoch] % n
            parts.append(permute(in_epoch, n, self.seed, int(epoch)))
        return np.concatenate(parts)

    def read(self, step):
        """This rank's rows of batch number step, on the CPU; pinned if they are going to a GPU."""
        import torch

        rows = self.windows.rows(self.ids(step))
        largest = rows.max()
        if largest >= self.vocab_size:
            # not fail(): of several processes it lets only the first speak, but each has other rows
            raise SystemExit(f"token {largest} in the training shards is beyond the vocabulary of "
                             f"{self.vocab_size}: run `python fineweb.py --verify --out DIR`, "
                             "or choose a --vocab_size that fits")
        rows = torch.from_numpy(rows)
        if torch.device(self.device).type == "cuda":
            rows = rows.pin_memory()  # so that the copy to the GPU need not be waited for
        return rows

    def batch(self, step):
        """This rank's rows of batch number step: (batch_rows / world, block_size + 1) int64.

        They are on the loader's device. Raises SystemExit for a token beyond the vocabulary.
        """
        for wanted in (step, step + 1, step + 2):
            if wanted not in self.ahead:
                self.ahead[wanted] = self.thread.submit(self.read, wanted)
        rows = self.ahead.pop(step).result()
        for other in list(self.ahead):
            if other < step:
                del self.ahead[other]
        return rows.to(self.device, non_blocking=True)


# ==========================================================================
# Command line


def main():
    args = parse_command_line()
    if args.out:
        folder = args.out
    elif args.sample:
        folder = Path(SAMPLE)
    elif args.files:
        folder = Path("data") / args.files[0].stem
    else:
        folder = Path(DATASETS[args.dataset]["out"])
    try:
        if folder.exists() and not folder.is_dir():
            fail(f"{folder} is a file: choose another --out, a folder")
        if args.verify:
            verify(folder)
            return
        write_dataset(folder, args)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: run the same command again to go on after the last shard")
    except BrokenProcessPool:
        fail("a tokenizer process was killed, probably because memory ran out: "
             "run the same command again with fewer --workers")
    except OSError as error:
        fail(f"{error.filename or folder}: {error.strerror or error}")
    shards = read_manifest(folder)["shards"]
    n_tokens = sum(shard["tokens"] for shard in shards)
    print(f"{folder}: {len(shards)} shards, {n_tokens:,} tokens")
    if not any("_train_" in shard["name"] for shard in shards):
        fail(f"{folder} has no training shard, because all of the text is in the validation shard: "
             "give more text")
    print(f"Next: {next_command(folder, shards, args.sample)}")


def parse_command_line():
    formatter = argparse.RawDescriptionHelpFormatter  # which keeps the lines of our docstring
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--dataset", choices=DATASETS, help="sample-10BT of one of these [fineweb]")
    add("--pretokenized", action="store_true", help="download ready-made shards of it")
    add("--files", nargs="+", type=Path, metavar="FILE",
        help="use these .jsonl, .txt or .parquet files instead")
    add("--sample", action="store_true", help="write the small offline dataset instead")
    add("--verify", action="store_true", help="only check the folder against its manifest")
    add("--shards", type=int, metavar="N", help="stop after N training shards [all]")
    add("--out", type=Path, metavar="DIR", help="folder for the shards [data/NAME]")
    add("--shard_tokens", type=int, metavar="N",
        help=f"tokens per shard [{SHARD_TOKENS}]")
    add("--tokenizer", choices=VOCAB_SIZE, help="[gpt2]")
    add("--workers", type=int, metavar="N", default=os.cpu_count(),
        help="tokenizer processes [one per core]")
    args = parse_strictly(parser)
    check_together(args)
    # these have no default above, so that we can tell what was given
    args.dataset = args.dataset or "fineweb"
    args.tokenizer = args.tokenizer or "gpt2"
    if args.shard_tokens is None:
        args.shard_tokens = SHARD_TOKENS
    if args.shards is not None and args.shards < 1:
        fail(f"--shards {args.shards}: must be at least 1")
    if not 1024 <= args.shard_tokens < 2**31:  # the header holds an int32
        fail(f"--shard_tokens {args.shard_tokens}: must be from 1,024 to 2,147,483,647")
    if args.workers < 0:
        fail(f"--workers {args.workers}: must be at least 0 (no other processes)")
    return args


def check_together(args):
    """Raises SystemExit for options that exclude each other or mean nothing together."""
    given = [name for name, value in vars(args).items() if value not in (None, False)]
    without_use = {
        "files": ("dataset", "pretokenized", "sample"),
        "sample": ("dataset", "pretokenized", "shards", "shard_tokens", "tokenizer"),
        "pretokenized": ("shard_tokens", "tokenizer"),
    }
    for name, others in without_use.items():
        for other in others:
            if name in given and other in given:
                fail(f"--{name} and --{other} don't go together: leave one of them out")


def write_dataset(folder, args):
    """Writes what the command line asks for. One process at a time writes into a folder."""
    if args.sample:
        write_sample(folder)
        return
    with locked(folder, "wait until it ends, or choose another --out"):
        write_text(folder, args)


def write_text(folder, args):
    if args.pretokenized:
        download_shards(folder, args.dataset, args.shards)
        return
    get_tokenizer(args.tokenizer)  # if it fails, then here, once, and not in every worker
    last_shard = args.shards  # number 0 is for validation, so N training shards end with number N
    how = (last_shard, args.shard_tokens, args.tokenizer, args.workers)
    if args.files:
        tokenize_files(folder, args.files, *how)
    else:
        tokenize_hub(folder, args.dataset, *how)


def next_command(folder, shards, sample):
    """The training command that suits a folder: one epoch of its tokens, but at most the full run."""
    command = "python train_gpt2.py"
    if sample:
        command += " --tiny"
    default = SAMPLE if sample else DATASETS["fineweb"]["out"]
    if folder != Path(default):
        command += f' --data_dir "{folder}"' if " " in str(folder) else f" --data_dir {folder}"
    training = sum(shard["tokens"] for shard in shards if "_train_" in shard["name"])
    steps = training // BATCH_TOKENS
    if not sample and 1 <= steps < MAX_STEPS:
        warmup_steps = -(-WARMUP_STEPS * steps // MAX_STEPS)  # the same part of the run, rounded up
        command += f" --max_steps {steps} --warmup_steps {warmup_steps}"
    return command


# ==========================================================================
# Shared by all programs here


def fail(message):
    """Ends the program with one line on stderr and exit status 1.

    Of several processes on a machine that fail for the same reason only the first says it.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    raise SystemExit(message if first else 1)


def say(message):
    """Prints a line at once, in the first of all processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def option(default, help, choices=None, zero=False):
    """A dataclass field that is a command-line option as well; zero: a number that may be 0."""
    about = {"help": help, "choices": choices, "zero": zero}
    return dataclasses.field(default=default, metadata=about)


def parse_options(parser, Config, recipe={}, tiny={}):
    """Parses the command line, with an option --NAME for each field of the dataclass Config.

    Returns ({field: value} of the fields that are given, the Namespace of all arguments).
    recipe, tiny: {field: value} that replace defaults, by themselves and with --tiny; the help says so.
    """
    fields = dataclasses.fields(Config)
    for field in fields:
        names = [f"--{field.name}"]
        if field.name == "run_name":
            names.append("--run")  # shorter, but torchrun takes it for an abbreviation of its own
        choices = field.metadata["choices"]
        value = default_text(field, recipe, tiny)
        parser.add_argument(
            *names,
            dest=field.name,
            type=field.type,
            choices=choices,
            metavar=None if choices else "",  # the help lists choices, but doesn't repeat the name
            default=argparse.SUPPRESS,  # so that we can tell what was given
            help=f"{field.metadata['help']} {value}".replace("%", "%%"),
        )
    args = parse_strictly(parser)
    given = {field.name: getattr(args, field.name) for field in fields if field.name in args}
    return given, args


def default_text(field, recipe, tiny):
    """A field's value if it is not given, as the help shows it: "[0.0008]; --tiny: [0.002]"."""
    value = recipe.get(field.name, field.default)
    text = f"[{value}]"
    if value != field.default:
        text += f"; --recipe shared: [{field.default}]"
    if tiny.get(field.name, value) != value:
        text += f"; --tiny: [{tiny[field.name]}]"
    return text


def positive(text):
    """The type of an option that is a number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def parse_strictly(parser):
    """The parsed command line.

    Raises SystemExit, with one line, for a wrong value and for an unknown name, with the closest one.
    """
    parser.allow_abbrev = False
    parser.error = fail
    args, unknown = parser.parse_known_args()
    if unknown:
        names = []
        for action in parser._actions:
            names += action.option_strings
        close = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1, cutoff=0)
        fail(f"unknown option {unknown[0]}: did you mean {close[0]}? (--help lists them all)")
    return args


locks = {}  # {folder: its lock}, held by this process


def lock_folder(folder, advice, wait=False):
    """Takes a folder's lock until unlock_folder() or the end of this process, however that ends.

    wait: if another process has it, wait until it ends; else SystemExit with a line that names the
    holder and gives the advice. The folder is made if it doesn't exist. Of several processes of a
    run only the first takes the lock; taking it twice is taking it once.
    """
    import filelock

    place = folder.resolve()
    if os.environ.get("RANK", "0") != "0" or place in locks:
        return
    lock = filelock.FileLock(place / ".lock")
    holder = place / ".lock.holder"
    with one_line(f"{folder} can't be written: choose a place where you may write"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            name = holder.read_text() if holder.exists() else "another process"
            if not wait:
                fail(f"{folder} is in use by {name}: {advice}")
            say(f"{folder} is in use by {name}: waiting for it")
            lock.acquire()
        except NotImplementedError:  # some network file systems
            say(f"{folder} is on a disk without locks: take care that no other process writes to it")
            return
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    locks[place] = lock


def unlock_folder(folder):
    """Gives back the lock that lock_folder() took, if this process has it."""
    lock = locks.pop(folder.resolve(), None)
    if lock:
        lock.release()


def lock_run(folder):
    """Takes the lock of a training run's folder, and clears up after a killed one."""
    lock_folder(folder, "wait for it, or choose another --run_name")
    for partial in folder.glob("step_*.pt.*.tmp"):
        partial.unlink()


@contextlib.contextmanager
def one_line(what):
    """A context in which an OSError ends the program with one line, which starts with what."""
    try:
        yield
    except OSError as error:
        fail(f"{what} ({error.strerror or error})")


def make_folder(folder):
    """Makes a folder, if it isn't there. Raises SystemExit if that can't be."""
    with one_line(f"{folder} can't be made a folder"):
        folder.mkdir(parents=True, exist_ok=True)


def refuse_folder(option, path):
    """Raises SystemExit if the file that an option names is a folder; path may be None."""
    if path and path.is_dir():
        fail(f"{option} {path}: is a folder, give the name of a file")


def open_log(path, step):
    """Opens a run's log.jsonl for appending, without its lines on this step and later ones.

    A run that is resumed at step writes these again; it must hold the folder's lock. step math.inf
    leaves the file as it is, since another process may be writing to it. path None: a file that keeps
    nothing, for the processes that don't log.
    """
    if path is None:
        return open(os.devnull, "w")
    with one_line(f"{path} can't be opened"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and step < math.inf:
            keep_lines_before(path, step)
        file = open(path, "a", buffering=1)  # each line is in the file as soon as it is written
        if path.stat().st_size and path.read_bytes()[-1:] != b"\n":
            file.write("\n")  # after half a line of a killed run
        return file


def keep_lines_before(path, step):
    """Leaves out a log's lines on this step and later ones, and, with a word, the damaged ones."""
    kept = []
    damaged = 0
    for line in path.read_bytes().splitlines():
        try:
            event = json.loads(line)
            logged = event.get("step", -1)
            keep = logged < step
        except (ValueError, AttributeError, TypeError, RecursionError):
            damaged += 1  # a killed run may leave half a line
            continue
        if keep:
            kept.append(line + b"\n")
    if damaged:
        say(f"{path}: {damaged} damaged line(s) left out")
    write_atomic(path, lambda f: f.write(b"".join(kept)))


def write_atomic(path, write, advice="run the same command again to go on"):
    """Makes the file path by write(f), f a binary file.

    Whenever the program or the machine stops, path is the whole old file or the whole new one.
    Raises SystemExit if it can't be written; advice: what to do once there is room.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            # The name must not reach the disk before the content: after a power cut there would be a
            # file of the right name with nothing in it.
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        full = isinstance(error, RuntimeError) or error.errno in (None, errno.ENOSPC, errno.EDQUOT)
        cure = "make room" if full else "mend that"
        fail(f"{path} can't be written ({reason}): {cure}, then {advice}")


def retrying(what, action, pauses=(1, 2, 4, 8, 16, 32)):
    """The result of action(), which is tried again after each pause (in seconds) on a network error.

    what: its name in messages. Raises SystemExit after the last pause, or at once if trying again
    won't help. The environment variable RETRY_SECONDS scales the pauses.
    """
    for pause in (*pauses, None):
        try:
            return action()
        except Exception as error:
            # The hub's client changes its HTTP library now and then (requests, httpx, httpx2), and
            # not all of their errors are OSErrors.
            module = type(error).__module__
            if not isinstance(error, OSError) and not module.startswith(("httpx", "httpcore")):
                raise
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", None)
            if status:
                reason = f"HTTP {status}"
            else:
                words = " ".join(str(error).split())[:100]  # some errors have none
                reason = f"{type(error).__name__} {words}".rstrip()
            disk_full = getattr(error, "errno", None) == errno.ENOSPC
            hopeless = status in (400, 401, 403, 404, 410) or disk_full
        if pause is None or hopeless:
            fail(f"{what} could not be downloaded ({reason}): run the same command again later; "
                 "it goes on from here")
        say(f"{what}: {reason}; trying again in {pause} s")
        time.sleep(pause * float(os.environ.get("RETRY_SECONDS", "1")))


def with_estimate(items, what, advice):
    """Yields a list's items; if all of them will take over a minute, says how long, and the advice."""
    began = 0.0
    for number, item in enumerate(items):
        if number == 1:  # the first may have been compiled
            began = time.perf_counter()
        if number == 2:
            minutes = (time.perf_counter() - began) * len(items) / 60
            if minutes > 1:
                say(f"{what} takes about {minutes:.0f} min here; {advice}")
        yield item


def check_options(config):
    """Raises SystemExit for a number among the options that is not positive, nor 0 where it may be."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str):
            continue
        may_be_zero = field.metadata["zero"]
        if not (0 < value < math.inf or (may_be_zero and value == 0)):
            fail(f"--{field.name} {value}: must be {'at least' if may_be_zero else 'more than'} 0")
        most = 2**16 if field.name.startswith("n_") else 2**62
        if value > most:
            fail(f"--{field.name} {value}: must be at most {most}")


def run_folder(name):
    """The folder of the run called name. Raises SystemExit for what is no plain folder's name."""
    if name in (".", "..") or len(name) > 100 or set(name) & set('/\\:*?"<>|\n\0'):
        fail(f"--run_name {name}: must be the name of a folder in log/, of at most 100 letters")
    return Path("log") / name


def check_run(config, world):
    """Raises SystemExit for a training script's Config whose values are impossible, alone or together.

    world: the number of processes.
    """
    check_options(config)
    for field in ("beta1", "beta2"):
        if getattr(config, field) >= 1:
            fail(f"--{field} {getattr(config, field)}: must be less than 1")
    if config.min_lr > config.max_lr:
        fail(f"--min_lr {config.min_lr} is more than --max_lr {config.max_lr}")
    if config.warmup_steps > config.max_steps:
        fail(f"--warmup_steps {config.warmup_steps} is more than --max_steps {config.max_steps}")
    rows = max(1, config.micro_batch)
    if config.batch_tokens % (world * rows * config.block_size):
        fail(f"--batch_tokens {config.batch_tokens} can't be split into {world} process(es) x "
             f"micro-batches of {rows} row(s) x --block_size {config.block_size}: "
             "choose numbers that divide it")


def check_size(make_model, device):
    """Raises SystemExit if the model that make_model() returns can't be trained in a device's memory."""
    import torch

    try:
        with torch.device("meta"):  # shapes without memory
            n_parameters = sum(p.numel() for p in make_model().parameters())
    except (RuntimeError, OverflowError):  # numbers beyond 64 bits
        fail("a model of this size has more parameters than can be counted: use a smaller one")
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:  # Windows
        return
    need = 16 * n_parameters  # fp32: weights, gradients and AdamW's two moments
    if need > memory:
        fail(f"the model has {n_parameters:,} parameters, so training it takes more than "
             f"{need / 1e9:,.0f} GB; there are {memory / 1e9:,.0f} GB: use a smaller one")


def warn_if_slow(config, flops_per_token, world, device):
    """Says how long a step and the run will take on a CPU, and what to do, if it is more than a day."""
    import torch

    if device.type != "cpu":
        return
    n = 1024
    matrix = torch.rand(n, n)
    matrix @ matrix  # the first one also starts the threads
    began = time.perf_counter()
    matrix @ matrix
    rate = world * 2 * n**3 / (time.perf_counter() - began)  # FLOP/s
    step = 3 * flops_per_token * config.batch_tokens / rate
    evaluation = flops_per_token * config.val_tokens / rate
    run = step * config.max_steps
    if run > 86_400:
        say(f"on this CPU an evaluation takes about {duration(evaluation)}, a step {duration(step)} and "
            f"the run {duration(run)}: --tiny takes minutes, and smaller values of --n_layer, --n_embd, "
            "--batch_tokens, --val_tokens and --max_steps make it shorter")


def short(number):
    """A number in three digits: 104, 17.1k, 2.76M."""
    if number < 1000:
        return f"{number:.3g}"
    if number < 1e6:
        return f"{number / 1e3:.3g}k"
    return f"{number / 1e6:.3g}M"


def duration(seconds):
    """A time in a few letters: 40s, 12m, 3.5h, 20d."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{seconds / 60:.0f}m"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f}h"
    return f"{seconds / 86_400:,.0f}d"


def show(facts, indent=""):
    """Prints a dict, and the dicts in it, as an aligned list, in the first of all processes only."""
    for name, value in facts.items():
        if isinstance(value, dict):
            say(f"{indent}{name}")
            show(value, indent + "  ")
        else:
            say(f"{indent + name:18} {value}")


def git_version(folder):
    """The git commit of a folder, with -dirty if files have been changed since, or "unknown"."""
    command = "git describe --always --dirty --exclude=*"
    git = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
    return git.stdout.strip() or "unknown"


def script_hash(file):
    """The first 16 digits of a script's sha256."""
    return sha256(file)[:16]


@functools.cache
def hash_at_start(file):
    """script_hash() as it was when first asked for: the file may be edited while the script runs."""
    return script_hash(file)


def script_copies(folder, name):
    """The copies of a script in a run's folder: NAME.py, then NAME.2.py and so on, the newest last."""
    copies = [folder / f"{name}.py"]
    while copies[-1].exists():
        copies.append(folder / f"{name}.{len(copies) + 1}.py")
    return copies[:-1]


def find_copy(folder, name, hash):
    """The copy of a script whose script_hash() is hash; the first one if there is none."""
    for copy in script_copies(folder, name):
        if script_hash(copy) == hash:
            return copy
    return folder / f"{name}.py"


def keep_copy(file, folder):
    """Copies a script into a run's folder; a later version is put beside the first, as NAME.2.py."""
    content = file.read_bytes()
    name = file.name.split(".")[0]
    copies = script_copies(folder, name)
    if any(copy.read_bytes() == content for copy in copies):
        return
    number = len(copies) + 1
    copy = folder / (f"{name}.{number}.py" if copies else f"{name}.py")
    write_atomic(copy, lambda f: f.write(content))


def load_whole(path, script, make_model):
    """A checkpoint, on the CPU. Raises ValueError, with the reason, if it is damaged.

    script: the script's file, and make_model(config) its model for a checkpoint's config, a dict.
    """
    import torch

    try:
        damaged = zipfile.ZipFile(path).testzip()  # checks the checksums, which torch.load doesn't
        if damaged:
            raise ValueError(f"{damaged} has another checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        lacks = {"format", "script", "step", "config", "data", "model"} - checkpoint.keys()
        if lacks:
            raise ValueError(f"it has no {', '.join(sorted(lacks))}")
        if not all(tensor.isfinite().all() for tensor in checkpoint["model"].values()):
            raise ValueError("a weight is not finite")
        if checkpoint.get("script_hash") == script_hash(script):  # a changed script's may be others
            check_shapes(checkpoint, make_model)
    except Exception as error:  # such a file can raise anything
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(reason[0]) from error
    return checkpoint


def check_shapes(checkpoint, make_model):
    """Raises ValueError if a checkpoint's weights are not those of the model of its config."""
    import torch

    with torch.device("meta"):  # shapes without memory
        try:
            model = make_model(checkpoint["config"])
        except TypeError:  # another version's fields, which is not for us to say
            return
    shapes = {name: tensor.shape for name, tensor in checkpoint["model"].items()}
    if shapes != {name: tensor.shape for name, tensor in model.state_dict().items()}:
        raise ValueError("its weights are not those of its config")


def end_with_parent():
    """From now on this process gets SIGTERM, as if it were stopped, when its parent process has ended."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def catch_signals():
    """A list that the first SIGTERM or Ctrl-C is added to, so that the run can finish its step and save.

    A second one ends the process at once.
    """
    received = []

    def handler(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    return received


if __name__ == "__main__":
    main()
