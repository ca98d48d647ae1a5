"""
A collection: what reports need of many finished runs, in one file.

    python -m tools.collection results/mine log/a-? log/b-?    # add runs to it

DIR/runs.jsonl has one line for each run, a JSON object. The config, validation
losses and scores are kept whole, and so is what was measured over all steps;
of the training steps every fiftieth and the last, of the predictions item by
item the newest. So a run takes some 6 kB instead of 200. tools.compare says
the same of it as of its folder. Two kinds of pictures differ: the curve of the
experts' load has fewer points, and the bands of the accuracies before the last
step are a little wider, since there are no predictions for them.

A run that is there already, by its name, is replaced.
"""
import argparse
import dataclasses
import json
import math
from pathlib import Path

import msgspec

import fineweb
from tools import runs as reading
from tools.runs import Run, Unreadable

NAME = "runs.jsonl"
DIGITS = {"loss": 5}  # kept after the point; all other figures have SIGNIFICANT ones
SIGNIFICANT = 4


class Study(msgspec.Struct, forbid_unknown_fields=True):
    """Where a run belongs in a study."""

    name: str
    size: str
    entry: str
    base: str | list[str] | None
    rate: float


class Curve(msgspec.Struct):
    """The validated steps and their losses."""

    step: list[int]
    loss: list[float]


class Clock(msgspec.Struct):
    """Milliseconds of training before steps."""

    step: list[int]
    ms: list[float]


class Record(msgspec.Struct):
    """A line of a collection."""

    name: str  # of the run's folder
    study: Study | None
    facts: dict
    script_hash: str | None
    changed: list[str]
    train: dict[str, list[int | float | None]]  # columns: step, and each figure; null where a step lacks it
    median_ms: float | None  # over all steps, as device_ms
    device_ms: float
    val: Curve
    scores: list[dict]
    labels: dict[str, str]  # "task convention" -> each item's right answer
    clock: Clock = msgspec.field(default_factory=lambda: Clock([], []))
    bytes_per_token: float | None = None  # of the validation tokens
    machine: str | None = None  # as in runs.Run


@dataclasses.dataclass
class KeptRun(Run):
    """A Run out of a collection: it has few of its training steps, and totals over all of them."""

    totals: dict = dataclasses.field(default_factory=dict)  # median_ms, device_ms, minutes, bytes_per_token

    @property
    def median_ms(self):
        return self.totals["median_ms"]

    @property
    def device_ms(self):
        return self.totals["device_ms"]

    def minutes(self):
        """{step: minutes of training before it}, for the validated steps."""
        return self.totals["minutes"]

    def bytes_per_token(self):
        """As runs.Run's; where the tokens are no longer at hand, as it was when the run was added."""
        if self.totals["bytes_per_token"] is not None:
            return self.totals["bytes_per_token"], ""
        return super().bytes_per_token()


# ----------------------------------------------------------------------------------------------------------
# Writing


def shortened(name, value):
    """A figure of a training step with as many digits as are worth keeping."""
    if isinstance(value, int) or not math.isfinite(value):
        return value
    if name in DIGITS:
        return round(value, DIGITS[name])
    return float(f"{value:.{SIGNIFICANT}g}")


def kept_steps(run):
    """Columns of the training steps that are kept: {"step": […], figure: […]}."""
    if not run.train:
        return {"step": []}
    last = max(run.train)
    steps = [step for step in sorted(run.train) if step % reading.THINNED == 0 or step == last]
    names = {}  # in the order of the log
    for step in steps:
        for name, value in run.train[step].items():
            if isinstance(value, int | float) and name != "step":
                names[name] = None
    columns = {"step": steps}
    for name in names:
        column = []
        for step in steps:
            value = run.train[step].get(name)
            column.append(None if value is None else shortened(name, value))
        columns[name] = column
    return columns


