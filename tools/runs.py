"""
Reading what runs have left in their folders: their logs, their predictions and the copies of their scripts.

read_run() gives a Run; pool_runs() puts runs together that differ in the seed only.
"""
import dataclasses
import functools
import importlib
import json
import math
import statistics
from pathlib import Path

import numpy as np

import fineweb
from tools import verdicts

RECIPE_FIELDS = (
    "max_lr", "min_lr", "warmup_steps", "weight_decay", "beta1", "beta2", "adam_eps", "grad_clip",
)  # fmt: skip
CONDITION_FIELDS = ("max_steps", "batch_tokens", "val_tokens", "block_size", "train_shards", "seed")
# what may differ between runs that are pooled, beside the seed
VARYING_FIELDS = (
    "run_name", "data_dir", "hellaswag", "device", "micro_batch", "compile", "log_every", "prompt",
    "sample_tokens", "temperature", "top_k", "samples",
)  # fmt: skip
# Logs from before these fields were renamed: {script: {old name: today's}}
RENAMED_FIELDS = {
    "train_deepseek": {"expert_width": "n_inner_expert", "dense_width": "n_inner"},
    "train_rwkv": {"n_ffn": "n_inner"},
}
THINNED = 50  # of the training steps a collection keeps one in so many
FRESH = 0.75  # of a run's steps come before those whose batches are its fresh text
LEAST_BATCHES = 10  # of the thinned steps, for a loss on fresh text
MOST_NAMED = 2  # config fields that stand in the names of pools; where more differ, folders name them


class Unreadable(Exception):
    """A run that has to be left out; says why."""


