"""
FineWeb as token shards: the writer (run this file) and the loader (the
training scripts import it).

    python fineweb.py                        # FineWeb sample-10BT
    python fineweb.py --pretokenized         # the same tokens, ready-made
    python fineweb.py --verify --out DIR     # check every shard
    python fineweb.py --files a.jsonl b.txt c.parquet --out data/mine

Every command can be killed and run again: it goes on after the last finished
shard. What it didn't write is not changed. <|endoftext|> in a text splits it.

A shard is a file in the format of llm.c and modded-nanogpt:

    256 int32     header: magic 20240520, version 1, number of tokens, zeros
    n uint16      the tokens; every document starts with <|endoftext|>

The first shard is for validation. manifest.json beside the shards names the
tokenizer, the source and each shard's checksum.
"""
import contextlib
import ctypes
import functools
import hashlib
import io
import itertools
import json
import mmap
import multiprocessing.pool
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import zipfile
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

import filelock
import msgspec
import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

# torch, pyarrow and others are imported where they are used: torch alone would cost each worker 200 MB

MAGIC = [20240520, 1]  # and the version of the format
HEADER_BYTES = 1024
SHARD_TOKENS = 100_000_000

DATASETS = {  # name: (repository of the text on the hub, of ready-made shards, our folder)
    "fineweb": ("HuggingFaceFW/fineweb", "kjj0/fineweb10B-gpt2", "data/fineweb10B"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "kjj0/finewebedu10B-gpt2", "data/fineweb-edu10B"),
}
SAMPLE = "data/sample"
END = "<|endoftext|>"
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")  # of a text, in others' tokenizers
DOWNLOADS = ".fineweb.download"  # below a dataset's folder; whatever is in it is ours
N_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # we may use
NO_ANSWER = 60  # seconds to wait for a library that would wait for ever


# ==========================================================================
# Format and manifest


def shard_header(n_tokens):
    """The first 1,024 bytes of a shard."""
    return np.array([*MAGIC, n_tokens] + 253 * [0], dtype=np.int32).tobytes()


def shard_tokens(path):
    """The number n of tokens in a shard, the last 2n bytes of its file. SystemExit for another file.

    Ours and llm.c's have a header, nanoGPT's train.bin and val.bin have none, build-nanogpt's are .npy.
    """
    again = "make it again, or get it again from where it came"
    with one_line(f"{path} can't be read: {again}"), open(path, "rb") as f:
        header = np.frombuffer(f.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype=np.int32)
    n_tokens = int(header[2])
    if header[:2].tolist() == MAGIC:
        if path.stat().st_size != HEADER_BYTES + 2 * n_tokens:
            fail(f"{path} is truncated, its header promises {n_tokens:,} tokens: {again}")
        return n_tokens
    if header[0] == 20240801:
        fail(f"{path} holds LLaMA 3's tokens in 32 bits, as llm.c writes them: only 16 bits can be read here")
    with contextlib.suppress(Exception):  # a file can hold anything
        is_bare = path.name in ("train.bin", "val.bin")
        tokens = np.memmap(path, np.uint16, "r") if is_bare else np.load(path, mmap_mode="r")
        begin = tokens[: 1 << 20]
        # half of 32-bit tokens would be zeros, which are "!", and other vocabularies end texts otherwise
        looks_right = begin.max() < 50257 and 50256 in begin and np.mean(begin == 0) < 0.2
        if looks_right and tokens.dtype == np.uint16 and tokens.ndim == 1:
            return len(tokens)
    fail(f"{path} is not a token shard, with {MAGIC} first or GPT-2's tokens in 16 bits: {again}")


def of_split(names, split):
    """Those of some names of files that are of "train" or "val" shards, ours or others', in order."""
    return sorted(name for name in names if re.fullmatch(rf"(.*_)?{split}(_\d+)?\.(bin|npy)", name))


Count = Annotated[int, msgspec.Meta(ge=0)]


class Shard(TypedDict):
    name: Annotated[str, msgspec.Meta(pattern=r"^[^/\\]+\.bin$")]  # nothing outside the folder
    tokens: Count
    sha256: str
    # where the next shard begins: [file, document, tokens of it already written]; null at the end
    next: NotRequired[Annotated[list[Count], msgspec.Meta(min_length=3, max_length=3)] | None]


class Manifest(TypedDict):
    dataset: str
    revision: NotRequired[str | None]
    files: NotRequired[list]  # the source's, in the order in which they are read
    tokenizer: str
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    shard_tokens: NotRequired[Count]  # of a training shard; not there if ready-made
    val_tokens: NotRequired[Count]  # of the first one
    keep_separators: NotRequired[bool | None]  # <|endoftext|> in a text is letters, if true
    complete: NotRequired[bool]  # the source has been read to its end
    shards: list[Shard]


