"""
What will a script do on a GPU, or does it do on this machine?

    python -m tools.gpu fake train_gpt2.py --gpu a100    # without a GPU
    python -m tools.gpu fake train_mta.py --compare train_gpt2.py --price 2.5
    python -m tools.gpu check --out report/gpu           # on a real one: all
    python -m tools.gpu bench train_gpt2.py train_llama.py    # steps, in turn
    python -m tools.gpu table report/gpu

fake compiles a script's training step for an A100, H100 or H200 that isn't
there, and counts kernels, bytes, FLOPs and memory. check compares a real GPU's
losses and gradients with the CPU's, times the whole step and puts it beside
the estimate. bench times steps on random tokens on this machine. Any script of
the shape of train_gpt2.py will do.
"""
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

import fineweb
from tools import common

FIRST = ("gpt2", "llama", "mistral", "gemma", "deepseek", "mta", "rwkv")  # the cheap ones


@dataclasses.dataclass
class Fake:
    """A script's training step on a GPU that isn't there; one to ten minutes a script."""

    script: tyro.conf.Positional[str]  # a training script
    gpu: Literal["a100", "h100", "h200"] = "a100"  # which one: 80, 80 and 141 GB
    rows: int = 0  # rows of a micro-batch; 0: as many as the script chooses
    compare: str = ""  # another script, for a column beside
    price: float = 0.0  # USD an hour of one GPU
    out: Path | None = None  # a folder for NAME-GPU.json, with all figures


@dataclasses.dataclass
class Check:
    """Scripts on this machine's GPU: right, how fast, and how far from the estimate; 2 to 5 minutes each."""

    scripts: tyro.conf.Positional[tuple[str, ...]] = ()  # training scripts; none: all
    out: Path = Path("report/gpu")  # a folder for NAME-GPU.json; what is done is not done again
    tiny: bool = False  # at small shapes, to rehearse it on a CPU


@dataclasses.dataclass
class Bench:
    """Training steps of scripts on this machine, in turn, each script in a process of its own."""

    scripts: tyro.conf.Positional[tuple[str, ...]] = ()  # training scripts; none: all
    rows: int = 0  # rows of a micro-batch; 0: as many as the script chooses
    steps: int = 5  # timed ones, after two
    tiny: bool = False  # at the shapes of --tiny
    profile: Path | None = None  # a folder for traces; the ten costliest operations are printed


@dataclasses.dataclass
class Table:
    """The records of a folder as a table."""

    folder: tyro.conf.Positional[Path]  # with the files of fake and check


def all_scripts():
    """The training scripts beside fineweb.py, the cheap ones first."""
    found = [path.stem.removeprefix("train_") for path in common.ROOT.glob("train_*.py")]
    return [f"train_{name}.py" for name in (*FIRST, *sorted(set(found) - set(FIRST))) if name in found]


def read_records(folder):
    """The records in a folder, sorted by GPU and script."""
    records = [json.loads(path.read_text()) for path in folder.glob("*-*.json")]
    if not records:
        fineweb.fail(f"{folder} has no records of a GPU: make some with fake or check")
    order = {name: number for number, name in enumerate(all_scripts())}
    return sorted(records, key=lambda record: (record["gpu"], order.get(record["script"], 99)))


def record_path(folder, script, gpu):
    return folder / f"{Path(script).stem.removeprefix('train_')}-{gpu}.json"


def fake(args):
    from tools.gpu import report
    from tools.gpu.fake import trace

    records = []
    for script in (args.script, args.compare) if args.compare else (args.script,):
        if not Path(script).is_file():
            fineweb.fail(f"there is no script {script}")
        record = trace(script, args.gpu, args.rows)
        records.append(record)
        if args.out:
            common.make_folder(args.out)
            text = json.dumps(record, indent=1) + "\n"
            path = record_path(args.out, script, args.gpu)
            fineweb.write_atomic(path, lambda file, text=text: file.write(text.encode()))
    print(report.side_by_side(records, args.price))
    print(report.ASSUMED)
    if any("error" in record or record["unfit"] for record in records):
        raise SystemExit(1)


def bench(args):
    import statistics

    from tools.gpu import step

    scripts = args.scripts or all_scripts()
    found = step.measure(scripts, args.steps, args.rows, args.tiny, args.profile)
    facts, _ = found[0]
    print(f"{facts['device']}, {facts['dtype']}, torch {facts['torch']}, {os.cpu_count()} CPUs\n")
    rows = []
    first = None
    for script, (facts, figures) in zip(scripts, found):
        timed = [one["rate"] for one in figures[step.WARM_UP :]]
        first = first or timed
        rate = statistics.median(timed)
        memory = figures[-1]["peak"]
        hours = 10e9 / rate / 3600
        rows.append([
            Path(script).stem, str(facts["rows"]), step.spread(timed),
            step.spread([mine / other for mine, other in zip(timed, first)], 2),
            f"{facts['flops'] * rate / 1e12:.3g}", "–" if memory is None else f"{memory / 1e9:.2f} GB",
            f"{figures[0]['seconds']:.0f} s", f"{hours:,.1f} h, {hours / 8:,.1f} h",
        ])  # fmt: skip
    head = ["", "rows", "tokens/s", "of the first's", "TFLOP/s", "memory", "first step", "10B tokens: 1, 8"]
    print(common.table(head, rows))


def main():
    if sys.argv[1:2] == ["work"]:  # what step.Worker starts
        from tools.gpu import step

        return step.work(json.loads(sys.argv[2]))
    if sys.argv[1:2] == ["trace"]:  # what fake.trace starts
        from tools.gpu import trace

        return trace.work(json.loads(sys.argv[2]))
    if sys.argv[1:2] == ["curve"]:  # what check starts
        from tools.gpu import check

        return check.work(json.loads(sys.argv[2]))
    kinds = {"fake": Fake, "check": Check, "bench": Bench, "table": Table}
    kind = Annotated[Fake, tyro.conf.subcommand("fake")]
    for name in ("check", "bench", "table"):
        kind = kind | Annotated[kinds[name], tyro.conf.subcommand(name)]
    args = common.parse(kind, "tools.gpu", __doc__)
    numbers = {name: value for name, value in vars(args).items() if type(value) in (int, float)}
    for name, value in numbers.items():
        if not 0 <= value < float("inf") or (name == "steps" and value < 1):
            fineweb.fail(f"--{name} {value}: must be at least {1 if name == 'steps' else 0}, and finite")
    if isinstance(args, Fake):
        fake(args)
    if isinstance(args, Bench):
        bench(args)
    if isinstance(args, Check):
        from tools.gpu import check

        check.run([*args.scripts] or all_scripts(), args.out, args.tiny, record_path)
    if isinstance(args, Table):
        from tools.gpu import report

        print(report.summary(read_records(args.folder)))


if __name__ == "__main__":
    main()