@dataclasses.dataclass
class Run:
    """One run's log: the facts of its last start that trained, and the latest that it logged of each step."""

    folder: Path
    facts: dict
    script_hash: str | None  # of the script's text; None if neither the log nor a copy tells it
    changed: list  # conditions that were not the same from its first step to its last
    train: dict
    val: dict
    scores: dict  # (task, convention) -> {step: result}
    labels: dict  # (task, convention) -> each item's right answer as a digit, of the newest score
    study: dict | None = None  # name, size, entry, base and rate, if tools.study ran it
    machine: str | None = None  # a name for the one that trained it, if tools.study did: see its this_machine

    @property
    def config(self):
        return self.facts["config"]

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

    def fresh_loss(self):
        """The mean training loss over one in THINNED of the last quarter of its steps, in nats per token.

        Each batch is scored before the model learns from it, so this is the loss on text from all over the
        data that it hasn't read, unless it reads its data several times. None with fewer than LEAST_BATCHES.
        Runs with one seed have the same batches. Of a run and its collection it is the same.
        """
        first = math.ceil(FRESH * self.config["max_steps"])
        losses = []
        for step in range(-(-first // THINNED) * THINNED, self.config["max_steps"], THINNED):
            losses.append(self.train.get(step, {}).get("loss"))
        if len(losses) < LEAST_BATCHES or None in losses:
            return None
        return statistics.mean(losses)

    @property
    def median_ms(self):
        """Milliseconds of a step, the median over all that were logged; None if there is none."""
        times = [event["ms"] for event in self.train.values()]
        return statistics.median(times) if times else None

    @property
    def device_ms(self):
        """Milliseconds of training, times the processes that took part."""
        return sum(event["ms"] * event["processes"] for event in self.train.values())

    def minutes(self):
        """{step: minutes of training before it}, for the steps that the log tells it of."""
        spent = 0.0
        at = {0: 0.0}
        for step in sorted(self.train):
            spent += self.train[step]["ms"] / 60_000
            at[step + 1] = spent
        return at

    @property
    def architecture(self):
        return self.facts["script"].removeprefix("train_")

    @property
    def seed(self):
        return self.config["seed"]

    @property
    def recipe(self):
        return self.config.get("recipe", "paper")  # the first logs had no such field

    @property
    def init_from(self):
        """The checkpoint whose weights it started from, "" for a model that was new."""
        return self.config.get("init_from", "")  # the first logs had no such field

    def bytes_per_token(self):
        """(bytes of text to a validation token, "") or (None, why that isn't known)."""
        config = self.config
        data = self.facts["data"]
        return count_bytes(
            config.get("data_dir", ""), data["fingerprint"], data["tokenizer"], config["train_shards"],
            config["block_size"], config["val_tokens"],
        )  # fmt: skip

    def renamed_config(self):
        """Its config under today's names."""
        renamed = RENAMED_FIELDS.get(self.facts["script"], {})
        return {renamed.get(name, name): value for name, value in self.config.items()}

    def fixed_config(self):
        """Its config under today's names, without the fields that may differ between runs of a pool."""
        fields = {"init_from": self.init_from, **self.renamed_config(), "recipe": self.recipe}
        return {name: value for name, value in fields.items() if name not in (*VARYING_FIELDS, "seed")}

    def newest_score(self, key):
        return self.scores[key][max(self.scores[key])]

    def right(self, key, step=None):
        """Which items it got right at a step, the newest by default; None if the predictions don't tell."""
        score = self.newest_score(key) if step is None else self.scores[key][step]
        chosen = score.get("predictions_norm", "")
        labels = self.labels.get(key, "")
        if not labels or len(chosen) != len(labels):
            return None  # then there is no test on the items, and the report says so
        return [answer == label for answer, label in zip(chosen, labels, strict=True)]


def require(fields, *names):
    """Raises KeyError if a dict lacks one of the names."""
    for name in names:
        if name not in fields:
            raise KeyError(name)


def check_facts(facts):
    """Raises KeyError or TypeError for what lacks the facts of a run that are compared."""
    require(facts, "script", "processes", "parameters", "flops_per_token")
    require(facts["data"], "fingerprint", "tokenizer")
    require(facts["config"], *RECIPE_FIELDS, *CONDITION_FIELDS)


@functools.cache
def count_bytes(data_dir, fingerprint, tokenizer, train_shards, block_size, val_tokens):
    """(bytes of text to a token of those that a run is validated on, "") or (None, why that isn't known).

    The end of a document counts as one byte, as it does for a model of bytes. The tokens are those in
    data_dir, if they are the ones with the fingerprint.
    """
    if tokenizer == "bytes":
        return 1.0, ""
    if not data_dir or not Path(data_dir).is_dir():
        return None, f"the tokens are not here, in {data_dir or 'a folder that the log names'}"
    try:
        vocab_size = fineweb.VOCAB_SIZE.get(tokenizer, 1 << 16)
        data = fineweb.open_dataset(data_dir, vocab_size, train_shards)
        if data["fingerprint"] != fingerprint:
            return None, f"{data_dir} holds other tokens than theirs"
        encoding = fineweb.get_tokenizer(tokenizer)
        windows = fineweb.Windows(data_dir, "val", block_size, max_tokens=val_tokens)
    except SystemExit as reason:
        return None, str(reason)
    lengths = [len(encoding.decode_single_token_bytes(token)) for token in range(encoding.n_vocab)]
    lengths[encoding.eot_token] = 1
    counts = np.zeros(len(lengths), dtype=np.int64)
    for start in range(0, len(windows), 1024):
        rows = windows.rows(np.arange(start, min(start + 1024, len(windows))))
        counts += np.bincount(rows[:, 1:].ravel(), minlength=len(lengths))  # the targets
    return float(counts @ lengths / counts.sum()), ""


class Log:
    """The events of a log.jsonl, sorted by kind."""

    def __init__(self):
        self.starts = []  # the run events: one each time that the script was started
        self.trained = set()  # numbers of the starts that took a step
        self.train = {}  # step -> event
        self.val = []  # (the start it was in, step, loss)
        self.scores = {}  # (task, convention) -> {step: event}

    def training(self):
        """The starts that trained; of a run that took no step the last one."""
        return [self.starts[i] for i in sorted(self.trained)] or self.starts[-1:]

    def add(self, event):
        """Raises KeyError, TypeError, ValueError or IndexError for what is no event of a run."""
        kind = event["event"]
        if kind == "run":
            check_facts(event)
            self.starts.append(event)
        elif kind == "train":
            require(event, "ms")
            self.train[event["step"]] = event | {"processes": self.starts[-1]["processes"]}
            self.trained.add(len(self.starts) - 1)
        elif kind == "val":
            self.val.append((self.starts[-1], event["step"], float(event["loss"])))
        elif kind == "score":
            require(event, "acc_norm", "n")
            key = event["task"], event["convention"]
            self.scores.setdefault(key, {})[event["step"]] = event


def read_log(path):
    """The Log in a file. Raises Unreadable for a file that is no run's."""
    log = Log()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            log.add(json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError):
            if number < len(lines):  # the last line of a run that goes on, or was killed, may be half there
                raise Unreadable(f"line {number} of its log.jsonl is not an event of a run") from None
    if not lines:
        raise Unreadable("its log.jsonl is empty")
    if not log.starts:
        raise Unreadable("its log.jsonl does not say what run it is")
    return log


def fixed_conditions(start):
    """What must stay the same from a run's first step to its last: {name: value}."""
    names = (*RECIPE_FIELDS, "max_steps", "batch_tokens", "val_tokens")
    return {name: start["config"][name] for name in names} | start["data"]


def find_copy(folder, name, script_hash):
    """The copy of a script with a hash, the newest one if the hash is None; None if there is no such copy."""
    for copy in reversed(fineweb.script_copies(folder, name)):
        if script_hash in (None, fineweb.script_hash(copy)):
            return copy
    return None


def trained_hash(folder, training):
    """(hash of the script that trained last, or None, whether another one trained before it).

    Logs from before the scripts logged it lack the hash; then the newest copy tells it.
    """
    hashes = [start["script_hash"] for start in training if "script_hash" in start]
    if hashes:
        return hashes[-1], len(set(hashes)) > 1
    copy = find_copy(folder, training[-1]["script"], None)
    return (fineweb.script_hash(copy) if copy else None), False


def read_labels(folder, key):
    """The right answers of the items of a run's newest score, or None if its predictions can't be read."""
    task, convention = key
    try:
        labels = json.loads((folder / f"{task}_{convention}.json").read_text(encoding="utf-8"))["labels"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return labels if isinstance(labels, str) else None


def read_run(folder):
    """The Run in a folder. Raises Unreadable for a folder without a log, or with one that is no run's."""
    folder = Path(folder)
    if not folder.exists():
        raise Unreadable("isn't there")
    path = folder / "log.jsonl"
    if not path.is_file():
        raise Unreadable("has no log.jsonl")
    log = read_log(path)
    training = log.training()
    facts = training[-1]  # a later --eval may have had other options or processes
    fixed = fixed_conditions(facts)
    changed = set()
    for start in training:
        changed |= {name for name, value in fixed_conditions(start).items() if value != fixed.get(name)}
    script_hash, edited = trained_hash(folder, training)
    if edited:
        changed.add("the script")
    val = {}
    for start, step, loss in log.val:
        here = fixed_conditions(start)
        if (here["val_tokens"], here["fingerprint"]) == (fixed["val_tokens"], fixed["fingerprint"]):
            val[step] = loss
    if not val:
        raise Unreadable("it was not validated even once")
    labels = {}
    for key in log.scores:
        read = read_labels(folder, key)
        if read is not None:
            labels[key] = read
    return Run(folder, facts, script_hash, sorted(changed), log.train, val, log.scores, labels)


@dataclasses.dataclass
class Pool:
    """Runs of one script and config with different seeds, or one unfinished run."""

    name: str
    runs: list
    set_apart: set = dataclasses.field(default_factory=set)  # scores that are over other items

    @property
    def first(self):
        return self.runs[0]

    @property
    def finished(self):
        return self.first.finished

    def losses(self):
        return [run.loss for run in self.runs]

    def by_seed(self):
        return {run.seed: run for run in self.runs}

    def losses_by_seed(self):
        return {run.seed: run.loss for run in self.runs}

    def loss(self):
        return statistics.mean(self.losses())

    def bits_per_byte(self):
        """(the loss in bits per byte of text, "") or (None, why that isn't known)."""
        for run in self.runs:  # one may know where the tokens are, another not
            n_bytes, why = run.bytes_per_token()
            if n_bytes:
                return self.loss() / math.log(2) / n_bytes, ""
        return None, why

    def items(self, key):
        """(how many items a score has, their labels or None), None unless all runs have the same ones."""
        sizes = set()
        labels = set()
        for run in self.runs:
            if key not in run.scores:
                return None
            sizes.add(run.newest_score(key)["n"])
            labels.add(run.labels.get(key))
        labels.discard(None)  # a run whose predictions are lost is taken to have the others' items
        if len(sizes) > 1 or len(labels) > 1:
            return None
        return sizes.pop(), labels.pop() if labels else None

    def answers(self, key, step=None):
        """{seed: which items were right} by a score, None unless all have predictions of the same items."""
        if key in self.set_apart or self.items(key) is None:
            return None
        answers = {run.seed: run.right(key, step) for run in self.runs}
        return None if None in answers.values() else answers

    def accuracy(self, key, step=None):
        """(mean acc_norm over the seeds, half of its 95% interval's width), None if it can't be compared.

        The interval is over seeds and items, with one seed over the items alone. Without predictions the
        items are taken to be as hard as each other, which makes it a little wider.
        """
        items = self.items(key)
        if key in self.set_apart or items is None:
            return None
        scores = []
        for run in self.runs:
            scores.append(run.newest_score(key) if step is None else run.scores[key][step])
        mean = statistics.mean(score["acc_norm"] for score in scores)
        answers = self.answers(key, step)
        if answers:
            return mean, verdicts.half_accuracy(answers)
        parts = [(mean * (1 - mean) / items[0], max(1, items[0] - 1))]
        if len(scores) > 1:
            parts.append(verdicts.squared_error([score["acc_norm"] for score in scores]))
        return mean, verdicts.half_width(parts, verdicts.LEVEL)

    def accuracy_curve(self, key):
        """[(step, mean acc_norm, half of its interval's width)] at the steps that all seeds were scored at.

        Steps that were scored on other items than the newest are left out.
        """
        n, _ = self.items(key)
        steps = set.intersection(*[set(run.scores[key]) for run in self.runs])
        curve = []
        for step in sorted(steps):
            if all(run.scores[key][step]["n"] == n for run in self.runs):
                curve.append((step, *self.accuracy(key, step)))
        return curve

    def curve(self, of):
        """[(step, mean)] over the seeds of {step: value}, at the steps that all of them have."""
        curves = [of(run) for run in self.runs]
        steps = set.intersection(*map(set, curves))
        return [(step, statistics.mean(curve[step] for curve in curves)) for step in sorted(steps)]


def preference(run):
    """Of runs that repeat each other the one with the largest preference is kept."""
    # of one run in its folder and in a collection the folder has more of its training steps
    return run.finished, run.facts.get("time", 0), len(run.train), str(run.folder)


def without_copies(runs):
    """(the runs, each once, a line on each that was dropped).

    A run that is in its folder and in a collection, or in two collections, is one run.
    """
    groups = {}
    for run in runs:
        groups.setdefault(json.dumps([run.facts, run.script_hash], sort_keys=True), []).append(run)
    kept = []
    lines = []
    for group in groups.values():
        best = max(group, key=preference)
        for run in group:
            if run is not best:
                lines.append(f"{run.folder} and {best.folder} are one run, which counts once")
        studies = [run.study for run in group if run.study]
        if studies and best.study is None:  # a folder doesn't tell it, a collection does
            best = dataclasses.replace(best, study=studies[0])
        kept.append(best)
    return kept, lines


def without_repeats(runs):
    """(the runs without those that repeat another one, seed and all, a line on each that was dropped)."""
    runs, lines = without_copies(runs)
    groups = {}
    for run in runs:
        groups.setdefault((pool_key(run), run.seed), []).append(run)
    kept = []
    for group in groups.values():
        best = max(group, key=preference)
        kept.append(best)
        for run in group:
            if run is not best:
                why = "finished" if best.finished and not run.finished else "is newer"
                lines.append(f"{run.folder} is no second seed: it has seed {run.seed} and all else in common "
                             f"with {best.folder}, which {why}")  # fmt: skip
    return kept, lines


def pool_key(run):
    """Equal for runs that differ in the seed only, and have the same place in a study if they have one."""
    key = [run.facts["script"], run.script_hash, run.fixed_config(), run.facts["data"], run.changed]
    key.append(run.study)
    return json.dumps(key, sort_keys=True)


def pool_runs(runs):
    """The runs as a list of Pool, whatever their order."""
    runs, _ = without_repeats(runs)
    groups = {}
    for run in sorted(runs, key=lambda run: (run.architecture, run.seed, str(run.folder))):
        alone = None if run.finished else run.folder
        groups.setdefault((pool_key(run), alone), []).append(run)
    pools = [Pool(entry_name(group[0]), group) for group in groups.values()]
    plain = [pool for pool in pools if pool.first.study is None]
    for architecture in sorted({pool.name for pool in plain}):
        name_apart([pool for pool in plain if pool.name == architecture])
    for field in ("size", "name"):  # of several studies, or sizes, at once
        for pool in repeated_names(pools):
            if pool.first.study:
                pool.name += f", {pool.first.study[field]}"
    folders = [pool.first.folder.name for pool in pools]
    for pool in repeated_names(pools):
        folder = pool.first.folder
        pool.name += f" ({folder.name if folders.count(folder.name) == 1 else folder})"
    return pools


def entry_name(run):
    """What a pool of runs like this one is called: by its place in its study, or its architecture."""
    if run.study is None:
        return run.architecture
    if run.study["rate"] == 1:
        return run.study["entry"]
    return f"{run.study['entry']}, rate x{run.study['rate']:g}"


def repeated_names(pools):
    """The pools whose names others have, too."""
    names = [pool.name for pool in pools]
    return [pool for pool in pools if names.count(pool.name) > 1]


def telling_fields(pools):
    """The config fields that differ between pools."""
    configs = [pool.first.fixed_config() for pool in pools]
    fields = []
    for name in {name: None for config in configs for name in config}:
        if any(config.get(name) != configs[0].get(name) for config in configs):
            fields.append(name)
    if "recipe" in fields:  # it stands for the fields that it sets
        fields = [name for name in fields if name not in RECIPE_FIELDS]
    return fields


def name_apart(pools):
    """Adds to the names of pools of one architecture what differs between them, if that is little.

    Pools that still have one name get their folder's as well, see pool_runs.
    """
    fields = telling_fields(pools)
    if len(fields) > MOST_NAMED:
        return
    texts = {pool.first.script_hash for pool in pools}
    for pool in pools:
        config = pool.first.fixed_config()
        for field in fields:
            pool.name += f", {field} {config.get(field, 'absent')}"
        if len(texts) > 1 and is_edited(pool.first):
            pool.name += ", edited script"


# ----------------------------------------------------------------------------------------------------------
# The scripts as they are today


def load_script(name):
    """(the module of a script, "") or (None, why there is none)."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as missing:
        if missing.name == name:
            return None, "is not here"
        return None, f"can't be imported: the package {missing.name} is missing"
    except Exception as error:  # whatever a script that is being edited does
        return None, f"can't be imported: {type(error).__name__}: {error}"


def find_script(run):
    """The module of a run's script, or None if it isn't here."""
    return load_script(run.facts["script"])[0]


def is_edited(run):
    """Whether a run's script is known to be another text than today's."""
    script = find_script(run)
    if script is None or run.script_hash is None:
        return False
    return fineweb.script_hash(Path(script.__file__)) != run.script_hash