def read_manifest(folder):
    """The folder's Manifest, None if there is none; SystemExit if it is unreadable."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path} is not a manifest of fineweb.py ({error}): choose another folder")


def write_manifest(folder, manifest):
    write_atomic(folder / "manifest.json", lambda f: f.write(json.dumps(manifest, indent=1).encode()))


def open_manifest(folder, tokenizer, **wanted):
    """The folder's manifest, or a new one. Raises SystemExit if shards are there that are not as wanted."""
    own = get_tokenizer(tokenizer) if tokenizer.endswith(".json") else None
    wanted |= {"tokenizer": own.name if own else tokenizer, "vocab_size": n_vocab(tokenizer)}
    manifest = read_manifest(folder) or {}
    if not manifest.get("shards") and not [*folder.glob("*.bin"), *folder.glob("*.npy")]:
        manifest = {**wanted, "complete": False, "shards": []}
    for key, value in wanted.items():
        before = manifest.get(key)
        if key == "files" and before and before != value:  # of thousands the first that differ
            before, value = next(pair for pair in itertools.zip_longest(before, value) if pair[0] != pair[1])
        if before != value:
            fail(f"{folder} holds shards with {key} = {before!r}, not {value!r}: "
                 "choose another folder, or move that one away")
    manifest.setdefault("complete", False)
    folder.mkdir(parents=True, exist_ok=True)
    if own:
        write_atomic(folder / own.name, lambda f: f.write(own.content))
    return manifest


