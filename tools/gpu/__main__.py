"""
What will a script do on a GPU, and what does it do on this machine?

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
import statistics
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, subcommand

from fineweb import fail
from tools import common
from tools.gpu import report, step


@dataclasses.dataclass
class Fake:
    """A script's training step on a GPU that isn't there; one to ten minutes a script."""

    script: Positional[str]  # a training script
    gpu: Literal["a100", "h100", "h200"] = "a100"  # which one: 80, 80 and 141 GB
    rows: int = 0  # rows of a micro-batch; 0: as many as the script chooses
    compare: str = ""  # another script, for a row beside
    price: float = 0.0  # USD an hour of one GPU
    out: Path | None = None  # a folder for NAME-GPU.json, with all figures


@dataclasses.dataclass
class Check:
    """Scripts on this machine's GPU: right, how fast, and how far from the estimate; 2 to 5 minutes each."""

    scripts: Positional[tuple[str, ...]] = ()  # training scripts; none: all
    out: Path = Path("report/gpu")  # a folder for NAME-GPU.json; what is done is not done again
    tiny: bool = False  # at small shapes, to rehearse it on a CPU


@dataclasses.dataclass
class Bench:
    """Training steps of scripts on this machine, in turn."""

    scripts: Positional[tuple[str, ...]] = ()  # training scripts; none: all
    rows: int = 0  # rows of a micro-batch; 0: as many as the script chooses
    steps: int = 5  # timed ones, after two
    tiny: bool = False  # at the shapes of --tiny


@dataclasses.dataclass
class Table:
    """What fake and check wrote to a folder, in a table."""

    folder: Positional[Path]


def all_scripts():
    """The training scripts beside fineweb.py, GPT-2's first."""
    paths = sorted(common.ROOT.glob("train_*.py"), key=lambda path: (path.stem != "train_gpt2", path))
    return [str(path) for path in paths]


def fake(args):
    from tools.gpu.fake import trace

    records = []
    for script in filter(None, (args.script, args.compare)):
        records.append(trace(script, args.gpu, args.rows))
        if args.out:
            report.write(report.path_of(args.out, script, args.gpu), records[-1])
    print(report.summary(records, args.price))
    for record in records:
        print("\n".join(report.details(record)))
    print(report.ASSUMED)
    if any("error" in record or record["unfit"] for record in records):
        raise SystemExit(1)


def bench(args):
    found = step.measure(args.scripts or all_scripts(), args.steps, args.rows, args.tiny)
    rows = []
    for mine in found:
        rate = statistics.median(mine["rates"])
        ratios = [ours / first for ours, first in zip(mine["rates"], found[0]["rates"])]
        rows.append([
            mine["script"], str(mine["rows"]), step.spread(mine["rates"]), step.spread(ratios, 2),
            f"{mine['flops'] * rate / 1e12:.3g}", f"{mine['first_step']:.0f} s", report.hours(rate),
        ])  # fmt: skip
    head = ["", "rows", "tokens/s", "of the first's", "TFLOP/s", "first step", "10B tokens on 1, 8"]
    print(common.table(head, rows))
    peak = found[-1]["peak"]
    print(f"torch {mine['torch']}, {mine['dtype']}, {os.cpu_count()} CPUs, peak memory of all together "
          f"{'unknown' if peak is None else f'{peak / 1e9:.2f} GB'}")  # fmt: skip


def main():
    if sys.argv[1:2] in (["trace"], ["work"]):  # processes that fake and check start
        from tools.gpu import check, trace

        return {"trace": trace, "work": check}[sys.argv[1]].work(json.loads(sys.argv[2]))
    kinds = Annotated[Fake, subcommand("fake")] | Annotated[Check, subcommand("check")]
    kinds |= Annotated[Bench, subcommand("bench")] | Annotated[Table, subcommand("table")]
    args = common.parse(kinds, "tools.gpu", __doc__)
    for name, value in vars(args).items():
        least = 1 if name == "steps" else 0
        if type(value) in (int, float) and not least <= value < float("inf"):
            fail(f"--{name} {value}: must be at least {least}, and finite")
        for path in [value] if name in ("script", "compare") else value if name == "scripts" else []:
            if path and not Path(path).is_file():
                fail(f"there is no script {path}")
    if isinstance(args, Fake):
        fake(args)
    elif isinstance(args, Check):
        from tools.gpu import check

        check.run(args.scripts or all_scripts(), args.out, args.tiny)
    elif isinstance(args, Bench):
        bench(args)
    else:
        print(report.summary(report.read(args.folder)))


if __name__ == "__main__":
    main()
