"""
Reading runs: folders with a log.jsonl, and collections, DIR/runs.jsonl with one finished run a line.

A log is append-only: a run that was resumed repeats events, and one that was killed may have left half a
line. So of each kind of event, step and convention the last one counts.

A line of a collection keeps what is compared of a run in some 6 kB: its config, validation losses and scores,
figures over all steps, every fiftieth training step, and the newest predictions item by item.
"""
import dataclasses
import json
import math
import statistics
from pathlib import Path

import numpy as np

import fineweb
from tools.common import make_folder
from tools.compare import stats

RECIPE_FIELDS = (
    "max_lr", "min_lr", "warmup_steps", "weight_decay", "beta1", "beta2", "adam_eps", "grad_clip",
)  # fmt: skip
BUDGET_FIELDS = ("max_steps", "batch_tokens", "val_tokens")
# what may differ between seeds of one model, beside the seed
VARYING_FIELDS = (
    "run_name", "data_dir", "hellaswag", "device", "micro_batch", "compile", "log_every", "prompt",
    "sample_tokens", "temperature", "top_k", "samples", "tiny", "resume", "eval", "sample",
)  # fmt: skip
COLLECTION = "runs.jsonl"
THINNED = 50  # of the training steps a collection keeps one in so many
LEAST_BATCHES = 10  # for a training loss of the last quarter


class Unreadable(Exception):
    """A run that has to be left out; says why."""


@dataclasses.dataclass
class Run:
    """What a log, or a line of a collection, tells of a run."""

    folder: Path
    facts: dict  # the run event of its last start that trained
    script_hash: str | None
    changed: list  # conditions that were not the same from its first step to its last
    train: dict  # step -> event
    val: dict  # step -> loss
    scores: dict  # (task, convention) -> {step: result}
    labels: dict  # (task, convention) -> each item's right answer as a digit, of the newest score
    median_ms: float | None  # of a step, over all that were logged
    device_ms: float  # of training, times the processes that took part
    minutes: dict  # step -> minutes of training before it
    study: dict | None = None  # name, size, entry, base and rate, if tools.study ran it
    machine: str | None = None  # a name for the one that trained it, if tools.study did
    bytes_per_token: float | None = None  # of the validation text
    late_loss: float | None = None  # last_quarter() of a collection, which doesn't keep all steps

    def __post_init__(self):
        if self.facts["data"]["tokenizer"] == "bytes":
            self.bytes_per_token = 1.0

    @property
    def config(self):
        return self.facts["config"]

    @property
    def seed(self):
        return self.config["seed"]

    @property
    def steps(self):
        return max(self.val)

    @property
    def finished(self):
        return self.steps == self.config["max_steps"]

    @property
    def loss(self):
        """The newest validation loss, in nats per token; of a finished run the final one."""
        return self.val[self.steps]

    @property
    def tokens(self):
        return self.steps * self.config["batch_tokens"]

    @property
    def flops(self):
        """Of its training: three forward passes' for each token, as backward takes twice the work."""
        return 3 * self.facts["flops_per_token"] * self.tokens

    @property
    def architecture(self):
        return self.facts["script"].removeprefix("train_")

    def last_quarter(self):
        """The mean training loss over the last quarter of its steps, in nats per token.

        Each batch is scored before the model learns from it, so this is the loss on text from all over the
        data, as long as it reads them once. None with fewer than LEAST_BATCHES.
        """
        late = [step for step in self.train if step >= 0.75 * self.config["max_steps"]]
        losses = [self.train[step].get("loss") for step in late]
        if self.late_loss is None and len(losses) >= LEAST_BATCHES and None not in losses:
            return statistics.mean(losses)
        return self.late_loss

    def fixed_config(self):
        """Its config without what may differ between seeds of one model."""
        left_out = (*VARYING_FIELDS, "seed")
        return {name: value for name, value in self.config.items() if name not in left_out}

    def score(self, key, step=None):
        """A result at a step, the newest by default."""
        return self.scores[key][max(self.scores[key]) if step is None else step]


# ----------------------------------------------------------------------------------------------------------
# Logs


def read_log(path):
    """(the run events, the last event of each kind, step and convention by step) of a log.jsonl.

    An event has the number of the start that it belongs to as its "start". Lines that are no JSON object are
    passed over, and so are events before the first start.
    """
    starts = []
    events = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(event, dict):
            continue
        if event.get("event") == "run":
            starts.append(event)
        elif starts and "event" in event and isinstance(event.get("step"), int):
            event["start"] = len(starts) - 1
            key = [event.get(name) for name in ("step", "event", "task", "convention")]
            if event["event"] == "val":  # a later --eval may be on other tokens
                key += [starts[-1].get("data"), dict(starts[-1].get("config", {})).get("val_tokens")]
            events.pop(str(key), None)
            events[str(key)] = event
    return starts, sorted(events.values(), key=lambda event: event["step"])


