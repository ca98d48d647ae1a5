"""
How fast are the writer, the loader and the scorer here, against the plain way
to do the same?

    python -m tools.bench_data writer --text a.parquet [b.jsonl ...]
    python -m tools.bench_data loader
    python -m tools.bench_data scorer --hellaswag hellaswag_val.jsonl

Each compares in one process tree, in turn, and prints the median of the
repeats with the spread. --json FILE keeps every repeat, with the command and
the versions; one file can hold all three. The writer and the scorer need
GPT-2's vocabulary.
"""
import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import fineweb
import hellaswag

# torch, pyarrow and train_gpt2 are imported where they are used: the writer's processes need none
# of them.

PACKAGES = ("numpy", "tiktoken", "pyarrow", "torch")


class Figures:
    """The repeats of each figure, printed at the end and kept in a file as they come.

    path: a .json file, or None; what: the key under which it holds this bench.
    """

    def __init__(self, path, what):
        self.path = path
        self.what = what
        self.values = {}  # {"name, unit": one value per repeat}
        self.about = about_this_run() if path else {}

    def add(self, name, unit, value):
        self.values.setdefault(f"{name}, {unit}", []).append(value)
        if self.path is None:
            return
        benches = {}
        if self.path.exists():
            benches = json.loads(self.path.read_text())
        benches[self.what] = {**self.about, "figures": self.values}
        content = json.dumps(benches, indent=1) + "\n"
        fineweb.make_folder(self.path.parent)
        fineweb.write_atomic(self.path, lambda f: f.write(content.encode()))

    def print(self):
        for name, values in self.values.items():
            spread = f"{min(values):,.2f} to {max(values):,.2f}, n = {len(values)}"
            print(f"{name:56} {statistics.median(values):12,.2f} ({spread})", flush=True)


def about_this_run():
    """The command, the versions, and the threads and processes that it has at most."""
    import torch

    words = []
    for word in sys.argv[1:]:
        # of a file of one's own the name is enough
        words.append(Path(word).name if Path(word).is_absolute() else word)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "command": " ".join(["python -m tools.bench_data", *words]),
        "versions": {"python": platform.python_version(), **versions},
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


# ==========================================================================
# Writer


def all_texts(paths):
    texts = []
    for path in paths:
        for _, documents, _, _ in fineweb.read_documents(path):
            if not isinstance(documents, list):
                documents = fineweb.read_row_group(*documents)
            texts += documents
    return texts


def raw_worker(texts, ready, go, done):
    encoding = fineweb.get_tokenizer("gpt2")
    ready.put(0)
    go.wait()
    done.put(sum(len(encoding.encode_ordinary(text)) for text in texts))


def raw_rate(texts, processes):
    """Tokens per second of tiktoken's encode_ordinary alone; each process has its texts beforehand."""
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    go = context.Event()
    done = context.Queue()
    workers = []
    for k in range(processes):
        share = texts[k::processes]
        worker = context.Process(target=raw_worker, args=(share, ready, go, done))
        worker.start()
        workers.append(worker)
    for _ in workers:
        ready.get()
    began = time.perf_counter()
    go.set()
    tokens = sum(done.get() for _ in workers)
    seconds = time.perf_counter() - began
    for worker in workers:
        worker.join()
    return tokens / seconds


def start_plain():
    global encoding
    encoding = fineweb.get_tokenizer("gpt2")


def plain_tokenize(row):
    tokens = np.array([50256, *encoding.encode_ordinary(row["text"])])
    assert (0 <= tokens).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def plain_rows(paths):
    import pyarrow.parquet

    for path in paths:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from batch.to_pylist()


