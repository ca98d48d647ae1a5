"""
Kills the writer or the downloads over and over, runs them again, and compares
the bytes with those of a run that was never killed.

    python -m tools.torture writer --kills 50     # --files, --sample
    python -m tools.torture download --kills 50   # FineWeb, ready-made

The kills (SIGKILL to all of its processes) come at random times, and before
and after each of its writes in turn. The hub is the imitation that the tests
use, so no network is needed. The last lines are a table of what survived; the
exit status is 1 if anything was lost.
"""
import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import fineweb
from fineweb import fail, parse_strictly, say

ROOT = Path(__file__).parent.parent
NOTES = "a user's notes"  # a file in the folder that must stay as it is

# Runs fineweb.py with the options that follow, but kills all of its processes at write number N. Each
# write ends with an os.replace(), so just before one is the middle of it.
KILLED_AT = """
import os, signal, sys
import fineweb

writes = 0
replace = os.replace

def counted(source, target):
    global writes
    writes += 1
    if writes == number and moment == "before":
        os.killpg(0, signal.SIGKILL)
    replace(source, target)
    if writes == number:
        os.killpg(0, signal.SIGKILL)

if __name__ == "__main__":  # the workers import this file too
    number = int(sys.argv[1])
    moment = sys.argv[2]
    sys.argv = ["fineweb.py", *sys.argv[3:]]
    os.replace = counted
    fineweb.main()
"""


# ==========================================================================
# What is killed


def text_files(folder):
    """Writes a .jsonl, a .txt and a .parquet file of made-up text; returns their paths."""
    import pyarrow
    import pyarrow.parquet

    paths = [folder / "a.jsonl", folder / "b.txt", folder / "c.parquet"]
    lines = [json.dumps({"text": text}) for text in documents(300, seed=0)]
    paths[0].write_text("\n".join(lines) + "\n")
    paths[1].write_text("\n".join(documents(300, seed=1)))
    table = pyarrow.table({"text": documents(300, seed=2)})
    pyarrow.parquet.write_table(table, paths[2], row_group_size=50)
    return paths


def documents(n, seed):
    """n texts of up to 100 words: a list of str."""
    words = np.array("the of and to in a is that for it as was with be by on not he this are".split())
    rng = np.random.default_rng(seed)
    texts = []
    for size in rng.integers(1, 100, size=n):
        texts.append(" ".join(rng.choice(words, size)))
    return texts


def writer_cases(folder):
    """{name: options of fineweb.py} for the writer, and the environment."""
    paths = [str(path) for path in text_files(folder)]
    cut = ["--tokenizer", "bytes", "--shard_tokens", "30000", "--workers", "2"]
    return {"--files": ["--files", *paths, *cut], "--sample": ["--sample"]}, dict(os.environ)


def hub_of(folder):
    """The imitation of the hub, with a little text and two ready-made shards."""
    sys.path.insert(0, str(ROOT / "tests"))
    from hub_server import HubServer

    parquet = text_files(folder)[2].read_bytes()
    text = {f"sample/10BT/{i:03d}_00000.parquet": parquet for i in range(3)}
    shards = {}
    for name in ("val_000000", "train_000001", "train_000002"):
        content = io.BytesIO()
        content.write(fineweb.shard_header(5000))
        content.write(np.arange(5000, dtype=np.uint16).tobytes())
        shards[f"fineweb_{name}.bin"] = content.getvalue()
    source = fineweb.DATASETS["fineweb"]
    return HubServer({source["repository"]: text, source["ready_made"]: shards})


def download_cases():
    cut = ["--tokenizer", "bytes", "--shard_tokens", "30000", "--workers", "1"]
    return {"FineWeb": cut, "--pretokenized": ["--pretokenized"]}


# ==========================================================================
# Kills


def start(command, out, environment):
    """Starts a program in a process group of its own, which a kill can name."""
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, *command, "--out", str(out)]
    return subprocess.Popen(command, cwd=out.parent, env=environment, start_new_session=True, **quiet)


