"""
FineWeb as token shards: the writer (run this file) and the loader (imported by the training scripts).

    python fineweb.py                          # FineWeb sample-10BT, tokenised here -> data/fineweb10B
    python fineweb.py --shards 10              # a small start; run again with more to continue
    python fineweb.py --pretokenized           # the same tokens, ready-made: minutes instead of hours
    python fineweb.py --dataset fineweb-edu    # the educational subset
    python fineweb.py --files a.jsonl b.txt c.parquet --out data/mine      # your own text
    python fineweb.py --sample                 # 5 MB of English that every machine has, no network
    python fineweb.py --verify --out DIR       # check every shard against the manifest

Every command can be killed at any time and run again: it goes on after the last finished shard and the
bytes come out the same. A shard is 256 int32 (magic 20240520, version 1, token count) and then uint16
tokens, the format of llm.c and modded-nanogpt; every document starts with <|endoftext|>; the first shard
is for validation. manifest.json beside them names the tokenizer, the source and each shard's checksum.
"""
import argparse
import collections
import dataclasses
import difflib
import errno
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import tiktoken

# torch, pyarrow, huggingface_hub and tqdm are imported where they are used: a tokenizer worker needs none of
# them, and importing torch alone would cost each worker 200 MB.

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SHARD_TOKENS = 100_000_000
DATASETS = {  # name: (text repository, folder in it, repository of ready-made shards, default folder here)
    "fineweb": ("HuggingFaceFW/fineweb", "sample/10BT", "kjj0/fineweb10B-gpt2", "data/fineweb10B"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT", "kjj0/finewebedu10B-gpt2", "data/fineweb-edu10B"),
}
VOCAB_SIZE = {"gpt2": 50257, "bytes": 257}  # the last id is <|endoftext|>


def fail(message):
    """Ends the program with one line on stderr and exit status 1 (of a node's processes the first speaks)."""
    raise SystemExit(message if os.environ.get("LOCAL_RANK", "0") == "0" else 1)


def say(message):
    """Prints a line at once, on the first of all processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def parse_strictly(parser):
    """The parsed command line; a wrong name or value is answered in one line (SystemExit), with the closest name."""
    parser.allow_abbrev, parser.error = False, fail
    args, unknown = parser.parse_known_args()
    if unknown:
        names = [action.option_strings[-1] for action in parser._actions if action.option_strings]
        close = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1, cutoff=0)
        fail(f"unknown option {unknown[0]}: did you mean {close[0]}? (--help lists them all)")
    return args


def option(default, help, choices=None, zero=False):
    """A dataclass field that parse_options() makes the command-line option --name too; zero: a number that may be 0."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "zero": zero})


def parse_options(parser, Config):
    """(the fields of dataclass Config given on the command line as a dict, the parser's own options)."""
    for field in dataclasses.fields(Config):
        # torchrun takes --run for an abbreviation of an option of its own, so the full name is --run_name
        names = ["--run_name", "--run"] if field.name == "run_name" else [f"--{field.name}"]
        parser.add_argument(*names, dest=field.name, type=field.type, choices=field.metadata["choices"], metavar="",
                            default=argparse.SUPPRESS, help=f"{field.metadata['help']} [{field.default}]")
    args = parse_strictly(parser)
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(Config) if field.name in args}, args


def open_log(path, step):
    """A run's log.jsonl for appending, without what it says of step and later ones: they are coming again.

    path None: a file that keeps nothing, for the processes that don't log.
    """
    if path is None:
        return open(os.devnull, "w")
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            if json.loads(line).get("step", -1) < step:
                kept.append(line)
        except ValueError:  # the half line of a killed run
            pass
    write_atomic(path, lambda f: f.write("".join(kept).encode()))
    return open(path, "a", buffering=1)


# ----------------------------------------------------------------------------------------------------------
# Tokenizers


def get_tokenizer(name):
    """The tiktoken.Encoding called name: "gpt2", or "bytes" (256 byte values and end-of-text).

    GPT-2's vocabulary comes from data/gpt2/{vocab.bpe,encoder.json} if they are there, else from tiktoken's
    cache or its download. Raises SystemExit with the ways out if it can't be had, or for an unknown name.
    """
    if name == "bytes":
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"[\s\S]{1,64}",  # no merges, so where the text is cut does not matter
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256},
        )
    if name != "gpt2":
        fail(f"unknown tokenizer {name!r}: there are {' and '.join(VOCAB_SIZE)}")
    try:
        folder = Path("data/gpt2")
        if not (folder / "vocab.bpe").exists():
            return tiktoken.get_encoding("gpt2")
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import r50k_pat_str

        ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
        return tiktoken.Encoding(
            "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
        )
    except Exception as error:  # whatever network, proxy or file it was: the way out is the same
        fail(
            f"GPT-2's vocabulary can't be had ({type(error).__name__}): connect to the network once, set "
            "TIKTOKEN_CACHE_DIR to a filled tiktoken cache, or put vocab.bpe and encoder.json into data/gpt2/"
        )


