"""
Kills training, the writer or the downloads over and over, runs them again, and
compares the outcome with that of a run that was never killed.

    python -m tools.torture training --kills 15   # each of the seven scripts
    python -m tools.torture writer --kills 50     # --files, --sample
    python -m tools.torture download --kills 50   # FineWeb, ready-made

The kills (SIGKILL to all of its processes) come at random times, and before
and after each of its writes in turn. Of training, every loss, score and sample
in the log and all weights must be the same to the bit; of the others all bytes.
The hub is the imitation that the tests use, so no network is needed. The last
lines are a table of what survived; the exit status is 1 if anything was lost.
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
from tools.sync import SCRIPTS

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


def kill_at_random(process, seconds):
    """Kills a process at a random time within so many seconds; whether it was still running."""
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
        command = [str(ROOT / "fineweb.py"), *options]
        survived = survives(lambda out: kill_at_random(start(command, out, environment), seconds))
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
# Training

# A run of some seconds that saves often. The kills of a run come one after the other, each in what
# the one before left, and then it is run to its end.
SHORT_RUN = [
    "--tiny", "--block_size=32", "--batch_tokens=512", "--val_tokens=512", "--sample_tokens=4",
    "--warmup_steps=2", "--max_steps=24", "--eval_every=4", "--run_name=run", "--data_dir=data",
]  # fmt: skip
KILLS_OF_A_RUN = 5
# The same as KILLED_AT of a training script
TRAINING_KILLED_AT = KILLED_AT.replace("import fineweb", "import importlib").replace(
    """    sys.argv = ["fineweb.py", *sys.argv[3:]]
    os.replace = counted
    fineweb.main()
""",
    """    script = importlib.import_module(sys.argv[3])
    sys.argv = [sys.argv[3] + ".py", *sys.argv[4:]]
    os.replace = counted
    script.main()
""",
)


def start_training(words, home):
    """Starts a training script, or resumes it if an earlier start got as far as making the folder."""
    command = [sys.executable, *words, *SHORT_RUN]
    if (home / "log/run").exists():
        command.append("--resume")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=home, env=environment, start_new_session=True, **quiet)


def finish_training(script, home):
    """Runs a script to its end; returns its outcome(). SystemExit if it fails."""
    process = start_training([str(ROOT / f"{script}.py")], home)
    said, _ = process.communicate()
    if process.returncode != 0 and "is finished at step" not in said:
        raise SystemExit(f"{script} ended with status {process.returncode}:\n{said}")
    return outcome(home / "log/run")


def outcome(folder):
    """What a run came to: the events of its log, without times and tokens/s, and the last weights."""
    import torch

    events = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] != "run":
            event.pop("ms", None)
            events.append(event)
    newest = max(folder.glob("step_*.pt"))
    weights = torch.load(newest, weights_only=True)["model"]
    return events, {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


def difference(ours, whole):
    """What differs between two outcomes, in words; "" if nothing does."""
    events, weights = ours
    for event, expected in zip(events, whole[0], strict=False):
        if event != expected:
            return f"its log has {event}, not {expected}"
    if len(events) != len(whole[0]):
        return f"its log has {len(events)} events, not {len(whole[0])}"
    return "its weights are others" if weights != whole[1] else ""


def torture_training(script, data, n_kills, n_writes):
    """Like torture(), of a training script; data: a folder of tokens."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.symlink(data, home / "data")
        began = time.perf_counter()
        whole = finish_training(script, home)
        seconds = time.perf_counter() - began

    def survives(kills):
        """(how many of the kills came in time, whether the run's outcome is the same after them)."""
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            os.symlink(data, home / "data")
            n = 0
            for kill in kills:
                n += kill(home)
            try:
                lost = difference(finish_training(script, home), whole)
            except SystemExit as error:
                lost = str(error)
            if lost:
                say(f"{script}: {lost}")
            return n, not lost

    def at_random(home):
        return kill_at_random(start_training([str(ROOT / f"{script}.py")], home), seconds)

    def at_write(number, moment):
        def kill(home):
            file = home / "killed_at.py"
            file.write_text(TRAINING_KILLED_AT)
            process = start_training([str(file), str(number), moment, script], home)
            process.communicate()
            return process.returncode == -signal.SIGKILL

        return kill

    done = same = 0
    while done < n_kills:
        n, is_same = survives([at_random] * min(KILLS_OF_A_RUN, n_kills - done))
        done += n
        same += n * is_same
    yield script, "at random", done, same

    done = same = number = 0
    while n_writes is None or number < n_writes:
        before = done
        for moment in ("before", "after"):
            n, is_same = survives([at_write(number + 1, moment)])
            done += n
            same += n * is_same
        if done == before:  # it makes fewer writes
            break
        number += 1
    yield script, f"at {number} writes", done, same


def run_scripts(names, args):
    """The rows of torture_training() of some scripts."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        fineweb.write_sample(data)
        items = (data / "cloze.jsonl").read_text().splitlines(keepends=True)
        (data / "cloze.jsonl").write_text("".join(items[:20]))  # scoring all takes longer than the run
        rows = []
        for name in names:
            for row in torture_training(name, data, args.kills, args.writes):
                say(f"{row[0]}, killed {row[1]}: {row[3]} of {row[2]} whole")
                rows.append(row)
    return rows


# ==========================================================================
# Command line


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("what", choices=("training", "writer", "download"), help="what is killed")
    add("--kills", type=int, metavar="N", default=50, help="kills at random, of each case [50]")
    add("--writes", type=int, metavar="N", help="kill only at the first N writes [all]")
    add("--case", metavar="NAME", help="only this one, as gpt2 or --case=--files [all]")
    add("--seed", type=int, metavar="N", default=0, help="of the random times [0]")
    args = parse_strictly(parser)
    if args.kills < 0:
        fail(f"--kills {args.kills}: must be at least 0")
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "training":
            rows = run_scripts(chosen_scripts(args.case), args)
        elif args.what == "writer":
            rows = run_cases(*writer_cases(Path(folder)), args)
        else:
            with hub_of(Path(folder)) as hub:
                environment = {**hub.env(), "RETRY_SECONDS": "0.01"}
                rows = run_cases(download_cases(), environment, args)
    print("| case | killed | kills | the same in the end |")
    print("| --- | --- | --: | --: |")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    lost = sum(kills - whole for _, _, kills, whole in rows)
    if lost:
        fail(f"{lost} kills lost something")


def chosen_scripts(case):
    """The names of the scripts to kill; case: one architecture, or None for all seven."""
    names = [f"train_{case}"] if case else [name.removesuffix(".py") for name in SCRIPTS.values()]
    for name in names:
        if not (ROOT / f"{name}.py").exists():
            fail(f"--case {case}: there is no {name}.py")
    return names


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