def is_whole(folder, shard):
    """Whether a shard of the manifest is in the folder, with the size that it should have."""
    path = folder / shard["name"]
    return path.is_file() and path.stat().st_size == HEADER_BYTES + 2 * shard["tokens"]


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def verify(folder):
    """Checks every shard against the manifest. Raises SystemExit that names the bad ones."""
    manifest = read_manifest(folder) or fail(f"{folder} has no manifest.json to check against")
    known = {folder / shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    bad = [str(path) for path in known if not path.is_file() or sha256(path) != known[path]]
    print(f"{folder}: {len(known) - len(bad)} of {len(known)} shards are good")
    if bad or not known:
        fail(f"bad or missing: remove {' '.join(bad)} and run the command that made the folder again")


# ==========================================================================
# Reading text


def read_documents(path, first_row=0):
    """Yields (row, documents, new): a MB of consecutive documents of a .parquet, .jsonl or .txt file.

    row: the number of the first of them in the file, from first_row on. documents: a list of str. new:
    False if the text continues the one before, as in a .txt file, which is read in pieces of 1 MB. Raises
    SystemExit for a file that is not what it should be.
    """
    import fsspec

    kind = TEXT_FILE.search(path.name)[1]
    documents = []
    size = 0
    try:
        with fsspec.open(str(path.absolute()), compression="infer") as f:
            for number, text in enumerate(itertools.chain(READERS[kind](f), [None])):
                if text is not None and number >= first_row:
                    documents.append(text)
                    size += len(text)
                if documents and (text is None or size >= 1 << 20):
                    row = number + (text is not None) - len(documents)
                    yield row, documents, row == 0 or kind != "txt"
                    documents = []
                    size = 0
    except Exception as error:  # a damaged file can raise anything
        fail(f"{path} can't be read ({' '.join(str(error).split())}): correct it, or leave it out")


def read_parquet(f):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(f, pre_buffer=False, buffer_size=1 << 20) as parquet:
        for batch in parquet.iter_batches(16, columns=["text"]):
            for text in batch.column("text").to_pylist():
                if not isinstance(text, str | None):
                    raise TypeError(f"the column 'text' holds {batch.column('text').type}")
                yield text or ""


def read_jsonl(f):
    for number, line in enumerate(f, 1):
        if line.strip():
            try:
                text = json.loads(line.decode("utf-8-sig"))["text"] or ""
                text.encode()  # not every string of JSON is text: "\ud800" is half a character
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ValueError(f'line {number} is not {{"text": "…"}}')
            yield text


def read_txt(f):
    f = io.TextIOWrapper(f, "utf-8-sig")
    while lines := f.readlines(1 << 20):
        yield "".join(lines)


READERS = {"parquet": read_parquet, "jsonl": read_jsonl, "txt": read_txt}
TEXT_FILE = re.compile(r"\.(parquet|jsonl|txt)(\.gz|\.zst)?$")


# ==========================================================================
# Tokenizers, and tokenising in order on all cores


def n_vocab(name):
    """The number of ids of a tokenizer by name, or of the tokenizer.json at a path. SystemExit if unknown."""
    if name.endswith(".json"):
        return get_tokenizer(name).n_vocab
    if re.fullmatch("gpt2(-[0-9]{3,5})?|bytes", name):
        n = {"gpt2": 50257, "bytes": 257}.get(name) or int(name[5:])
        if 257 <= n <= 50257:
            return n
    fail(f"unknown tokenizer {name!r}: choose gpt2, bytes, gpt2-N with N from 257 to 50,257, or a .json file")


class OwnTokenizer:
    """A Hugging Face tokenizer.json, by what a tiktoken.Encoding has. SystemExit if it can't be used."""

    def __init__(self, path):
        try:
            from tokenizers import Tokenizer

            self.content = Path(path).read_bytes()
            self.inner = Tokenizer.from_buffer(self.content)
        except ImportError:
            fail(f"{path} needs the package tokenizers: pip install tokenizers")
        except Exception as error:  # the package raises no other
            fail(f"{path} is not a tokenizer.json of Hugging Face ({error}): give another --tokenizer")
        self.inner.no_truncation()  # what the file says of these is for other uses
        self.inner.no_padding()
        self.inner.encode_special_tokens = True  # whose letters in a text are letters, as in tiktoken
        self.name = f"tokenizer-{hashlib.sha256(self.content).hexdigest()[:16]}.json"  # and its copy's
        ids = self.inner.get_vocab()
        self.n_vocab = max(ids.values(), default=0) + 1
        self.end = next((token for token in ENDS if token in ids), None)
        if self.end is None or self.n_vocab > 1 << 16:
            fail(f"{path} has {self.n_vocab:,} ids and {self.end or 'nothing'} to end a text: at most 65,536 "
                 f"fit into shards, and it needs one of {' '.join(ENDS)}")
        self.eot_token = ids[self.end]

    def encode_ordinary(self, text):
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_to_numpy(self, text, **_):
        return np.array(self.encode_ordinary(text), dtype=np.uint16)

    def decode(self, tokens):
        # after another token, since many decoders take a space before the first away
        return self.inner.decode([self.eot_token, *tokens], skip_special_tokens=False).removeprefix(self.end)


@functools.cache
def get_tokenizer(name, folder=None):
    """The tiktoken.Encoding called name, in which <|endoftext|> is the last id, or the OwnTokenizer.

    "gpt2"; "gpt2-4096", or another number: GPT-2's first merges, so many ids in all; "bytes": the 256
    values and no merges; a .json file, in a dataset's folder if that is given. GPT-2's vocabulary is read
    from data/gpt2 if it is there, else from tiktoken's cache, else downloaded. SystemExit if that fails.
    """
    if name.endswith(".json"):
        own = OwnTokenizer(Path(folder or "") / name)
        if folder and own.name != name:
            fail(f"{folder}/{name} has changed since the shards were made: put the old one back")
        return own
    n_ranks = n_vocab(name) - 1
    special = {"<|endoftext|>": n_ranks}
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        anything = r"[\s\S]{1,64}"  # there are no merges, so any cut of the text will do
        return tiktoken.Encoding(name, pat_str=anything, mergeable_ranks=ranks, special_tokens=special)
    try:
        if Path("data/gpt2/vocab.bpe").exists():
            ranks = data_gym_to_mergeable_bpe_ranks("data/gpt2/vocab.bpe", "data/gpt2/encoder.json")
        else:
            ranks = in_time(lambda: tiktoken.get_encoding("gpt2"))._mergeable_ranks
        ranks = {token: rank for token, rank in ranks.items() if rank < n_ranks}
        return tiktoken.Encoding(name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
    except Exception as error:  # of the network, a proxy or a file: the way out is the same
        fail(f"GPT-2's vocabulary can't be loaded ({type(error).__name__}): go online once, set "
             "TIKTOKEN_CACHE_DIR to a filled cache, or put vocab.bpe and encoder.json into data/gpt2/")


def try_tokenizer(name, folder=None):
    """get_tokenizer(name, folder); if it fails, a warning of what will be missing, and None."""
    try:
        return get_tokenizer(name, folder)
    except SystemExit as reason:
        say(f"no samples and no HellaSwag: {reason}")
        return None


def start_worker():
    def end_with_main():  # which may be killed and then says nothing
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    threading.Thread(target=end_with_main, daemon=True).start()


def tokenize(documents, new, tokenizer, folder=None, keep=False):
    """The tokens of each document, uint16, of what read_documents() yields, after <|endoftext|> if it is new.

    A new one begins also where a text has that, unless keep makes it letters.
    """
    encoding = get_tokenizer(tokenizer, folder)
    tokens = []
    for text in documents:
        pieces = []
        for number, document in enumerate([text] if keep else text.split(END)):
            if number == 0 or document.strip():
                pieces.append([encoding.eot_token] if new or number > 0 else [])
                # cut in runs of 50,000 blanks, which would overflow the stack of tiktoken's regex
                parts = re.split(r"(\s{50000}(?=\s))", document) if len(document) > 50_000 else [document]
                pieces += [encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
        tokens.append(np.concatenate(pieces).astype(np.uint16))
    return tokens


def tokenized(source, manifest, folder, workers, first_file, first_row):
    """Yields (file, row, the tokens of that and the next documents) in the source's order, from one on.

    source: for each file a function of a row, which yields what read_documents() does from there on.
    """
    keep = bool(manifest.get("keep_separators"))
    encode = functools.partial(tokenize, tokenizer=manifest["tokenizer"], folder=folder, keep=keep)
    context = multiprocessing.get_context("spawn")  # a fork inherits other threads' locks, and can hang
    pool = ProcessPoolExecutor(workers, context, start_worker) if workers else ThreadPoolExecutor(1)
    queue = []
    n_ends = 0
    try:
        with pool:
            for i in range(first_file, len(source)):
                for row, documents, new in source[i](first_row if i == first_file else 0):
                    n_ends += sum(text.count(END) for text in documents)
                    queue.append((i, row, pool.submit(encode, documents, new)))
                    if len(queue) > 4 * workers:  # enough that none is idle, few enough to bound the memory
                        file, first, future = queue.pop(0)
                        yield file, first, future.result()
            for file, first, future in queue:
                yield file, first, future.result()
    finally:
        if n_ends and not keep:
            say(f"{n_ends:,} times {END} in the text began a document; --keep_separators makes it letters")


# ==========================================================================
# Writing shards


def start_folder(folder, manifest, total):
    """Prepares a folder for about total tokens; returns the progress bar. SystemExit if the disk is full."""
    from tqdm import tqdm

    for path in folder.iterdir():  # what a killed write_atomic() leaves
        if re.fullmatch(r"(manifest|tokenizer-\w{16}|fineweb_\w+_\d{6})\.(json|bin)\.\d+\.tmp", path.name):
            path.unlink()
    done = sum(shard["tokens"] for shard in manifest["shards"] if is_whole(folder, shard))
    need = 2 * (total - done)
    free = shutil.disk_usage(folder).free
    if free < need:
        fail(f"{folder} needs some {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: make room, "
             "choose another --out, or start small with --shards N")
    if not manifest["shards"]:  # it comes first: what stands in it is known to be ours
        write_manifest(folder, manifest)
    return tqdm(desc=folder.name, total=total, initial=done, unit=" tokens", unit_scale=True, mininterval=5)


def write_shards(folder, manifest, source, last_shard, n_bytes, workers):
    """Writes the missing shards of tokenized()'s source, of some n_bytes, up to last_shard (None: all)."""
    shards = manifest["shards"]
    total = n_bytes // (1 if manifest["tokenizer"] == "bytes" else 4)  # tokens
    if manifest["complete"]:
        total = sum(shard["tokens"] for shard in shards)
    elif last_shard is not None:
        total = min(total, manifest["val_tokens"] + last_shard * manifest["shard_tokens"])
    if any(shard.get("next") is None for shard in shards[: -1 if manifest["complete"] else None]):
        fail(f"{folder}/manifest.json doesn't say where each shard begins: choose another folder")
    get_tokenizer(manifest["tokenizer"], folder)  # if this fails, then here, once, and not in every worker
    tokens_from = functools.partial(tokenized, source, manifest, folder, workers)
    with start_folder(folder, manifest, total) as bar:
        for number, shard in enumerate(list(shards)):
            if not is_whole(folder, shard):
                say(f"{folder / shard['name']} is missing or damaged: writing it again")
                write_range(folder, manifest, tokens_from, number, number, bar)
        if not manifest["complete"] and (last_shard is None or len(shards) <= last_shard):
            write_range(folder, manifest, tokens_from, len(shards), last_shard, bar)
        bar.total = bar.n


def write_range(folder, manifest, tokens_from, number, last, bar):
    """Writes shards from this number to last; last None, or beyond the end of the source: to the end."""
    shards = manifest["shards"]
    file, row, skip = shards[number - 1]["next"] if number else (0, 0, 0)
    content = bytearray(HEADER_BYTES)
    for file, first_row, documents in tokens_from(file, row):
        for row, tokens in enumerate(documents, first_row):
            taken = skip  # the beginning of the very first document may stand in the shard before
            skip = 0
            while taken < len(tokens):
                end = HEADER_BYTES + 2 * manifest["shard_tokens" if number else "val_tokens"]
                part = tokens[taken : taken + (end - len(content)) // 2]
                content += part.tobytes()
                taken += len(part)
                bar.update(len(part))
                if len(content) == end:
                    next_one = [file, row, taken] if taken < len(tokens) else [file, row + 1, 0]
                    finish_shard(folder, manifest, number, content, next_one)
                    if number == last:
                        return
                    number += 1
                    content = bytearray(HEADER_BYTES)
    if len(content) > HEADER_BYTES or number < len(shards):
        finish_shard(folder, manifest, number, content, None)
    elif shards:
        manifest["complete"] = True
        write_manifest(folder, manifest)


def finish_shard(folder, manifest, number, content, position):
    """Writes a shard's file, then its line in the manifest; position: where the next one begins."""
    name = f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"
    n = (len(content) - HEADER_BYTES) // 2
    content[:HEADER_BYTES] = shard_header(n)
    shard = {"name": name, "tokens": n, "sha256": hashlib.sha256(content).hexdigest(), "next": position}
    shards = manifest["shards"]
    if number < len(shards) and shards[number] != shard:
        fail(f"{name} came out different from before: the source has changed, start again in another folder")
    write_atomic(folder / name, lambda f: f.write(content))
    if number == len(shards):
        shards.append(shard)
        manifest["complete"] = position is None
        write_manifest(folder, manifest)


# ==========================================================================
# Sources: local files, the Hugging Face hub, the offline sample


def tokenize_files(folder, paths, last_shard, shard_tokens, tokenizer, workers, keep=False):
    """Writes the tokens of local .jsonl, .txt and .parquet files as shards."""
    for path in paths:
        if not path.is_file() or not TEXT_FILE.search(path.name):
            fail(f"{path} is not a .parquet, .jsonl or .txt file, or .gz or .zst; shards train as they are")
    files = [[path.name, path.stat().st_size] for path in paths]
    n_bytes = sum(size for _, size in files)
    val_tokens = min(shard_tokens, max(1024, n_bytes // 40))  # a tenth of a small text, to leave the rest
    how = {"shard_tokens": shard_tokens, "val_tokens": val_tokens, "keep_separators": keep or None}
    manifest = open_manifest(folder, tokenizer, dataset="files", revision=None, files=files, **how)
    source = [functools.partial(read_documents, path) for path in paths]
    write_shards(folder, manifest, source, last_shard, n_bytes, workers)


def hub_files(folder, repo, prefix, suffix):
    """({dataset, revision, files}, {name: RepoFile}) of a repository, in the folder's or newest revision."""
    from huggingface_hub import HfApi

    name = f"{repo} {prefix}".strip()
    manifest = read_manifest(folder) or {}
    begun = manifest.get("revision") if manifest.get("dataset") == name else None

    def ask():
        api = HfApi()
        revision = begun or api.dataset_info(repo).sha
        tree = api.list_repo_tree(repo, prefix, revision=revision, repo_type="dataset")
        return revision, sorted((file.path, file) for file in tree if file.path.endswith(suffix))

    try:
        revision, files = retrying(f"the file list of {repo}", lambda: in_time(ask))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        fail(f"{repo}: the hub doesn't answer as it should: does this network want a login first?")
    if not files:
        fail(f"{repo} has no {suffix} files")
    return {"dataset": name, "revision": revision, "files": list(dict(files))}, dict(files)


def fetch(repo, file, revision, folder):
    """Downloads a RepoFile, or the rest of it, below folder, until it is as the hub says; its path."""
    from huggingface_hub import hf_hub_download, utils

    utils.disable_progress_bars()  # ours counts tokens

    def download():
        path = hf_hub_download(repo, file.path, repo_type="dataset", revision=revision, local_dir=folder)
        if os.path.getsize(path) == file.size and (file.lfs is None or sha256(path) == file.lfs.sha256):
            return Path(path)
        os.remove(path)
        raise OSError("it arrived damaged: its size or checksum is another")

    return retrying(file.path, download)


def tokenize_hub(folder, dataset, last_shard, shard_tokens, tokenizer, workers, keep=False):
    """Writes the tokens of a dataset's parquet files, each downloaded, read and deleted, as shards."""
    repo = DATASETS[dataset][0]
    origin, files = hub_files(folder, repo, "sample/10BT", ".parquet")
    how = {"shard_tokens": shard_tokens, "val_tokens": shard_tokens, "keep_separators": keep or None}
    manifest = open_manifest(folder, tokenizer, **origin, **how)
    n_bytes = 2 * sum(file.size for file in files.values())  # of text, about

    def read(file, first_row):
        path = fetch(repo, file, origin["revision"], folder / DOWNLOADS)
        yield from read_documents(path, first_row)
        path.unlink()

    source = [functools.partial(read, file) for file in files.values()]
    write_shards(folder, manifest, source, last_shard, n_bytes, workers)
    shutil.rmtree(folder / DOWNLOADS, ignore_errors=True)


def download_shards(folder, dataset, last_shard):
    """Downloads ready-made shards of GPT-2 tokens, up to number last_shard (None: all)."""
    repo = DATASETS[dataset][1]
    origin, files = hub_files(folder, repo, "", ".bin")
    manifest = open_manifest(folder, "gpt2", **origin)
    names = sorted(files, key=lambda name: ("_train_" in name, name))  # the validation shard first
    chosen = names[: None if last_shard is None else last_shard + 1]
    have = {shard["name"]: shard for shard in manifest["shards"] if is_whole(folder, shard)}
    with start_folder(folder, manifest, sum(files[name].size for name in chosen) // 2) as bar:
        for name in [name for name in chosen if name not in have]:
            path = fetch(repo, files[name], origin["revision"], folder / DOWNLOADS)
            have[name] = {"name": name, "tokens": shard_tokens(path), "sha256": sha256(path)}
            os.replace(path, folder / name)
            manifest["shards"] = [have[known] for known in names if known in have]
            manifest["complete"] = len(have) == len(names)
            write_manifest(folder, manifest)
            bar.update(have[name]["tokens"])
    shutil.rmtree(folder / DOWNLOADS, ignore_errors=True)


def write_sample(folder=SAMPLE):
    """Writes the offline dataset, in bytes, if it isn't there. SystemExit if something else is."""
    folder = Path(folder)
    manifest = read_manifest(folder) or {}
    origin = {"dataset": "sample", "files": ["documentation of Python"]}
    if manifest.get("complete") and origin.items() <= manifest.items():
        if all(is_whole(folder, shard) for shard in manifest["shards"]):
            return
    lock(folder, "wait until it ends", wait=True)
    try:
        documents = sample_documents()
        origin |= {"revision": sys.version.split()[0], "shard_tokens": SHARD_TOKENS, "val_tokens": 2**17 + 1}
        manifest = open_manifest(folder, "bytes", **origin)
        source = [lambda row: [(row, documents[row:], True)]]
        write_shards(folder, manifest, source, last_shard=None, n_bytes=1 << 20, workers=0)
    finally:
        locks.pop(folder.resolve()).release()


def sample_documents():
    """English that is on any machine: the prose in the topics of help() and the library's docstrings.

    1 MB that depends on Python's version alone: what distributions change, or versions drop, is left out.
    """
    from pydoc_data.topics import topics

    left_out = {"test", "tests", "idlelib", "tkinter", "turtle.py", "turtledemo", "distutils", "lib2to3"}
    left_out |= {"ensurepip", "site.py", "site-packages", "dist-packages"}
    strings = [topics[name] for name in sorted(topics)]
    root = Path(os.__file__).parent
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if parts[0].removesuffix(".py") in sys.stdlib_module_names and left_out.isdisjoint(parts):
            strings += re.findall(r'"""(.*?)"""', path.read_text("utf-8", "ignore"), re.DOTALL)
    seen = set()
    documents = []
    for string in strings:
        paragraphs = dict.fromkeys(" ".join(part.split()) for part in re.split(r"\n\s*\n", string))
        new = [text for text in paragraphs if is_prose(text) and text not in seen]
        seen.update(new)
        if new:
            documents.append("\n\n".join(new) + "\n")
    return sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())  # shuffled


def is_prose(text):
    """Whether a paragraph is English sentences rather than code, a table or a heading."""
    letters = sum(c.isalpha() or c == " " for c in text)
    is_text = text.isascii() and ">>>" not in text and letters >= 0.86 * len(text)
    return is_text and len(text) >= 80 and text.count(" ") >= 11


# ==========================================================================
# Loader: shards -> batches


def open_dataset(folder, vocab_size=1 << 16, train_shards=None, before=None):
    """Checks every shard of a folder and describes the dataset.

    Returns a dict: dataset, tokenizer, vocab_size, and fingerprint, a hash that is equal for equal
    tokens in the validation shard and the first train_shards training shards (None: all). before: what
    this returned when the run began. Raises SystemExit for whatever doesn't fit.
    """
    folder = Path(folder)
    names = [path.name for path in folder.glob("*")]
    names = of_split(names, "val") + of_split(names, "train")[:train_shards]
    counts = {name: shard_tokens(folder / name) for name in sorted(names)}
    if not counts:
        fail(f"no token shards in {folder}: run `python fineweb.py --out {folder}` (see --help), or --tiny")
    manifest = read_manifest(folder)
    if manifest is None:
        say(f"{folder} has no manifest.json: taking its shards for GPT-2 tokens, as llm.c writes them")
        shards = [{"name": name, "tokens": count} for name, count in counts.items()]
        manifest = {"dataset": "unknown", "tokenizer": "gpt2", "vocab_size": 50257, "shards": shards}
    listed = {shard["name"]: shard["tokens"] for shard in manifest["shards"]}
    wanted = of_split(listed, "val") + of_split(listed, "train")[:train_shards]
    bad = [name for name in dict.fromkeys(wanted + names) if listed.get(name) != counts.get(name)]
    if bad:
        found, promised = counts.get(bad[0], "no"), listed.get(bad[0], "none")
        fail(f"{folder / bad[0]} has {found} tokens, by manifest.json {promised} ({len(bad)} such shards): "
             "get what is missing, move away what isn't listed, or use fewer --train_shards")
    if manifest["tokenizer"].endswith(".json"):
        get_tokenizer(manifest["tokenizer"], folder)  # SystemExit if it is another now
    n_vocab = manifest["vocab_size"]
    if n_vocab > vocab_size:
        fail(f"{folder} has a vocabulary of {n_vocab:,}, the model one of {vocab_size:,}: "
             f"use another --data_dir or --vocab_size {-(-n_vocab // 128) * 128}")
    for name in of_split(counts, "val"):  # the Loader looks at each training batch
        largest = map_shard(folder / name, at_random=False).max(initial=0)
        if largest >= n_vocab:
            fail(f"token {largest} in {folder / name} is beyond the vocabulary of {n_vocab:,}: "
                 f"run `python fineweb.py --verify --out {folder}`")
    used = [shard for shard in manifest["shards"] if shard["name"] in wanted]
    identity = [[shard["name"], shard["tokens"], shard.get("sha256")] for shard in used]
    data = {key: manifest[key] for key in ("dataset", "tokenizer", "vocab_size")}
    data["fingerprint"] = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    if before and before["tokenizer"] != data["tokenizer"]:
        fail(f"{folder} has {data['tokenizer']} tokens, the run {before['tokenizer']} ones: mend --data_dir")
    if before and before["fingerprint"] not in ("", data["fingerprint"]):  # "" if imported
        say(f"warning: {folder} is not the data that the run began with, so its batches are others now")
    return data


class Windows:
    """The windows of block_size + 1 tokens in a folder's "train" or "val" shards, in their order.

    The last token of a window, only a target there, is the first of the next, only an input there. A
    window never crosses the end of a shard. Of larger data only the first max_shards shards and
    max_tokens tokens are used. Raises SystemExit if there is not a single window.
    """

    def __init__(self, folder, split, block_size, max_shards=None, max_tokens=None):
        self.block_size = block_size
        names = of_split(os.listdir(folder), split)[:max_shards]
        self.shards = [map_shard(Path(folder) / name, at_random=split == "train") for name in names]
        counts = [max(0, len(shard) - 1) // block_size for shard in self.shards]
        # (number of shards + 1,): the number of each shard's first window, then of all windows
        self.first = np.cumsum([0, *counts], dtype=np.int64)
        self.n_windows = int(self.first[-1])
        if self.n_windows < 1:
            fail(f"{folder} has no {split} shard of {block_size + 1} tokens: use a smaller --block_size")
        there = self.n_windows * block_size
        if there < (max_tokens or 0):
            say(f"warning: {folder} has only {there:,} of {max_tokens:,} {split} tokens")
        self.n_windows = max(1, min(there, max_tokens or there) // block_size)

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
    if at_random and hasattr(mmap, "MADV_RANDOM"):  # else the system reads 40 times what we need, ahead
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype=np.uint16, offset=len(mapped) - 2 * shard_tokens(path))


@functools.lru_cache(2)
def epoch_order(n, seed, epoch):
    """The numbers below n in an order of their own for each (seed, epoch), whatever numpy's version is."""
    return np.random.RandomState([seed, epoch]).permutation(n)


class Loader:
    """Training batches. Batch number step is a function of the data, the seed and step alone.

    Row j of a batch is window number step * batch_rows + j of an endless sequence of epochs; an epoch
    is all windows in an order of its own. The batch is the same for any number of processes, and each
    gets a slice of its rows. Nothing is remembered from step to step, so resuming costs nothing.
    """

    def __init__(self, windows, batch_rows, seed, rank=0, world=1, device="cpu",
                 vocab_size=1 << 16, max_steps=0):  # fmt: skip
        self.windows = windows
        self.batch_rows = batch_rows
        self.seed = seed
        self.device = device
        self.vocab_size = vocab_size
        self.mine = np.arange(batch_rows)[rank * batch_rows // world : (rank + 1) * batch_rows // world]
        self.thread = ThreadPoolExecutor(1)  # reads ahead
        self.ahead = {}  # {step: the future of its rows}
        if max_steps * batch_rows > len(windows):
            say(f"warning: data last for {len(windows) // batch_rows:,} of {max_steps:,} steps, then again")

    def ids(self, step):
        """The window numbers of this rank's rows of batch number step: (batch_rows / world,) int64."""
        n = len(self.windows)  # a batch may hold the end of one epoch and the beginning of the next
        epochs, at = np.divmod(step * self.batch_rows + self.mine, n)
        return np.concatenate([epoch_order(n, self.seed, int(i))[at[epochs == i]] for i in np.unique(epochs)])

    def read(self, step):
        """The rows that batch() returns, on the CPU. Raises SystemExit for a token beyond the vocabulary."""
        import torch

        rows = self.windows.rows(self.ids(step))
        if rows.max() >= self.vocab_size:
            # not fail(): of several processes it lets only the first speak, but each has other rows
            raise SystemExit(f"token {rows.max()} in the training shards is beyond the vocabulary of "
                             f"{self.vocab_size}: run `python fineweb.py --verify --out DIR`")
        rows = torch.from_numpy(rows)  # pinned, so that the copy to the GPU need not be waited for
        return rows.pin_memory() if torch.device(self.device).type == "cuda" else rows

    def batch(self, step):
        """This rank's rows of batch number step: (batch_rows / world, block_size + 1) int64 on the device."""
        wanted = range(step, step + 3)
        self.ahead = {i: self.ahead.get(i) or self.thread.submit(self.read, i) for i in wanted}
        return self.ahead.pop(step).result().to(self.device, non_blocking=True)


# ==========================================================================
# Command line


@dataclass
class Args:
    dataset: Literal["fineweb", "fineweb-edu"] = "fineweb"  # take sample-10BT of this
    pretokenized: bool = False  # download ready-made shards of it
    files: tuple[Path, ...] | None = None  # use these .jsonl, .txt or .parquet files instead
    verify: bool = False  # only check the folder against its manifest
    shards: int | None = None  # stop after N training shards; None: all
    out: Path | None = None  # folder for the shards; None: data/NAME
    shard_tokens: int = SHARD_TOKENS  # tokens per shard
    tokenizer: str = "gpt2"  # gpt2, its first merges as in gpt2-4096, bytes, or your own tokenizer.json
    keep_separators: bool = False  # <|endoftext|> in a text is letters, not the beginning of a document
    workers: int = N_CORES  # tokenizer processes; 0: only this one


def main():
    import tyro

    args = tyro.cli(Args, description=__doc__, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
    if args.files == ():
        fail("--files: name at least one file")
    given = {name for name, value in vars(args).items() if value != getattr(Args, name)}
    for pair in (("files", "dataset"), ("files", "pretokenized"), ("pretokenized", "shard_tokens"),
                 ("pretokenized", "tokenizer"), ("pretokenized", "keep_separators")):  # fmt: skip
        if given.issuperset(pair):
            fail(f"--{pair[0]} and --{pair[1]} don't go together: leave one of them out")
    n_vocab(args.tokenizer)  # SystemExit if there is no such tokenizer
    for name, least in (("shards", 1), ("shard_tokens", 1024), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and not least <= value < 2**31:  # the header holds an int32
            fail(f"--{name} {value}: must be from {least:,} to 2,147,483,647")
    folder = args.out or Path(f"data/{args.files[0].stem}" if args.files else DATASETS[args.dataset][2])
    how = (args.shards, args.shard_tokens, args.tokenizer, args.workers, args.keep_separators)
    try:
        if args.verify:
            return verify(folder)
        lock(folder, "wait until it ends, or choose another --out")
        if args.pretokenized:
            download_shards(folder, args.dataset, args.shards)
        elif args.files:
            tokenize_files(folder, args.files, *how)
        else:
            tokenize_hub(folder, args.dataset, *how)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: run the same command again to go on after the last shard")
    except BrokenExecutor:
        fail("a tokenizer process was killed, as if memory ran out: run that again with fewer --workers")
    except OSError as error:
        fail(f"{error.filename or folder}: {error.strerror or error}")
    manifest = read_manifest(folder)
    shards = manifest["shards"]
    print(f"{folder}: {len(shards)} shards, {sum(shard['tokens'] for shard in shards):,} tokens")
    if len(shards) < 2:
        fail(f"{folder} has no training shard, since there is no text beyond the first one's: give more")
    n_tokens = sum(shard["tokens"] for shard in shards if "_train_" in shard["name"])
    batch = next((n for n in (2**19, 2**17, 2**15) if n_tokens >= 500 * n), 2**13)  # for some 500 steps
    steps = min(max(1, n_tokens // batch), 19_073)
    options = f"--batch_tokens {batch} --max_steps {steps} --warmup_steps {-(-steps * 715 // 19_073)}"
    options += f" --train_shards {len(shards)}" * (len(shards) > 101)  # 100 are the default
    options += f" --vocab_size {-(-manifest['vocab_size'] // 128) * 128}" * (manifest["tokenizer"] != "gpt2")
    print(f"Next: python train_gpt2.py --data_dir {shlex.quote(str(folder))} {options}")  # one epoch


# ==========================================================================
# Shared by the programs


def fail(message):
    """Ends the program with status 1 and one line, in the first of a machine's processes only."""
    raise SystemExit(message if os.environ.get("LOCAL_RANK", "0") == "0" else 1)


def say(message):
    """Prints a line at once, in the first of all processes only."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's hasn't
        sys.stdout.reconfigure(errors="replace")  # letters that a terminal or its encoding lacks
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


@contextlib.contextmanager
def one_line(what):
    """A context in which an OSError ends the program with one line, which starts with what."""
    try:
        yield
    except OSError as error:
        fail(f"{what} ({error.strerror or error})")


def write_atomic(path, write, advice="run the same command again to go on"):
    """Makes the file path by write(f), f a binary file, or leaves the old one. SystemExit with the advice."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())  # else a power cut could leave the name without the content
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        fail(f"{path} can't be written ({reason}): make room, or mend that, then {advice}")


locks = {}  # {folder: its lock}, held by this process


def lock(folder, advice, wait=False):
    """Takes a folder's lock until the end of this process, or until it is released. The folder is made.

    If another process has it: wait for that, or without wait SystemExit with its name and the advice.
    Of a run's processes only the first takes the lock, unless it may wait; twice is once.
    """
    place = folder.resolve()
    if place in locks or (os.environ.get("RANK", "0") != "0" and not wait):
        return
    file = filelock.FileLock(place / ".lock")
    with one_line(f"{folder} can't be written: choose a place where you may write"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file.acquire(timeout=0)
        except filelock.Timeout:
            if not wait:
                fail(f"{folder} is in use by another process: {advice}")
            say(f"{folder} is in use by another process: waiting for it")
            file.acquire()
        except NotImplementedError:  # some network file systems
            say(f"{folder} is on a disk without locks: take care that no other process writes to it")
    locks[place] = file


def in_time(action):
    """The result of action(), or TimeoutError after NO_ANSWER seconds; list_repo_tree() waits for ever."""
    with multiprocessing.pool.ThreadPool(1) as pool:  # whose thread ends with the program
        return pool.apply_async(action).get(NO_ANSWER)


def retrying(what, action, pauses=(1, 2, 4, 8, 16, 32)):
    """The result of action(), which is tried again after each pause (in seconds) on a network error.

    Raises SystemExit in the end, or at once if trying again won't help. RETRY_SECONDS scales the pauses.
    """
    for pause in (*pauses, None):
        try:
            return action()
        except Exception as error:
            # the hub's client changes its HTTP library now and then: requests, httpx, httpx2
            if not isinstance(error, OSError) and type(error).__module__[:4] not in ("http", "mult"):
                raise
            status = getattr(getattr(error, "response", None), "status_code", None)
            words = f"HTTP {status}" if status else f"{type(error).__name__} {error}"
            reason = " ".join(words.split())[:120]
        if pause is None or status in (400, 401, 403, 404, 410):
            fail(f"{what} could not be downloaded ({reason}): run the same command later to go on")
        say(f"{what}: {reason}; trying again in {pause} s")
        time.sleep(pause * float(os.environ.get("RETRY_SECONDS", "1")))


def append(path, event, **fields):
    """Adds a line of JSON to a run's log."""
    with one_line(f"{path} can't be written: make room, then --resume"), open(path, "a") as f:
        f.write("\n" * (event == "run") + json.dumps({"event": event, **fields}) + "\n")  # after half a line


def load_checkpoint(paths, script, fields):
    """The first of a script's checkpoints that is whole, on the CPU; the damaged ones are named.

    Raises SystemExit if none is, and for one of another script or of a Config with other fields.
    """
    import torch

    if Path(paths[0]).is_dir():  # a run's, for --init_from
        paths = sorted(Path(paths[0]).glob("step_*.pt"), reverse=True) or paths
    for path in paths:
        try:
            damage = zipfile.ZipFile(path).testzip()  # checks the checksums, which torch.load doesn't
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            is_ours = checkpoint["script"] == script and checkpoint["config"].keys() == fields.keys()
        except Exception as error:  # a damaged file can raise anything
            damage = type(error).__name__
        if damage:
            say(f"{path} is damaged ({damage})")
        elif is_ours:
            return checkpoint
        else:
            fail(f"{path} is of {checkpoint['script']}.py, or a version of it with other options: use that")
    fail(f"{path} is no whole checkpoint: name another; `python -m tools.export --from` makes one of others'")


@contextlib.contextmanager
def noted_signals():
    """A list that the first signal to stop is added to, so that a run can end its step; a second kills."""
    received, before = [], {}
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: also if torchrun is killed

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):  # SLURM's warning, a closed terminal
        number = getattr(signal, name, None)  # Windows has the first two
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup ignores SIGHUP
            before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