def try_tokenizer(name):
    """get_tokenizer(name), or None, with a line that says what will be missing."""
    try:
        return get_tokenizer(name)
    except SystemExit as reason:
        say(f"no samples and no HellaSwag: {reason}")
        return None


# ----------------------------------------------------------------------------------------------------------
# Files that are whole or not there


def write_atomic(path, write):
    """Makes path by write(f), f a binary file: whenever the machine stops, path is the old file or the whole new."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        partial.unlink(missing_ok=True)
        fail(f"{path} can't be written ({error}): make room, then run the same command again to go on")


def read_manifest(folder):
    """The folder's manifest.json as a dict, or None if there is none. Raises SystemExit if it is unreadable."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        manifest["tokenizer"], manifest["vocab_size"], manifest["shards"]
        return manifest
    except (ValueError, KeyError, TypeError):
        fail(f"{path} is not a manifest of this program: remove the folder and write the shards again")


def write_manifest(folder, manifest):
    write_atomic(Path(folder) / "manifest.json", lambda f: f.write(json.dumps(manifest, indent=1).encode()))


def shard_header(n_tokens):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = MAGIC, VERSION, n_tokens
    return header.tobytes()


def shard_tokens(path):
    """The number of tokens in a shard, from its header, checked against the file's size.

    Raises SystemExit for a missing, foreign or truncated file.
    """
    if not path.exists():
        fail(f"{path} is missing: run the fineweb.py command that made the folder again")
    with open(path, "rb") as f:
        header = np.frombuffer(f.read(HEADER_BYTES), dtype=np.int32)
    if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION:
        fail(f"{path} is not a token shard (magic {MAGIC}, version {VERSION}): remove it, or write it again")
    n_tokens, size = int(header[2]), path.stat().st_size
    if size != HEADER_BYTES + 2 * n_tokens:
        fail(f"{path} is truncated ({size:,} of {HEADER_BYTES + 2 * n_tokens:,} bytes): remove it and run the "
             "fineweb.py command that made it again")
    return n_tokens


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(f)


def _sha256(f):  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := f.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------
# Reading documents


def read_row_group(path, group, skip):
    """The texts of a parquet file's row group, but for the first skip ones: a list of str."""
    import pyarrow.parquet

    column = pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=["text"], use_threads=False).column(0)
    return [text or "" for text in column.to_pylist()[skip:]]


def read_documents(path, first_row=0):
    """Yields (row, documents, new): consecutive texts of a .parquet, .jsonl or .txt file.

    row counts documents within the file and is the row of the first one; rows before first_row are left out.
    documents is a list of str or, for parquet, the arguments of read_row_group(), so that a worker can do the
    reading. new is False where the text goes on from the row before: a .txt file is one document, handed out in
    pieces of about 1 MB that end at a line break. Raises SystemExit for a file that isn't what it is called.
    """
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            parquet = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid:
            fail(f"{path} is not a parquet file, or only half of one")
        if "text" not in parquet.schema_arrow.names:
            fail(f"{path} has no column 'text' (it has {', '.join(parquet.schema_arrow.names)})")
        row = 0
        for group in range(parquet.num_row_groups):
            n_rows = parquet.metadata.row_group(group).num_rows
            skip = max(0, first_row - row)
            if skip < n_rows:
                yield row + skip, (path, group, skip), True
            row += n_rows
        return
    if path.suffix not in (".jsonl", ".txt"):
        fail(f"{path}: the text must be a .jsonl, .txt or .parquet file")
    try:
        with open(path, encoding="utf-8") as f:
            if path.suffix == ".txt":
                row = 0
                while lines := f.readlines(1 << 20):
                    if row >= first_row:
                        yield row, ["".join(lines)], row == 0
                    row += 1
                return
            texts = []
            for row, line in enumerate(f):
                if row < first_row:
                    continue
                try:
                    texts.append(json.loads(line)["text"] + "")
                except (ValueError, KeyError, TypeError):
                    fail(f'{path}, line {row + 1} is not {{"text": "…"}}: mend it or leave it out')
                if len(texts) == 256:
                    yield row - 255, texts, True
                    texts = []
            if texts:
                yield row - len(texts) + 1, texts, True
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 text ({error.reason} near byte {error.start:,})")


