"""
How fast are the writer, the loader and the scorer here, against the plain way to do the same?

    python -m tools.bench_data writer --text a.parquet [b.jsonl ...]     # needs GPT-2's vocabulary
    python -m tools.bench_data loader
    python -m tools.bench_data scorer --hellaswag hellaswag_val.jsonl    # needs GPT-2's vocabulary

Each compares in one process tree, in turn, and prints the median of the repeats with the spread.
"""
import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import fineweb
import hellaswag
import train_gpt2


def report(name, values, unit):
    print(f"{name:48} {statistics.median(values):12,.2f} {unit} ({min(values):,.2f} to {max(values):,.2f}, n = {len(values)})", flush=True)


# ---- writer


def raw_worker(texts, ready, go, done):
    encoding = fineweb.get_tokenizer("gpt2")
    ready.put(0)
    go.wait()
    done.put(sum(len(encoding.encode_ordinary(text)) for text in texts))


def raw_rate(texts, processes):
    """Tokens per second of tiktoken's encode_ordinary alone, the documents dealt out to the processes beforehand."""
    context = multiprocessing.get_context("spawn")
    ready, go, done = context.Queue(), context.Event(), context.Queue()
    workers = [context.Process(target=raw_worker, args=(texts[k::processes], ready, go, done)) for k in range(processes)]
    for worker in workers:
        worker.start()
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


def plain_rate(paths, processes, folder):
    """Tokens per second of the usual writer: rows one by one through Pool.imap, shards by np.save."""
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=list(map(str, paths)), split="train", cache_dir=folder / "cache")
    with multiprocessing.get_context("spawn").Pool(processes, start_plain) as pool:
        pool.map(plain_tokenize, [{"text": "warm"}] * processes)
        began, tokens, shard = time.perf_counter(), 0, []
        for part in pool.imap(plain_tokenize, rows, chunksize=16):
            tokens += len(part)
            shard.append(part)
        np.save(folder / "shard", np.concatenate(shard))
        return tokens / (time.perf_counter() - began)


def our_rate(paths, processes, folder):
    """Tokens per second of fineweb.py's writer after its processes have started."""
    batches = fineweb.tokenized(len(paths), lambda i, row: fineweb.read_documents(paths[i], row), (0, 0), "gpt2", processes)
    buffer, filled, began = np.empty(fineweb.SHARD_TOKENS, dtype=np.uint16), 0, None
    for _, _, tokens, _ in batches:
        if began is None:  # the pool is up
            began = time.perf_counter()
            continue
        buffer[filled % 10**8 : filled % 10**8 + len(tokens)] = tokens[: 10**8 - filled % 10**8]
        filled += len(tokens)
    fineweb.write_atomic(folder / "shard.bin", lambda f: f.write(buffer[: min(filled, 10**8)].data))
    return filled / (time.perf_counter() - began)


def our_memory(paths, processes, folder):
    """Peak memory in GB of `python fineweb.py` and its processes (Linux)."""
    command = [sys.executable, fineweb.__file__, "--files", *paths, "--workers", str(processes), "--out", folder / "out"]
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 0
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.1)
    return peak