def plain_rate(paths, processes, folder):
    """Tokens per second of the usual writer: rows one by one through Pool.imap, shards by np.save."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, start_plain) as pool:
        pool.map(plain_tokenize, [{"text": "warm"}] * processes)
        began = time.perf_counter()
        tokens = 0
        shard = []
        for part in pool.imap(plain_tokenize, plain_rows(paths), chunksize=16):
            tokens += len(part)
            shard.append(part)
        np.save(folder / "shard", np.concatenate(shard))
        return tokens / (time.perf_counter() - began)


def our_rate(paths, processes, folder):
    """Tokens per second of fineweb.py's writer after its processes have started."""

    def open_file(i, row):
        return fineweb.read_documents(paths[i], row)

    sizes = [path.stat().st_size for path in paths]
    batches = fineweb.tokenized(sizes, open_file, (0, 0), "gpt2", processes)
    size = fineweb.SHARD_TOKENS
    buffer = np.empty(size, dtype=np.uint16)
    next(batches)  # the processes are up
    began = time.perf_counter()
    filled = 0
    for _, _, tokens, _, _ in batches:
        start = filled % size
        buffer[start : start + len(tokens)] = tokens[: size - start]
        filled += len(tokens)
    shard = buffer[: min(filled, size)]
    fineweb.write_atomic(folder / "shard.bin", lambda f: f.write(shard.data))
    return filled / (time.perf_counter() - began)


def our_memory(paths, processes, folder):
    """Peak memory in GB of `python fineweb.py` and its processes (Linux)."""
    command = [sys.executable, fineweb.__file__, "--files", *paths, "--out", folder / "out"]
    command += ["--workers", str(processes)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **silent)
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.1)
    return peak


def tree_memory(pid):
    """Memory of a process and its children in GB; pages that several share count once."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            parent = int(fields[1])
            if pid not in (int(folder.name), parent):
                continue
            for line in (folder / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        except OSError:  # it has ended meanwhile
            pass
    return total / 1e6


def bench_writer(args, figures):
    if not args.text:
        fineweb.fail("writer: give it something to tokenise with --text")
    texts = all_texts(args.text)
    paths = args.text * args.copies
    all_parquet = all(path.suffix == ".parquet" for path in paths)
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            raw = raw_rate(texts, args.processes)
            figures.add(f"tiktoken alone, {args.processes} processes", "Mtok/s", raw / 1e6)
            ours = our_rate(paths, args.processes, folder)
            figures.add("fineweb.py", "Mtok/s", ours / 1e6)
            figures.add("fineweb.py / tiktoken alone", "x", ours / raw)
            if all_parquet:
                plain = plain_rate(args.text, args.processes, folder)
                figures.add("rows one by one through Pool.imap", "Mtok/s", plain / 1e6)
                figures.add("fineweb.py / rows one by one", "x", ours / plain)
            if Path("/proc/self/smaps_rollup").exists():
                memory = our_memory(paths, args.processes, folder)
                figures.add("memory of fineweb.py and its processes", "GB", memory)


# ==========================================================================
# Loader


def write_random_shards(folder, n_shards):
    rng = np.random.default_rng(0)
    tokens = rng.integers(50257, size=fineweb.SHARD_TOKENS, dtype=np.uint16)

    def write(f):
        f.write(fineweb.shard_header(len(tokens)))
        f.write(tokens.data)

    for k in range(n_shards):
        fineweb.write_atomic(folder / f"x_train_{k:06d}.bin", write)


def forget(folder):
    """Asks the system to drop the shards from its memory, so that they are read from the disk again."""
    for path in folder.glob("*.bin"):
        with open(path, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loader_rate(folder, seed, steps, warm):
    """Tokens per second of one thread that reads batches of 512 windows of 1,024 tokens."""
    if not warm:
        forget(folder)
    windows = fineweb.Windows(folder, "train", 1024)
    loader = fineweb.Loader(windows, 512, seed=seed)
    if warm:
        for step in range(steps):
            loader.read(step)
    began = time.perf_counter()
    for step in range(steps):
        loader.read(step)
    seconds = time.perf_counter() - began
    loader.thread.shutdown()
    return steps * 512 * 1024 / seconds


def bench_loader(args, figures):
    import torch  # noqa: F401 so that the first batch is not timed with the import

    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        folder = Path(folder)
        write_random_shards(folder, args.shards)
        for repeat in range(args.repeats):
            warm = loader_rate(folder, repeat, args.steps, warm=True)
            figures.add("loader, pages in memory", "Mtok/s", warm / 1e6)
            if hasattr(os, "posix_fadvise"):
                cold = loader_rate(folder, repeat, args.steps, warm=False)
                figures.add("loader, nothing in memory", "Mtok/s", cold / 1e6)


# ==========================================================================
# Scorer


def answers_one_by_one(model, items, encode):
    """The usual loop: an item's four rows padded to the longest, all logits. Returns digits 0 to 3."""
    import torch
    import torch.nn.functional as F

    chosen = ""
    for item in items:
        context = encode(item["ctx"])
        endings = [encode(" " + ending) for ending in item["endings"]]
        longest = max(len(ending) for ending in endings)
        rows = torch.zeros(4, len(context) + longest, dtype=torch.int64)
        mask = torch.zeros_like(rows)
        for k, ending in enumerate(endings):
            end = len(context) + len(ending)
            rows[k, :end] = torch.tensor(context + ending)
            mask[k, len(context) : end] = 1
        mask = mask[:, 1:]
        with torch.no_grad():
            logits = model(rows)[0][:, :-1]
            losses = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        means = (losses * mask).sum(1) / mask.sum(1)
        chosen += str(means.argmin().item())
    return chosen