def training_starts(starts, events):
    """The starts whose training steps count; of a run that took no step the last one."""
    numbers = {event["start"] for event in events if event["event"] == "train"}
    return [starts[number] for number in sorted(numbers)] or starts[-1:]


def check_facts(facts):
    """Raises KeyError, TypeError or ValueError for what lacks the facts of a run that are compared."""
    for name in ("script", "parameters", "flops_per_token"):
        facts[name]
    for name in ("fingerprint", "tokenizer"):
        facts["data"][name]
    for name in (*RECIPE_FIELDS, *BUDGET_FIELDS, "block_size", "seed"):
        float(facts["config"][name])


def fixed_conditions(start):
    """What must stay the same from a run's first step to its last: {name: value}."""
    found = {name: start["config"].get(name) for name in (*RECIPE_FIELDS, *BUDGET_FIELDS)}
    return found | start["data"] | {"the script": start.get("script_hash")}


def read_labels(folder, key):
    """The right answers of the items of a run's newest score, "" if its predictions can't be read."""
    try:
        return str(json.loads((folder / f"{key[0]}_{key[1]}.json").read_text(encoding="utf-8"))["labels"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def read_run(folder):
    """The Run in a folder. Raises Unreadable for one without the log of a run."""
    folder = Path(folder)
    path = folder / "log.jsonl"
    if not path.is_file():
        raise Unreadable("has no log.jsonl" if folder.exists() else "isn't there")
    try:
        starts, events = read_log(path)
        training = training_starts(starts, events)
        facts = training[-1]  # a later --eval may have had other options or processes
        check_facts(facts)
        fixed = fixed_conditions(facts)
        others = [fixed_conditions(start) for start in training]
        changed = sorted({name for other in others for name in other if other[name] != fixed.get(name)})
        scored = [(start["config"]["val_tokens"], start["data"]["fingerprint"]) for start in starts]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise Unreadable(f"its log.jsonl has no run event with all that is compared ({error})") from None
    run = Run(folder, facts, facts.get("script_hash"), changed, {}, {}, {}, {}, None, 0.0, {})
    for event in events:
        start = event["start"]
        if event["event"] == "train" and "loss" in event and "ms" in event:
            run.train[event["step"]] = event | {"processes": starts[start].get("processes", 1)}
        elif event["event"] == "val" and scored[start] == (fixed["val_tokens"], fixed["fingerprint"]):
            run.val[event["step"]] = float(event["loss"])
        elif event["event"] == "score" and "acc_norm" in event:
            run.scores.setdefault((event.get("task"), event.get("convention")), {})[event["step"]] = event
    if not run.val:
        raise Unreadable("it was not validated even once")
    labels = {key: read_labels(folder, key) for key in run.scores}
    run.labels = {key: answers for key, answers in labels.items() if answers}
    if run.train:
        run.median_ms = statistics.median(event["ms"] for event in run.train.values())
    spent = 0.0
    run.minutes = {0: 0.0}
    for step, event in sorted(run.train.items()):
        spent += event["ms"]
        run.minutes[step + 1] = spent / 60_000
        run.device_ms += event["ms"] * event["processes"]
    run.bytes_per_token = run.bytes_per_token or facts["data"].get("bytes_per_token")
    return run


# ----------------------------------------------------------------------------------------------------------
# Collections


def kept_steps(train):
    """Columns of the training steps that are kept, in few digits: {"step": […], figure: [… or None]}."""
    steps = [step for step in sorted(train) if step % THINNED == 0 or step == max(train)]
    columns = {"step": steps}
    for at, step in enumerate(steps):
        for name, value in train[step].items():
            if name in ("step", "start") or not isinstance(value, int | float):
                continue
            if isinstance(value, float) and math.isfinite(value):
                value = round(value, 5) if name == "loss" else float(f"{value:.4g}")
            columns.setdefault(name, [None] * len(steps))[at] = value
    return columns


def kept_scores(scores):
    """The scores as a list of dicts, of each kind's newest with the predictions by acc_norm."""
    kept = []
    for _, by_step in sorted(scores.items()):
        for step, score in sorted(by_step.items()):
            left_out = ("event", "start", "predictions", "" if step == max(by_step) else "predictions_norm")
            kept.append({name: value for name, value in score.items() if name not in left_out})
    return kept


def as_record(run):
    """A finished Run as a line of a collection, a dict."""
    steps = sorted(run.val)
    timed = [step for step in steps if step in run.minutes]
    return {
        "name": run.folder.name,
        "study": run.study,
        "facts": run.facts,
        "script_hash": run.script_hash,
        "changed": run.changed,
        "train": kept_steps(run.train),
        "median_ms": run.median_ms,
        "device_ms": run.device_ms,
        "late_loss": run.last_quarter(),
        "val": {"step": steps, "loss": [run.val[step] for step in steps]},
        "scores": kept_scores(run.scores),
        "labels": {" ".join(key): labels for key, labels in sorted(run.labels.items())},
        "clock": {"step": timed, "ms": [round(60_000 * run.minutes[step], 1) for step in timed]},
        "bytes_per_token": run.bytes_per_token,
        "machine": run.machine,
    }


def by_step(columns):
    """{step: {figure: value}} of columns of one length."""
    events = {step: {"step": step} for step in columns["step"]}
    for name, column in columns.items():
        for step, value in zip(columns["step"], column, strict=True):
            if value is not None:
                events[step][name] = value
    return events


def from_record(folder, record):
    """The Run of a line of a collection. Raises KeyError, TypeError or ValueError for what is none."""
    check_facts(record["facts"])
    if record["study"]:
        record["study"] = {name: record["study"][name] for name in ("name", "size", "entry", "base", "rate")}
    clock = by_step(record.pop("clock", {"step": []}))
    record["minutes"] = {step: event["ms"] / 60_000 for step, event in clock.items()}
    record["val"] = {step: float(event["loss"]) for step, event in by_step(record["val"]).items()}
    record["train"] = by_step(record["train"])
    for event in record["train"].values():
        float(event["ms"])
    record["labels"] = {tuple(name.split(" ")): labels for name, labels in record["labels"].items()}
    scores = {}
    for score in record["scores"]:
        float(score["acc_norm"] * score["n"])
        scores.setdefault((score["task"], score["convention"]), {})[score["step"]] = score
    record["scores"] = scores
    return Run(folder / record.pop("name"), **record)


def size_in_numbers(size):
    """A study's size, as "0.25M", as a number; infinity for one that is no number."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9}.get(size[-1:], 1.0)
    try:
        return float(size.rstrip("KMB")) * scale
    except ValueError:
        return math.inf


def file_of(path):
    """The file of the collection at path, which is its folder or the file itself."""
    path = Path(path)
    return path if path.name == COLLECTION else path / COLLECTION


def add_to_collection(path, runs):
    """Adds finished Runs to the collection at path, in the place of those with the same folder names.

    The folder is made if it isn't there. One process at a time may add to a collection. Raises Unreadable,
    and changes nothing, if a line is damaged or a run not finished; SystemExit if it can't be written.
    """
    file = file_of(path)
    kept = {run.folder.name: run for run in read_collection(file)} if file.exists() else {}
    for run in runs:
        if not run.finished:
            raise Unreadable(f"{run.folder} is at step {run.steps} of {run.config['max_steps']}")
        kept[run.folder.name] = run
    lines = []
    for _, run in sorted(kept.items()):
        lines.append(json.dumps(as_record(run), separators=(",", ":")) + "\n")
    make_folder(file.parent)
    fineweb.write_atomic(file, lambda f: f.write("".join(lines).encode()))


def read_lines(path):
    """(the Runs of the collection at path, [(where, why)] of damaged lines). Raises Unreadable."""
    file = file_of(path)
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise Unreadable(f"{file} can't be read ({error.strerror})") from None
    runs = []
    left_out = []
    for number, line in enumerate(lines, 1):
        try:
            run = from_record(file.parent, json.loads(line))
            if not run.finished:
                raise ValueError("it has not finished")
            runs.append(run)
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
            left_out.append((f"{file}, line {number}", f"is not a run of a collection: {why}"))
    return runs, left_out


def read_collection(path):
    """The Runs of the collection at path. Raises Unreadable if there is none, or a line is damaged."""
    runs, left_out = read_lines(path)
    for where, why in left_out:
        raise Unreadable(f"{where} {why}")
    return runs


def read_all(paths):
    """(the Runs in folders and collections, [(where, why)] of what has to be left out)."""
    runs = []
    left_out = []
    for path in {Path(path).resolve(): Path(path) for path in paths}.values():  # none twice
        try:
            if file_of(path).is_file():
                found, damaged = read_lines(path)
                runs += found
                left_out += damaged
            else:
                runs.append(read_run(path))
        except Unreadable as reason:
            left_out.append((path, str(reason)))
    return runs, left_out


# ----------------------------------------------------------------------------------------------------------
# Seeds of one model


@dataclasses.dataclass
class Group:
    """Runs of one model with different seeds, or one unfinished run."""

    name: str
    runs: dict  # seed -> Run

    def __post_init__(self):
        self.seeds = set(self.runs)
        self.first = self.runs[min(self.runs)]
        self.finished = self.first.finished

    @property
    def place(self):
        """(its entry in its study, its multiple of the size's learning rate)."""
        return self.first.study["entry"], float(self.first.study["rate"])

    def losses(self):
        return {seed: run.loss for seed, run in self.runs.items()}

    def mean(self, seeds=None):
        """The mean validation loss over seeds, all by default."""
        return statistics.mean(self.runs[seed].loss for seed in seeds or self.runs)

    def last_quarters(self, seeds):
        """{seed: training loss of the last quarter}, empty unless all of these seeds have one."""
        losses = {seed: self.runs[seed].last_quarter() for seed in seeds}
        return {} if None in losses.values() else losses

    def bits_per_byte(self):
        """The mean validation loss in bits per byte of text; None where the bytes per token aren't known."""
        known = [run.bytes_per_token for run in self.runs.values() if run.bytes_per_token]
        return self.mean() / math.log(2) / known[0] if known else None

    def curve(self, of):
        """[(step, the seeds' values)] of {step: value} of each run, at the steps that all seeds have."""
        curves = [of(run) for run in self.runs.values()]
        steps = set.intersection(*map(set, curves))
        return [(step, [curve[step] for curve in curves]) for step in sorted(steps)]

    def items(self, key):
        """(how many items a score has, their labels or None); None unless all seeds have the same ones."""
        if any(key not in run.scores for run in self.runs.values()):
            return None
        sizes = {run.score(key)["n"] for run in self.runs.values()}
        # a run whose predictions are lost is taken to have the others' items
        labels = {run.labels[key] for run in self.runs.values() if key in run.labels} or {None}
        return (*sizes, *labels) if len(sizes) == len(labels) == 1 else None

    def answers(self, key, step=None):
        """{seed: which items were right} by a score; {} unless all have predictions of the same items."""
        found = {}
        for seed, run in self.runs.items() if self.items(key) else ():
            chosen = run.score(key, step).get("predictions_norm", "")
            labels = run.labels.get(key, "")
            if not labels or len(chosen) != len(labels):
                return {}
            found[seed] = [answer == label for answer, label in zip(chosen, labels, strict=True)]
        return found

    def accuracy(self, key, step=None):
        """(mean acc_norm over the seeds, half of its 95% interval's width); None unless of the same items.

        The interval is over seeds and items, with one seed over the items alone. Without predictions the
        items are taken to be as hard as each other, which makes it a little wider.
        """
        if self.items(key) is None:
            return None
        n, _ = self.items(key)
        values = [run.score(key, step)["acc_norm"] for run in self.runs.values()]
        mean = statistics.mean(values)
        answers = list(self.answers(key, step).values())
        parts = [(mean * (1 - mean) / n, n - 1)]
        if answers:
            parts = [stats.squared_error(np.mean(answers, axis=0))]
        if len(values) > 1:
            parts.append(stats.squared_error(values))
        return mean, stats.half_width(parts)


def model_key(run):
    """Equal for runs that differ in the seed only, and have the same place in a study if they have one."""
    key = [run.facts["script"], run.script_hash, run.fixed_config(), run.facts["data"], run.changed]
    return json.dumps([*key, run.study], sort_keys=True)


def preference(run):
    """Sorts runs that repeat each other; a folder has more training steps than a collection."""
    return run.finished, run.facts.get("time", 0), len(run.train), str(run.folder)


def without_repeats(runs):
    """(the runs without those with the place and seed of another, a line on each that was dropped)."""
    kept = {}
    lines = []
    for run in sorted(runs, key=preference, reverse=True):
        model = json.dumps(run.study, sort_keys=True) if run.study and run.finished else model_key(run)
        other = kept.setdefault((model, run.seed), run)
        if other is not run:
            lines.append(f"{run.folder} repeats {other.folder}, seed and all, which is finished or newer")
    return list(kept.values()), lines


def group_runs(runs):
    """The runs, none of which repeats another, as a list of Group, whatever their order."""
    together = {}
    for run in sorted(runs, key=lambda run: (run.architecture, run.seed, str(run.folder))):
        alone = None if run.finished else str(run.folder)
        key = json.dumps(run.study, sort_keys=True) if run.study else model_key(run)
        together.setdefault((key, alone), {})[run.seed] = run
    groups = [Group("", seeds) for seeds in together.values()]
    for group in groups:
        study = group.first.study or {"entry": group.first.architecture, "rate": 1}
        group.name = study["entry"] + ("" if study["rate"] == 1 else f", lr x{study['rate']:g}")
    for where in ("name", "parent"):  # of the folder, where one name isn't enough
        names = [group.name for group in groups]
        for group in groups:
            if names.count(group.name) > 1:
                group.name += f" ({getattr(group.first.folder, where)})"
    return groups