def kept_scores(run):
    """The scores as a list of dicts, of each kind's newest with the predictions."""
    kept = []
    for key in sorted(run.scores):
        by_step = run.scores[key]
        for step in sorted(by_step):
            score = dict(by_step[step])
            score.pop("event", None)
            score.pop("predictions", None)  # verdicts are by acc_norm
            if step != max(by_step):
                score.pop("predictions_norm", None)
            kept.append(score)
    return kept


def as_record(run):
    """The Record of a finished run, as a dict."""
    minutes = run.minutes()
    timed = [step for step in sorted(run.val) if step in minutes]
    steps = sorted(run.val)
    return {
        "name": run.folder.name,
        "study": run.study,
        "facts": run.facts,
        "script_hash": run.script_hash,
        "changed": run.changed,
        "train": kept_steps(run),
        "median_ms": run.median_ms,
        "device_ms": run.device_ms,
        "val": {"step": steps, "loss": [run.val[step] for step in steps]},
        "scores": kept_scores(run),
        "labels": {" ".join(key): labels for key, labels in sorted(run.labels.items())},
        "clock": {"step": timed, "ms": [round(60_000 * minutes[step], 1) for step in timed]},
        "bytes_per_token": run.bytes_per_token()[0],
        "machine": run.machine,
    }


def size_in_numbers(size):
    """A study's size, as "0.25M", as a number; infinity for one that is no number."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9}.get(size[-1:], 1.0)
    try:
        return float(size.rstrip("KMB")) * scale
    except ValueError:
        return math.inf


def order(run):
    """Sorts the runs of a collection: by size and study, entry, rate and seed."""
    if run.study is None:
        series = run.folder.name.rstrip("0123456789")  # names end with the seed
        return 0.0, "", "", series, 1.0, run.seed, run.folder.name
    study = run.study
    place = size_in_numbers(study["size"]), study["size"], study["name"]
    return *place, study["entry"], study["rate"], run.seed, run.folder.name


def add(path, runs):
    """Adds finished runs.Run to the collection at path, in the place of those with the same names.

    path: the collection's folder, which is made if it isn't there, or the file in it. One process at a time
    may add to a collection. Raises Unreadable, and changes nothing, if the file has a damaged line or a run
    has not finished; SystemExit if the file can't be written.
    """
    file = file_of(path)
    kept = {}
    if file.exists():
        kept = {run.folder.name: run for run in read(file)}
    for run in runs:
        if not run.finished:
            raise Unreadable(f"{run.folder} is at step {run.steps} of {run.config['max_steps']}: "
                             "a collection is of finished runs")  # fmt: skip
        kept[run.folder.name] = run
    lines = []
    for run in sorted(kept.values(), key=order):
        lines.append(json.dumps(as_record(run), separators=(",", ":")) + "\n")
    fineweb.make_folder(file.parent)
    fineweb.write_atomic(file, lambda f: f.write("".join(lines).encode()))


# ----------------------------------------------------------------------------------------------------------
# Reading


def file_of(path):
    """The file of the collection at path, which is its folder or the file itself."""
    path = Path(path)
    return path if path.name == NAME else path / NAME


def is_collection(path):
    """Whether path is a collection's folder or file."""
    return file_of(path).is_file()


def by_step(columns):
    """{step: {figure: value}} of columns of one length."""
    steps = columns["step"]
    events = {step: {"step": step} for step in steps}
    if len(events) != len(steps):
        raise ValueError("a step twice")
    for name, column in columns.items():
        for step, value in zip(steps, column, strict=True):
            if value is not None:
                events[step][name] = value
    return events