def tree_memory(pid):
    """Proportional memory of a process and its children in GB."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if pid in (int(folder.name), parent):
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            pass
    return total / 1e6


def bench_writer(args):
    paths = args.text * args.copies
    batches = [documents for path in args.text for _, documents, _ in fineweb.read_documents(path)]
    texts = [text for batch in batches for text in (batch if isinstance(batch, list) else fineweb.read_row_group(*batch))]
    figures = {"raw": [], "plain": [], "ours": [], "memory": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            figures["raw"].append(raw_rate(texts, args.processes) / 1e6)
            figures["ours"].append(our_rate(paths, args.processes, Path(folder)) / 1e6)
            figures["memory"].append(our_memory(paths, args.processes, Path(folder)))
            if all(path.suffix == ".parquet" for path in paths):
                figures["plain"].append(plain_rate(args.text, args.processes, Path(folder)) / 1e6)
    report(f"tiktoken alone, {args.processes} processes", figures["raw"], "Mtok/s")
    report("fineweb.py", figures["ours"], "Mtok/s")
    report("fineweb.py / tiktoken alone", [a / b for a, b in zip(figures["ours"], figures["raw"])], "x")
    report("memory of fineweb.py and its processes", figures["memory"], "GB")
    if figures["plain"]:
        report("rows one by one through Pool.imap", figures["plain"], "Mtok/s")
        report("fineweb.py / rows one by one", [a / b for a, b in zip(figures["ours"], figures["plain"])], "x")


# ---- loader


def bench_loader(args):
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        folder = Path(folder)
        body = np.random.default_rng(0).integers(50257, size=fineweb.SHARD_TOKENS, dtype=np.uint16)
        for k in range(args.shards):
            header = fineweb.shard_header(len(body))
            fineweb.write_atomic(folder / f"x_train_{k:06d}.bin", lambda f: (f.write(header), f.write(body.data)))
        figures = {"warm": [], "cold": []}
        for repeat in range(args.repeats):
            for kind in ("warm", "cold"):
                windows = loader = None  # unmapped, the pages may go
                if kind == "cold":
                    for path in folder.glob("*.bin"):
                        with open(path, "rb") as f:
                            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                windows = fineweb.Windows(folder, "train", 1024)
                loader, steps = fineweb.Loader(windows, 512, seed=repeat), range(args.steps)
                if kind == "warm":
                    for step in steps:
                        loader.read(step)
                began = time.perf_counter()
                for step in steps:
                    loader.read(step)
                figures[kind].append(args.steps * 2**19 / (time.perf_counter() - began) / 1e6)
                loader.thread.shutdown()
        report("loader, pages in memory", figures["warm"], "Mtok/s")
        report("loader, nothing in memory", figures["cold"], "Mtok/s")


# ---- scorer


def bench_scorer(args):
    encoding = fineweb.get_tokenizer("gpt2")
    items = hellaswag.load(args.hellaswag)[: args.items]
    labels = np.array([item["label"] for item in items])
    torch.manual_seed(0)
    model = train_gpt2.Model(train_gpt2.Config(n_layer=6, n_head=6, n_embd=192)).eval()

    @torch.no_grad()
    def one_by_one():
        """The usual loop: an item's four rows padded to the longest, all logits."""
        chosen = ""
        for item in items:
            context = encoding.encode_ordinary(item["ctx"])
            endings = [encoding.encode_ordinary(" " + ending) for ending in item["endings"]]
            rows = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.int64)
            mask = torch.zeros_like(rows)
            for k, ending in enumerate(endings):
                rows[k, : len(context) + len(ending)] = torch.tensor(context + ending)
                mask[k, len(context) : len(context) + len(ending)] = 1
            losses = F.cross_entropy(model(rows)[0][:, :-1].transpose(1, 2), rows[:, 1:], reduction="none") * mask[:, 1:]
            chosen += str((losses.sum(1) / mask[:, 1:].sum(1)).argmin().item())
        return chosen

    def ours():
        batches = hellaswag.make_batches(items, "nanogpt", encoding.encode_ordinary, 1024)
        return hellaswag.score(lambda x, y: model(x, y, "none")[1], batches, labels, "nanogpt")["predictions_norm"]

    figures = {"one": [], "ours": []}
    ours()
    for _ in range(args.repeats):
        for name, function in (("one", one_by_one), ("ours", ours)):
            began = time.perf_counter()
            answers = function()
            figures[name].append(args.items / (time.perf_counter() - began))
            figures[f"{name} answers"] = answers
    same = sum(a == b for a, b in zip(figures["one answers"], figures["ours answers"]))
    report("one item after the other, all logits", figures["one"], "items/s")
    report("hellaswag.py", figures["ours"], "items/s")
    report("hellaswag.py / one by one", [a / b for a, b in zip(figures["ours"], figures["one"])], "x")
    print(f"the same answer on {same} of {args.items} items")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("writer", "loader", "scorer"))
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="texts for the writer")
    parser.add_argument("--copies", type=int, default=2, help="how often the writer sees them, so that its start counts less")
    parser.add_argument("--hellaswag", type=Path, default=Path(hellaswag.DEFAULT_FILE))
    parser.add_argument("--items", type=int, default=512)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--shards", type=int, default=5, help="loader: shards of 200 MB to read from")
    parser.add_argument("--steps", type=int, default=20, help="loader: batches of 512 windows")
    parser.add_argument("--out", type=Path, help="loader: where to put the shards (default: the temporary folder)")
    parser.add_argument("--repeats", type=int, default=3)
    args = fineweb.parse_strictly(parser)
    if args.what == "writer" and not args.text:
        fineweb.fail("writer: give it something to tokenise with --text")
    {"writer": bench_writer, "loader": bench_loader, "scorer": bench_scorer}[args.what](args)


if __name__ == "__main__":
    main()