def sample_documents():
    """English that is on any machine after the install: documentation in the standard library, numpy, torch.

    Paragraphs of prose out of triple-quoted strings, each once, in a fixed order. About 5 MB; which exactly
    depends on the installed versions.
    """
    from pydoc_data.topics import topics

    strings = list(topics.values())
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    roots += [Path(importlib.util.find_spec(name).submodule_search_locations[0]) for name in ("numpy", "torch")]
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if not {"site-packages", "dist-packages", "test", "tests"} & set(path.relative_to(root).parts):
                source = path.read_text(encoding="utf-8", errors="ignore")
                strings += re.findall(r'"""(.*?)"""', source, re.DOTALL)
    seen, documents = set(), []
    for string in strings:
        prose = []
        for paragraph in re.split(r"\n\s*\n", string):
            text = " ".join(paragraph.split())
            letters = sum(c.isalpha() or c == " " for c in text)
            is_prose = len(text) >= 80 and text.count(" ") >= 11 and letters >= 0.86 * len(text) and text.isascii()
            if is_prose and ">>>" not in text and text not in seen:
                seen.add(text)
                prose.append(text)
        if prose:
            documents.append("\n\n".join(prose) + "\n")
    order = np.random.default_rng(0).permutation(len(documents))  # so that validation is a fair draw
    return [documents[i] for i in order]


# ----------------------------------------------------------------------------------------------------------
# Tokenising in order, on all cores


encoding = None  # a worker's own tokenizer, set by start_worker


def start_worker(tokenizer):
    global encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    encoding = get_tokenizer(tokenizer)


def tokenize(documents, new, encoding):
    """Tokens of the documents, each preceded by <|endoftext|> if new: (all tokens, the count of each)."""
    documents = documents if isinstance(documents, list) else read_row_group(*documents)
    parts = []
    for text in documents:
        tokens = encoding.encode_to_numpy(text, disallowed_special=())
        parts.append(np.concatenate(([encoding.eot_token], tokens)) if new else tokens)
    return np.concatenate(parts).astype(np.uint16), np.array([len(part) for part in parts])


def tokenize_in_worker(documents, new):
    return tokenize(documents, new, encoding)


def tokenized(n_files, open_file, position, tokenizer, workers):
    """Yields (file, row, tokens, counts) in source order, from the document at position = (file, row) on.

    open_file(i, first_row) yields file i's documents as read_documents does. The order, and so the result,
    is the same for any number of workers; 0 tokenises in this process.
    """
    first_file, first_row = position

    def batches():
        for i in range(first_file, n_files):
            for row, documents, new in open_file(i, first_row if i == first_file else 0):
                yield i, row, documents, new

    if workers == 0:
        encoder = get_tokenizer(tokenizer)
        for i, row, documents, new in batches():
            yield i, row, *tokenize(documents, new, encoder)
        return
    spawn = multiprocessing.get_context("spawn")  # the same on Linux, macOS and Windows
    pool = ProcessPoolExecutor(workers, spawn, start_worker, (tokenizer,))
    try:
        queue = collections.deque()
        for i, row, documents, new in batches():
            queue.append((i, row, pool.submit(tokenize_in_worker, documents, new)))
            if len(queue) > 4 * workers:  # enough that no worker waits, few enough to bound the memory
                i, row, future = queue.popleft()
                yield i, row, *future.result()
        for i, row, future in queue:
            yield i, row, *future.result()
    finally:
        pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------
# Writing shards