def as_run(folder, record):
    """The KeptRun of a Record. Raises KeyError, TypeError or ValueError if something is missing."""
    reading.check_facts(record.facts)
    val = dict(zip(record.val.step, record.val.loss, strict=True))
    train = by_step(record.train)
    for event in train.values():
        reading.require(event, "ms", "processes")
    scores = {}
    for score in record.scores:
        reading.require(score, "acc_norm", "n")
        scores.setdefault((score["task"], score["convention"]), {})[score["step"]] = score
    labels = {}
    for name, answers in record.labels.items():
        task, convention = name.split(" ")
        labels[task, convention] = answers
    minutes = {step: ms / 60_000 for step, ms in zip(record.clock.step, record.clock.ms, strict=True)}
    totals = {
        "median_ms": record.median_ms, "device_ms": record.device_ms, "minutes": minutes,
        "bytes_per_token": record.bytes_per_token,
    }  # fmt: skip
    study = msgspec.to_builtins(record.study)
    return KeptRun(
        folder / record.name, record.facts, record.script_hash, record.changed, train, val, scores, labels,
        study, record.machine, totals,
    )  # fmt: skip


def read_line(folder, line):
    """The KeptRun in a line. Raises Unreadable."""
    try:
        run = as_run(folder, msgspec.convert(json.loads(line), Record))
    except msgspec.ValidationError as reason:
        raise Unreadable(f"is not a run of a collection: {reason}") from None
    except KeyError as missing:
        raise Unreadable(f"is not a run of a collection: it lacks {missing}") from None
    except (ValueError, TypeError, RecursionError):
        raise Unreadable("is not a run of a collection, or only part of one") from None
    if not run.val or not run.finished:
        raise Unreadable("is of a run that has not finished")
    return run


def read_lines(path):
    """(the runs of the collection at path, [(where, why)] for lines that have to be left out).

    Raises Unreadable if there is no such file, or it can't be read.
    """
    file = file_of(path)
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise Unreadable(f"{file} can't be read ({error.strerror})") from None
    runs = []
    left_out = []
    for number, line in enumerate(lines, 1):
        try:
            runs.append(read_line(file.parent, line))
        except Unreadable as reason:
            left_out.append((f"{file}, line {number}", str(reason)))
    return runs, left_out


def read(path):
    """The runs.Run of the collection at path, its folder or file, in the file's order.

    The folder of a run is where it would be beside the file; it needn't exist. Raises Unreadable if there is
    no collection, or a line of it is damaged.
    """
    runs, left_out = read_lines(path)
    for where, why in left_out:
        raise Unreadable(f"{where} {why}")
    return runs


def read_all(paths):
    """(the runs in folders and collections, [(where, why)] of what has to be left out)."""
    runs = []
    left_out = []
    places = {Path(path).resolve(): Path(path) for path in paths}  # none twice
    for path in places.values():
        try:
            if is_collection(path):
                found, damaged = read_lines(path)
                runs += found
                left_out += damaged
            else:
                runs.append(reading.read_run(path))
        except Unreadable as reason:
            left_out.append((path, str(reason)))
    return runs, left_out


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("collection", type=Path, help="its folder, which is made if it isn't there")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, as log/*, and collections")
    args = fineweb.parse_strictly(parser)
    runs, left_out = read_all(args.runs)
    finished = {}
    for run in reading.without_copies(runs)[0]:
        if not run.finished:
            left_out.append((run.folder, f"is at step {run.steps} of {run.config['max_steps']}"))
            continue
        other = finished.setdefault(run.folder.name, run)
        if other is not run:
            fineweb.fail(f"{other.folder} and {run.folder} have one name, by which a collection knows its "
                         "runs: rename one of the folders")  # fmt: skip
    for where, why in left_out:
        print(f"left out: {where}: {why}")
    try:
        before = set()
        if is_collection(args.collection):
            before = {run.folder.name for run in read(args.collection)}
        if finished:
            add(args.collection, finished.values())
            replaced = len(before & finished.keys())
            print(f"{file_of(args.collection)}: {len(before | finished.keys())} runs, "
                  f"{len(finished) - replaced} of them new, {replaced} replaced")  # fmt: skip
    except Unreadable as reason:
        fineweb.fail(f"{reason}: nothing was added")
    if left_out:
        fineweb.fail(f"{len(left_out)} of {len(finished) + len(left_out)} runs were left out, see above")


if __name__ == "__main__":
    main()