def finish(options, out, environment):
    """Runs fineweb.py to its end; returns what is in the folder. SystemExit if it fails."""
    process = start([str(ROOT / "fineweb.py"), *options], out, environment)
    said, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(options)} ended with status {process.returncode}:\n{said}")
    return content_of(out)


def content_of(folder):
    """{name: bytes} of everything below a folder but the lock."""
    content = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith(".lock"):
            content[str(path.relative_to(folder))] = path.read_bytes()
    return content


def kill_at_random(options, out, environment, seconds):
    """Kills a run at a random time within so many seconds; whether it was still running."""
    process = start([str(ROOT / "fineweb.py"), *options], out, environment)
    try:
        process.communicate(timeout=random.uniform(0, seconds))
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True


def kill_at_write(options, out, environment, number, moment):
    """Kills a run at its write with this number; whether it came so far."""
    script = out.parent / "killed_at.py"  # a file, since the workers import the main program
    script.write_text(KILLED_AT)
    process = start([str(script), str(number), moment, *options], out, environment)
    said, _ = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{' '.join(options)} ended with status {process.returncode}:\n{said}")
    return process.returncode != 0


def torture(name, options, environment, n_kills, n_writes):
    """Kills one case over and over: yields (name, kind of kill, kills, those after which all was whole).

    n_kills: at random times; n_writes: how many of its writes, None for all.
    """
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        whole = finish(options, Path(folder) / "out", environment)
        seconds = time.perf_counter() - began
    whole["notes.txt"] = NOTES.encode()

    def survives(kill):
        """None if the kill came too late, else whether the next run gives the same bytes."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            out.mkdir()
            (out / "notes.txt").write_text(NOTES)
            if not kill(out):
                return None
            try:
                return finish(options, out, environment) == whole
            except SystemExit as error:
                say(str(error))
                return False

    results = []
    while len(results) < n_kills:
        survived = survives(lambda out: kill_at_random(options, out, environment, seconds))
        if survived is not None:
            results.append(survived)
    yield name, "at random", len(results), sum(results)

    results = []
    number = 1
    while n_writes is None or number <= n_writes:
        moments = []
        for moment in ("before", "after"):
            kill = (options, environment, number, moment)
            survived = survives(lambda out, kill=kill: kill_at_write(kill[0], out, *kill[1:]))
            if survived is not None:
                moments.append(survived)
        if not moments:
            break
        results += moments
        number += 1
    yield name, f"at {number - 1} writes", len(results), sum(results)


# ==========================================================================
# Command line


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("what", choices=("writer", "download"), help="what is killed")
    add("--kills", type=int, metavar="N", default=50, help="kills at random, of each case [50]")
    add("--writes", type=int, metavar="N", help="kill only at the first N writes [all]")
    add("--case", metavar="NAME", help="only this case, such as --case=--files [all]")
    add("--seed", type=int, metavar="N", default=0, help="of the random times [0]")
    args = parse_strictly(parser)
    if args.kills < 0:
        fail(f"--kills {args.kills}: must be at least 0")
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "writer":
            rows = run_cases(*writer_cases(Path(folder)), args)
        else:
            with hub_of(Path(folder)) as hub:
                environment = {**hub.env(), "RETRY_SECONDS": "0.01"}
                rows = run_cases(download_cases(), environment, args)
    print("| case | killed | kills | same bytes after the next run |")
    print("| --- | --- | --: | --: |")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    lost = sum(kills - whole for _, _, kills, whole in rows)
    if lost:
        fail(f"{lost} kills lost something")


def run_cases(cases, environment, args):
    if args.case and args.case not in cases:
        fail(f"--case {args.case}: choose {' or '.join(cases)}")
    rows = []
    for name, options in cases.items():
        if args.case in (None, name):
            for row in torture(name, options, environment, args.kills, args.writes):
                say(f"{row[0]}, killed {row[1]}: {row[3]} of {row[2]} whole")
                rows.append(row)
    return rows


if __name__ == "__main__":
    main()