def our_answers(model, items, encode):
    def losses_of(inputs, targets):
        return model(inputs, targets, "none")[1]

    labels = np.array([item["label"] for item in items])
    batches = hellaswag.make_batches(items, "nanogpt", encode, 1024)
    return hellaswag.score(losses_of, batches, labels, "nanogpt")["predictions_norm"]


def bench_scorer(args, figures):
    import torch

    import train_gpt2

    encode = fineweb.get_tokenizer("gpt2").encode_ordinary
    items = hellaswag.load(args.hellaswag)[: args.items]
    torch.manual_seed(0)
    model = train_gpt2.Model(train_gpt2.Config(n_layer=6, n_head=6, n_embd=192)).eval()

    def timed(function):
        """(items per second, answers)"""
        began = time.perf_counter()
        answers = function(model, items, encode)
        return len(items) / (time.perf_counter() - began), answers

    timed(our_answers)  # warm up
    for _ in range(args.repeats):
        one_by_one, expected = timed(answers_one_by_one)
        figures.add("one item after the other, all logits", "items/s", one_by_one)
        ours, answers = timed(our_answers)
        figures.add("hellaswag.py", "items/s", ours)
        figures.add("hellaswag.py / one by one", "x", ours / one_by_one)
        same = sum(a == b for a, b in zip(expected, answers))
        figures.add("the same answer", f"of {len(items)} items", same)


# ==========================================================================
# Command line


BENCHES = {"writer": bench_writer, "loader": bench_loader, "scorer": bench_scorer}


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("what", choices=BENCHES)
    add("--json", type=Path, help="keep every repeat in this file, beside the other benches'")
    add("--repeats", type=int, default=3, help="[3]")
    add("--processes", type=int, default=os.cpu_count(), help="writer: processes [one per core]")
    add("--text", nargs="+", type=Path, default=[], help="writer: texts to tokenise")
    add("--copies", type=int, default=2, help="writer: times that fineweb.py reads them [2]")
    add("--shards", type=int, default=5, help="loader: shards of 200 MB to read from [5]")
    add("--steps", type=int, default=20, help="loader: batches of 512 windows [20]")
    add("--out", type=Path, help="loader: folder for the shards [the temporary one]")
    add("--hellaswag", type=Path, default=Path(hellaswag.DEFAULT_FILE), help="scorer: the items")
    add("--items", type=int, default=512, help="scorer: how many of them [512]")
    args = fineweb.parse_strictly(parser)
    fineweb.refuse_folder("--json", args.json)
    figures = Figures(args.json, args.what)
    BENCHES[args.what](args, figures)
    figures.print()


if __name__ == "__main__":
    main()