def open_manifest(folder, wanted):
    """The folder's manifest, new or to be continued; wanted holds what it must agree with.

    Raises SystemExit if the folder holds shards of something else.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        if list(folder.glob("*.bin")):
            fail(f"{folder} holds shards without a manifest.json: choose another --out, or remove them")
        return {**wanted, "complete": False, "shards": []}
    for key, value in wanted.items():
        if manifest.get(key) != value:
            fail(f"{folder} holds shards with {key} = {manifest.get(key)!r}, not {value!r}: choose another --out, "
                 "or remove the folder")
    return manifest


def write_shards(folder, manifest, source, last_shard, total=None):
    """Writes the shards that the manifest lacks or that are missing, up to number last_shard (None: all).

    source(file, row) is an iterator as tokenized() gives. total: expected tokens, for the progress bar.
    """
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob("*.tmp"):
        partial.unlink()
    shards = manifest["shards"]
    lost = [k for k, shard in enumerate(shards) if not (folder / shard["name"]).exists()]
    todo = [(k, k) for k in lost]
    if not manifest["complete"] and (last_shard is None or len(shards) <= last_shard):
        todo.append((len(shards), last_shard))
    done = sum(shard["tokens"] for k, shard in enumerate(shards) if k not in lost)
    pause = 1 if sys.stderr.isatty() else 30  # seconds between updates
    with tqdm(total=total, initial=done, unit=" tokens", unit_scale=True, desc=folder.name, mininterval=pause) as bar:
        for first, last in todo:
            write_range(folder, manifest, source, first, last, bar)


def write_range(folder, manifest, source, first, last, bar):
    """Writes shards first to last; None, or a source that ends before, makes the manifest complete."""
    shards, k = manifest["shards"], first

    def finish(n_tokens, position):
        name = f"fineweb_{'train' if k else 'val'}_{k:06d}.bin"
        header, body = shard_header(n_tokens), buffer[:n_tokens].data
        digest = hashlib.sha256(header)
        digest.update(body)
        shard = {"name": name, "tokens": n_tokens, "sha256": digest.hexdigest(), "next": position}
        if k < len(shards) and shards[k] != shard:
            fail(f"{name} came out different from what {folder}/manifest.json says, so the source has changed: "
                 "remove the folder and start again")
        write_atomic(folder / name, lambda f: (f.write(header), f.write(body)))
        if k == len(shards):
            shards.append(shard)
            write_manifest(folder, manifest)

    file, row, skip = shards[first - 1]["next"] if first else (0, 0, 0)
    batches = source(file, row)
    size = manifest["shard_tokens"] if k else manifest["val_tokens"]
    buffer, filled = np.empty(size, dtype=np.uint16), 0
    for file, row, tokens, counts in batches:
        ends = np.cumsum(counts)
        taken, skip = skip, 0  # the first document's beginning may stand in the shard before
        while taken < len(tokens):
            n = min(len(tokens) - taken, size - filled)
            buffer[filled : filled + n] = tokens[taken : taken + n]
            filled, taken = filled + n, taken + n
            bar.update(n)
            if filled == size:
                document = int(np.searchsorted(ends, taken, side="right"))  # the one that the next token is in
                finish(filled, [file, row + document, taken - (int(ends[document - 1]) if document else 0)])
                if k == last:
                    batches.close()
                    return
                k, filled = k + 1, 0
                size = manifest["shard_tokens"]
                buffer = np.empty(size, dtype=np.uint16)
    if filled:
        finish(filled, None)
    manifest["complete"] = True
    write_manifest(folder, manifest)


def check_disk(folder, need):
    """Prints the bytes needed and free on the folder's disk. Raises SystemExit if they don't fit."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    line = f"{folder} needs up to {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free"
    if free < need:
        fail(f"{line}: make room, choose another --out, or start small with --shards N")
    say(line)


def write_sample(folder="data/sample"):
    """Writes the offline dataset (bytes) and its cloze.jsonl into folder, if it isn't there yet."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest and manifest["complete"] and all((folder / shard["name"]).exists() for shard in manifest["shards"]):
        say(f"{folder} is there already")
        return
    if manifest:  # half-done by a killed process: a second's work, so from the start
        shutil.rmtree(folder)
    documents = sample_documents()
    val_tokens = 400_000
    wanted = {"dataset": "sample", "revision": None, "files": ["documentation of Python, numpy and torch"],
              "tokenizer": "bytes", "vocab_size": VOCAB_SIZE["bytes"], "shard_tokens": SHARD_TOKENS,
              "val_tokens": val_tokens}

    def open_file(_, first_row):
        for row in range(first_row, len(documents), 256):
            yield row, documents[row : row + 256], True

    folder.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum([len(text) + 1 for text in documents])
    items = cloze_items(documents[: int(np.searchsorted(ends, val_tokens))])
    lines = "".join(json.dumps(item) + "\n" for item in items).encode()
    write_atomic(folder / "cloze.jsonl", lambda f: f.write(lines))
    manifest = open_manifest(folder, wanted)
    write_shards(folder, manifest, lambda *at: tokenized(1, open_file, at, "bytes", 0), None, int(ends[-1]))
    say(f"wrote {int(ends[-1]):,} bytes of English to {folder}")


def cloze_items(documents, n_items=400):
    """Four-way items in HellaSwag's format: a text's true continuation against three shuffles of its words.

    Random wrong endings stay at chance for models this small; word order they do learn.
    """
    rng = np.random.default_rng(0)
    items = []
    for text in documents:
        words = text.split()
        if len(items) == n_items or len(words) < 20:
            continue
        start = int(rng.integers(len(words) - 19))
        context, ending = " ".join(words[start : start + 10]), words[start + 10 : start + 18]
        wrong = {" ".join(rng.permutation(ending)) for _ in range(8)} - {" ".join(ending)}
        if len(wrong) < 3 or len(context) > 80 or len(" ".join(ending)) > 60:  # must fit 128 + 12 bytes
            continue
        label = int(rng.integers(4))
        endings = sorted(wrong)[:3]
        endings.insert(label, " ".join(ending))
        items.append({"ind": len(items), "activity_label": "", "ctx_a": context, "ctx_b": "", "ctx": context,
                      "endings": endings, "label": label})
    return items


# ----------------------------------------------------------------------------------------------------------
# Sources


def retrying(what, action, pauses=(1, 2, 4, 8, 16, 32)):
    """action(), tried again after each pause (in seconds) where the network fails, and then SystemExit."""
    for pause in (*pauses, None):
        try:
            return action()
        except Exception as error:
            # the hub's client changes its HTTP library now and then, whose errors are no OSErrors
            if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "httpcore")):
                raise
            status = getattr(getattr(error, "response", None), "status_code", None)
            reason = f"HTTP {status}" if status else f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            hopeless = status in (400, 401, 403, 404, 410) or getattr(error, "errno", None) == errno.ENOSPC
            if pause is None or hopeless:
                fail(f"{what} can't be had ({reason}): run the same command again once it can, it goes on from here")
            say(f"{what}: {reason}; again in {pause} s")
            time.sleep(pause * float(os.environ.get("RETRY_SECONDS", 1)))


def hub_files(repo, prefix, suffix, revision):
    """(revision, {file: bytes}) of a dataset repository of the Hugging Face hub, in order of name."""
    from huggingface_hub import HfApi

    def ask():
        sha = revision or HfApi().dataset_info(repo).sha
        tree = HfApi().list_repo_tree(repo, prefix or None, repo_type="dataset", revision=sha)
        return sha, {entry.path: entry.size for entry in tree if entry.path.endswith(suffix)}

    sha, sizes = retrying(f"the file list of {repo}", ask)
    return sha, dict(sorted(sizes.items()))


def fetch(repo, name, revision, folder):
    """Downloads one file of a dataset repository below folder (continuing a partial one); returns its path."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # ours counts tokens
    return Path(retrying(name, lambda: hf_hub_download(repo, name, repo_type="dataset", revision=revision,
                                                       local_dir=folder)))


def tokenize_hub(folder, dataset, last_shard, shard_tokens, tokenizer, workers):
    """Downloads a dataset's parquet files one by one, the next one ahead, and writes their tokens as shards."""
    repo, prefix = DATASETS[dataset][:2]
    old = read_manifest(folder)
    revision, sizes = hub_files(repo, prefix, ".parquet", old and old.get("revision"))
    files = list(sizes)
    if not files:
        fail(f"{repo} has no parquet files in {prefix}")
    wanted = {"dataset": f"{repo} {prefix}", "revision": revision, "files": files, "tokenizer": tokenizer,
              "vocab_size": VOCAB_SIZE[tokenizer], "shard_tokens": shard_tokens, "val_tokens": shard_tokens}
    manifest = open_manifest(folder, wanted)
    total = sum(sizes.values()) * 2 // (6 if tokenizer == "gpt2" else 1)  # about so many tokens per byte of parquet
    if last_shard is not None:
        total = min(total, (last_shard + 1) * shard_tokens)
    on_disk = sum(2 * shard["tokens"] for shard in manifest["shards"])
    if not manifest["complete"]:
        check_disk(folder, 2 * total - on_disk + 2 * max(sizes.values()))
    raw, ahead = folder / "raw", {}
    fetcher = ThreadPoolExecutor(1)

    def open_file(i, first_row):
        future = ahead.pop(i, None) or fetcher.submit(fetch, repo, files[i], revision, raw)
        for n, batch in enumerate(read_documents(future.result(), first_row)):
            if n == 250 and i + 1 < len(files):  # a quarter of a million documents in: we'll need the next
                ahead[i + 1] = fetcher.submit(fetch, repo, files[i + 1], revision, raw)
            yield batch

    def source(file, row):
        for batch in tokenized(len(files), open_file, (file, row), tokenizer, workers):
            for done in range(file, batch[0]):  # its last tokens have arrived
                (raw / files[done]).unlink()
            file = batch[0]
            yield batch

    try:
        write_shards(folder, manifest, source, last_shard, total)
    finally:
        fetcher.shutdown(cancel_futures=True)
    shutil.rmtree(raw, ignore_errors=True)


def tokenize_files(folder, paths, last_shard, shard_tokens, tokenizer, workers):
    """Writes the tokens of local .jsonl, .txt and .parquet files as shards."""
    for path in paths:
        if not path.is_file():
            fail(f"{path} is not a file")
    n_bytes = sum(path.stat().st_size for path in paths)
    wanted = {"dataset": "files", "revision": None,
              "files": [[str(path), path.stat().st_size] for path in paths], "tokenizer": tokenizer,
              "vocab_size": VOCAB_SIZE[tokenizer], "shard_tokens": shard_tokens,
              # about a tenth of a small text, so that something is left to train on
              "val_tokens": min(shard_tokens, max(1024, n_bytes // 40))}
    manifest = open_manifest(folder, wanted)
    check_disk(folder, 2 * n_bytes)

    def open_file(i, first_row):
        return read_documents(paths[i], first_row)

    write_shards(folder, manifest, lambda *at: tokenized(len(paths), open_file, at, tokenizer, workers), last_shard)


def download_shards(folder, dataset, last_shard):
    """Downloads ready-made shards of GPT-2 tokens."""
    from tqdm import tqdm

    repo = DATASETS[dataset][2]
    old = read_manifest(folder)
    revision, sizes = hub_files(repo, "", ".bin", old and old.get("revision"))
    names = sorted(sizes, key=lambda name: ("_val_" not in name, name))[: None if last_shard is None else last_shard + 1]
    wanted = {"dataset": repo, "revision": revision, "files": list(sizes), "tokenizer": "gpt2",
              "vocab_size": VOCAB_SIZE["gpt2"]}
    manifest = open_manifest(folder, wanted)
    have = {shard["name"]: shard for shard in manifest["shards"] if (folder / shard["name"]).exists()}
    todo = [name for name in names if name not in have]
    check_disk(folder, sum(sizes[name] for name in todo))
    folder.mkdir(parents=True, exist_ok=True)
    total, pause = sum(sizes[name] for name in names) // 2, 1 if sys.stderr.isatty() else 30
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc=folder.name, mininterval=pause) as bar:
        bar.update((sum(sizes[name] for name in names) - sum(sizes[name] for name in todo)) // 2)
        for name in todo:
            path = fetch(repo, name, revision, folder)
            have[name] = {"name": name, "tokens": shard_tokens(path), "sha256": sha256(path)}
            manifest["shards"] = [have[n] for n in sorted(have, key=lambda n: ("_val_" not in n, n))]
            manifest["complete"] = len(have) == len(sizes)
            write_manifest(folder, manifest)
            bar.update(sizes[name] // 2)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def verify(folder):
    """Checks every shard against the manifest. Raises SystemExit that names the bad ones."""
    manifest = read_manifest(folder)
    if manifest is None:
        fail(f"{folder} has no manifest.json, so there is nothing to check against")
    bad = []
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        good = path.exists() and sha256(path) == shard["sha256"]
        print(f"{path}: {'ok' if good else 'BAD' if path.exists() else 'MISSING'}")
        if not good:
            bad.append(path)
    if bad:
        fail(f"{len(bad)} of {len(manifest['shards'])} shards are bad: remove {' '.join(map(str, bad))} and run the "
             "command that made the folder again; it rebuilds what is missing")


# ----------------------------------------------------------------------------------------------------------
# Loader


def open_dataset(folder, vocab_size=1 << 16, train_shards=None, before=None):
    """Checks every shard of a folder and returns what is known of it.

    Returns a dict: dataset, tokenizer, vocab_size, and fingerprint, equal for equal tokens in the first
    train_shards training shards (None: in all) and in those for validation. before: what this returned when the
    run began; other tokens are said in a line. Raises SystemExit, with the command that helps, for a missing
    folder, no shards, a foreign or truncated one, a manifest that doesn't match, a vocabulary of more than
    vocab_size, or another tokenizer than before.
    """
    folder = Path(folder)
    names = sorted(path.name for path in folder.glob("*.bin"))
    if not names:
        fail(f"no token shards in {folder}: run `python fineweb.py` (or `--pretokenized`, `--shards 1`), or train "
             "on the offline dataset with --tiny")
    manifest = read_manifest(folder)
    counts = {name: shard_tokens(folder / name) for name in names}
    if manifest is None:
        say(f"{folder} has no manifest.json: taking its shards for GPT-2 tokens, as llm.c writes them")
        manifest = {"tokenizer": "gpt2", "vocab_size": VOCAB_SIZE["gpt2"], "dataset": "unknown",
                    "shards": [{"name": name, "tokens": counts[name]} for name in names]}
    listed = {shard["name"]: shard["tokens"] for shard in manifest["shards"]}
    for name in sorted(listed.keys() | counts.keys()):
        if listed.get(name) != counts.get(name):
            fail(f"{folder / name} has {counts.get(name, 'no')} tokens, by manifest.json {listed.get(name, 'none')}: run "
                 "the fineweb.py command that made the folder again, or remove the file if it is not of this dataset")
    if manifest["vocab_size"] > vocab_size:
        fail(f"{folder} has a vocabulary of {manifest['vocab_size']:,}, the model one of {vocab_size:,}: use another "
             f"--data_dir or --vocab_size {-(-manifest['vocab_size'] // 128) * 128}")
    training = sorted(name for name in listed if "_train_" in name)[:train_shards]
    identity = [[shard["name"], shard["tokens"], shard.get("sha256")] for shard in manifest["shards"]
                if shard["name"] in training or "_train_" not in shard["name"]]  # fmt: skip
    data = {"dataset": manifest["dataset"], "tokenizer": manifest["tokenizer"], "vocab_size": manifest["vocab_size"],
            "fingerprint": hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}
    if before and before["tokenizer"] != data["tokenizer"]:
        fail(f"{folder} holds {data['tokenizer']} tokens, the model was trained on {before['tokenizer']} tokens: name "
             "the right --data_dir")
    if before and before["fingerprint"] != data["fingerprint"]:
        say(f"{folder} is not the data that the run began with: from here on it sees other batches than it would have")
    return data


class Windows:
    """The windows of block_size + 1 tokens of a folder's "train" or "val" shards, in order of the text.

    A window never crosses the end of a shard; the last token of one is the first of the next, as the
    target of the one and an input of the other. Only the first max_shards shards and max_tokens tokens are
    used, so that a folder that holds more gives the same windows; fewer tokens than max_tokens are said in a
    line. Raises SystemExit if there is not one window.
    """

    def __init__(self, folder, split, block_size, max_shards=None, max_tokens=None):
        import mmap

        self.block_size, self.shards = block_size, []
        for path in sorted(Path(folder).glob(f"*_{split}_*.bin"))[:max_shards]:
            with open(path, "rb") as f:
                mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            if split == "train" and hasattr(mmap, "MADV_RANDOM"):
                mapped.madvise(mmap.MADV_RANDOM)  # else a cold disk reads 40 times what is asked for
            self.shards.append(np.frombuffer(mapped, dtype=np.uint16, offset=HEADER_BYTES))
        counts = [(len(shard) - 1) // block_size for shard in self.shards]
        self.first = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))  # each shard's first window
        if self.first[-1] < 1:
            fail(f"{folder} has no {split} shard that holds {block_size + 1} tokens: write more text, or use a "
                 "smaller --block_size")
        self.n_windows = int(self.first[-1])
        if max_tokens is not None:
            if self.n_windows * block_size < max_tokens:
                say(f"{folder}: only {self.n_windows * block_size:,} of {max_tokens:,} {split} tokens are there")
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


def permute(i, n, seed, epoch):
    """Where the pseudo-random permutation number (seed, epoch) of range(n) takes i, an int array.

    A six-round Feistel network over the next power of four, walked on until it lands inside (Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002): nothing is stored, and i may be asked in any order.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)
    x = np.asarray(i).astype(np.uint64)
    outside = np.ones(x.shape, dtype=bool)
    while outside.any():
        left, right = x[outside] >> half, x[outside] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)  # multiply and take high bits, twice
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32) & mask)
        x[outside] = left << half | right
        outside = x >= n
    return x.astype(np.int64)


class Loader:
    """Training batches: global batch number step is batch_rows windows, a function of (data, seed, step) alone.

    Window number step * batch_rows + j of an endless sequence of epochs, each a permutation of all windows of
    its own, is row j. This rank's rows are a slice of it. There is no state, so resuming costs nothing; a
    background thread reads the next batches ahead. Says at which of max_steps the data begin anew, if they do.
    """

    def __init__(self, windows, batch_rows, seed, rank=0, world=1, device="cpu", vocab_size=1 << 16, max_steps=0):
        self.windows, self.batch_rows, self.seed, self.vocab_size = windows, batch_rows, seed, vocab_size
        self.slice = slice(rank * batch_rows // world, (rank + 1) * batch_rows // world)
        self.device = device
        self.thread, self.ahead = ThreadPoolExecutor(1), {}
        if max_steps * batch_rows > len(windows):
            say(f"the data last for {len(windows) // batch_rows:,} steps of {max_steps:,}: step {len(windows) // batch_rows} "
                "wraps round, to the same windows in another order")

    def ids(self, step):
        """The window numbers of this rank's rows of global batch number step: (batch_rows / world,) int64."""
        n = len(self.windows)
        at = step * self.batch_rows + np.arange(self.batch_rows)[self.slice]
        epochs = at // n
        return np.concatenate([permute(at[epochs == epoch] % n, n, self.seed, int(epoch))
                               for epoch in np.unique(epochs)])

    def read(self, step):
        import torch

        rows = self.windows.rows(self.ids(step))
        if rows.max() >= self.vocab_size:
            raise SystemExit(f"token {rows.max()} in the training shards is beyond the vocabulary of {self.vocab_size}: "
                             "run `python fineweb.py --verify --out DIR`, or choose a --vocab_size that fits")
        rows = torch.from_numpy(rows)
        return rows.pin_memory() if torch.device(self.device).type == "cuda" else rows

    def batch(self, step):
        """This rank's rows of global batch number step, on the device: (batch_rows / world, block_size + 1) int64.

        Raises SystemExit for a token beyond the vocabulary.
        """
        for wanted in (step, step + 1, step + 2):
            if wanted not in self.ahead:
                self.ahead[wanted] = self.thread.submit(self.read, wanted)
        rows = self.ahead.pop(step).result()
        self.ahead = {wanted: rows for wanted, rows in self.ahead.items() if wanted > step}
        return rows.to(self.device, non_blocking=True)


# ----------------------------------------------------------------------------------------------------------
# Command line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fineweb", help="fineweb or fineweb-edu (sample-10BT of each)")
    parser.add_argument("--pretokenized", action="store_true", help="download ready-made shards")
    parser.add_argument("--files", nargs="+", type=Path, help="tokenise these .jsonl, .txt or .parquet files instead")
    parser.add_argument("--sample", action="store_true", help="build the small offline dataset instead")
    parser.add_argument("--verify", action="store_true", help="check the folder --out against its manifest")
    parser.add_argument("--shards", type=int, help="stop after so many training shards of 100M tokens (default: all)")
    parser.add_argument("--out", type=Path, help="folder for the shards (default: data/NAME)")
    parser.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, help="tokens per shard (default: 100M)")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2 or bytes (default: gpt2)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="tokenizer processes (default: all cores)")
    args = parse_strictly(parser)
    if args.dataset not in DATASETS:
        fail(f"--dataset {args.dataset}: there are {' and '.join(DATASETS)}")
    if args.tokenizer not in VOCAB_SIZE:
        fail(f"--tokenizer {args.tokenizer}: there are {' and '.join(VOCAB_SIZE)}")
    if args.shards is not None and args.shards < 1:
        fail(f"--shards {args.shards}: at least 1")
    if not 1024 <= args.shard_tokens < 2**31:  # the header holds an int32
        fail(f"--shard_tokens {args.shard_tokens}: from 1,024 to 2,147,483,647")
    if args.workers < 0:
        fail(f"--workers {args.workers}: at least 0 (tokenise in this process)")
    if args.sample:
        folder = args.out or Path("data/sample")
    elif args.files:
        folder = args.out or Path("data") / args.files[0].stem
    else:
        folder = args.out or Path(DATASETS[args.dataset][3])
    try:
        if args.verify:
            return verify(folder)
        if args.sample:
            write_sample(folder)
        elif args.pretokenized:
            download_shards(folder, args.dataset, args.shards)
        else:
            get_tokenizer(args.tokenizer)  # fails here, with its one line, rather than in every worker
            how = (args.shards, args.shard_tokens, args.tokenizer, args.workers)
            tokenize_files(folder, args.files, *how) if args.files else tokenize_hub(folder, args.dataset, *how)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command goes on after the last finished shard")
    except BrokenProcessPool:
        fail("a tokenizer process was killed, probably for its memory: run the same command again with fewer --workers")
    except OSError as error:
        fail(f"{error.filename or folder}: {error.strerror or error}")
    manifest = read_manifest(folder)
    tokens = sum(shard["tokens"] for shard in manifest["shards"])
    print(f"{folder}: {len(manifest['shards'])} shards, {tokens:,} tokens. Next: "
          f"python train_gpt2.py {'--tiny' if args.sample else f'--data_dir {folder}'}")


if __name__ == "__main__":
    main()
