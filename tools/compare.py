"""
Which architecture is better, by how much, and is it real?

    python -m tools.compare log/*     # -> report/: leaderboard.md, index.html, pictures
    python -m tools.compare log/* --save_reference results/x.jsonl    # the band of these runs
    python -m tools.compare log/mine --against results/x.jsonl        # is my curve inside it?

Reads each run's log.jsonl and its predictions item by item. Runs that differ in the seed only are pooled.
Only runs that saw the same tokens in the same windows, were validated on the same ones and trained by the
same recipe are ranked together; the others get a table of their own, with the reason. An unfinished run is
shown, but not ranked.

Differences of validation losses have Welch's 95% t interval where there are several seeds. Differences
of accuracies are tested item by item: by the exact McNemar test, or where seeds are pooled by a sign test
on each item's share of right answers. p-values have Holm's correction for the number of pairs.
"""
import argparse
import base64
import dataclasses
import importlib
import json
import math
import statistics
import string
from pathlib import Path

import fineweb
from tools.models import count_parameters
from tools.pictures import draw

BUDGET = 124_475_904
RECIPE_FIELDS = (
    "max_lr", "min_lr", "warmup_steps", "weight_decay", "beta1", "beta2", "adam_eps", "grad_clip",
)  # fmt: skip
CONDITION_FIELDS = ("max_steps", "batch_tokens", "val_tokens", "block_size", "train_shards", "seed", "recipe")
# what may differ between runs that are pooled
VARYING_FIELDS = (
    "seed", "run_name", "data_dir", "hellaswag", "device", "micro_batch", "compile", "log_every", "prompt",
    "sample_tokens",
)  # fmt: skip
# Logs from before these fields were renamed, such as results/demo's: {script: {old name: today's}}
RENAMED_FIELDS = {
    "train_deepseek": {"expert_width": "n_inner_expert", "dense_width": "n_inner"},
    "train_rwkv": {"n_ffn": "n_inner"},
}


# ----------------------------------------------------------------------------------------------------------
# Reading runs


class Unreadable(Exception):
    """A run that has to be left out; says why."""


@dataclasses.dataclass
class Run:
    """One run's log: the facts of its last start that trained, and the latest that it logged of each step."""

    folder: Path
    facts: dict
    changed: list  # conditions that were not the same from its first step to its last
    train: dict
    val: dict
    scores: dict  # (task, convention) -> {step: result}
    right: dict  # (task, convention) -> list of bool per item, of the newest score

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
    def architecture(self):
        return self.facts["script"].removeprefix("train_")

    def newest_score(self, key):
        return self.scores[key][max(self.scores[key])]


def require(fields, *names):
    """Raises KeyError if a dict lacks one of the names."""
    for name in names:
        if name not in fields:
            raise KeyError(name)


class Log:
    """The events of a log.jsonl, sorted by kind."""

    def __init__(self):
        self.starts = []  # the run events: one each time that the script was started
        self.trained = set()  # numbers of the starts that took a step
        self.train = {}  # step -> event
        self.val = []  # (the start it was in, step, loss)
        self.scores = {}  # (task, convention) -> {step: event}

    def add(self, event):
        """Raises KeyError, TypeError, ValueError or IndexError for what is no event of a run."""
        kind = event["event"]
        if kind == "run":
            require(event, "script", "processes", "parameters", "flops_per_token")
            require(event["data"], "fingerprint", "tokenizer")
            require(event["config"], *RECIPE_FIELDS, *CONDITION_FIELDS)
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


def read_predictions(folder, key):
    """Which items a run got right in its newest score, or None if its predictions can't be read."""
    task, convention = key
    try:
        saved = json.loads((folder / f"{task}_{convention}.json").read_text(encoding="utf-8"))
        pairs = zip(saved["predictions_norm"], saved["labels"], strict=True)
        return [prediction == label for prediction, label in pairs]
    except (OSError, ValueError, KeyError):
        return None  # then there is no test on the items, and the report says so


def read_run(folder):
    """The Run in a folder. Raises Unreadable for a folder without a log, or with one that is no run's."""
    folder = Path(folder)
    path = folder / "log.jsonl"
    if not path.is_file():
        raise Unreadable("has no log.jsonl")
    log = read_log(path)
    training = [log.starts[i] for i in sorted(log.trained)] or log.starts[-1:]
    facts = training[-1]  # a later --eval may have had other options or processes
    fixed = fixed_conditions(facts)
    changed = set()
    for start in training:
        changed |= {name for name, value in fixed_conditions(start).items() if value != fixed.get(name)}
    val = {}
    for start, step, loss in log.val:
        here = fixed_conditions(start)
        if (here["val_tokens"], here["fingerprint"]) == (fixed["val_tokens"], fixed["fingerprint"]):
            val[step] = loss
    if not val:
        raise Unreadable("it was not validated even once")
    right = {}
    for key in log.scores:
        answers = read_predictions(folder, key)
        if answers is not None:
            right[key] = answers
    return Run(folder, facts, sorted(changed), log.train, val, log.scores, right)


@dataclasses.dataclass
class Pool:
    """Runs of one architecture and config that differ in the seed only, or one unfinished run."""

    name: str
    runs: list

    @property
    def first(self):
        return self.runs[0]

    @property
    def finished(self):
        return self.first.finished

    def losses(self):
        return [run.val[run.steps] for run in self.runs]

    def loss(self):
        return statistics.mean(self.losses())

    def items(self, key):
        """How many items a score has."""
        return self.first.newest_score(key)["n"]

    def accuracy(self, key):
        """(mean acc_norm over the seeds, standard error over the items), None if not all were scored."""
        if not all(key in run.scores for run in self.runs):
            return None
        mean = statistics.mean(run.newest_score(key)["acc_norm"] for run in self.runs)
        return mean, math.sqrt(mean * (1 - mean) / self.items(key))

    def curve(self, of):
        """[(step, mean)] over the seeds of {step: value}, at the steps that all of them have."""
        curves = [of(run) for run in self.runs]
        steps = set.intersection(*map(set, curves))
        return [(step, statistics.mean(curve[step] for curve in curves)) for step in sorted(steps)]


def pool_runs(runs):
    """The runs as a list of Pool."""
    groups = {}
    for run in runs:
        same = {name: value for name, value in run.config.items() if name not in VARYING_FIELDS}
        alone = None if run.finished else str(run.folder)
        key = [run.facts["script"], same, run.facts["data"], run.changed, alone]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(run)
    names = [group[0].architecture for group in groups.values()]
    pools = []
    for name, group in zip(names, groups.values()):
        if names.count(name) > 1:
            name = f"{name} ({group[0].folder.name})"
        pools.append(Pool(name, group))
    return pools


# ----------------------------------------------------------------------------------------------------------
# Is it fair?


def find_script(run):
    """The module of a run's script, or None if it isn't here."""
    try:
        return importlib.import_module(run.facts["script"])
    except ImportError:
        return None


def conditions(pool):
    """What must be equal for two pools to be ranked together: {name: value}."""
    run = pool.first
    config = run.config
    recipe = {name: config[name] for name in RECIPE_FIELDS}
    script = find_script(run)
    if script and config["recipe"] == "paper":
        for name, value in script.RECIPE.items():
            if recipe.get(name) == value:
                recipe[name] = "the paper's"
    return {
        "tokens": config["max_steps"] * config["batch_tokens"],
        "data": run.facts["data"]["fingerprint"],
        "training shards": config["train_shards"],
        "tokenizer": run.facts["data"]["tokenizer"],
        "block_size": config["block_size"],
        "batch_tokens": config["batch_tokens"],
        "validation tokens": config["val_tokens"],
        "seeds": sorted({other.config["seed"] for other in pool.runs}) if pool.finished else None,
        "recipe": recipe,
        "changed": run.changed,
        "over the budget": run.facts["parameters"] > BUDGET,
    }


def unlike(pool, reference):
    """The reasons, in words, why a pool can't be ranked with another."""
    ours = conditions(pool)
    theirs = conditions(reference)
    reasons = []
    for name, value in ours.items():
        other = theirs[name]
        if name == "recipe":
            for field in RECIPE_FIELDS:
                pair = value[field], other[field]
                if pair[0] != pair[1] and "the paper's" not in pair:
                    reasons.append(f"{field} is {pair[0]:g}, not {pair[1]:g}")
        elif name == "over the budget":
            if value:
                parameters = pool.first.facts["parameters"]
                reasons.append(f"{parameters:,} parameters are over the budget of {BUDGET:,}")
        elif name == "changed":
            if value:
                reasons.append(f"{', '.join(value)} changed between its first step and its last")
        elif name == "seeds":
            if value and other and not set(value) & set(other):
                reasons.append(f"the order of the data is another (seed {value}, not {other})")
        elif value != other:
            reasons.append(f"{name}: {value}, not {other}")
    return reasons


def fair_groups(pools):
    """[(pools to be ranked together, why they are not in the first group)], the largest group first."""
    groups = []
    for pool in sorted(pools, key=lambda pool: not pool.finished):
        for group in groups:
            if not unlike(pool, group[0]) and not unlike(group[0], pool):
                group.append(pool)
                break
        else:
            groups.append([pool])
    groups.sort(key=lambda group: -sum(pool.finished for pool in group))
    main = groups[0]
    out = [(main, [])]
    for group in groups[1:]:
        reasons = unlike(group[0], main[0]) or unlike(main[0], group[0])
        out.append((group, reasons))
    return out


# ----------------------------------------------------------------------------------------------------------
# Is the difference real?


def sign_test(right_a, right_b):
    """Exact two-sided p-value that neither of two lists of shares of right answers, item by item, is better.

    With one run each this is the exact McNemar test: the items that just one got right are coin flips.
    """
    from scipy.stats import binomtest

    wins = sum(a > b for a, b in zip(right_a, right_b, strict=True))
    losses = sum(a < b for a, b in zip(right_a, right_b, strict=True))
    if wins + losses == 0:
        return 1.0
    return float(binomtest(wins, wins + losses).pvalue)


def holm(p_values):
    """Holm's correction: the p-values, each as if it had been the only one asked for."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    worst = 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected


def welch(a, b):
    """(mean of a - mean of b, half of its 95% interval, or None where a list has one value only)."""
    from scipy.stats import ttest_ind

    difference = statistics.mean(a) - statistics.mean(b)
    if min(len(a), len(b)) < 2:
        return difference, None
    if statistics.variance(a) + statistics.variance(b) == 0:
        return difference, 0.0
    interval = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return difference, float(interval.high - interval.low) / 2


def shares(pool, key):
    """Each item's share of right answers over the pool's seeds, or None if predictions are missing."""
    answers = [run.right.get(key) for run in pool.runs]
    if None in answers or len(set(map(len, answers))) != 1:
        return None
    return [statistics.mean(item) for item in zip(*answers)]


@dataclasses.dataclass
class Difference:
    """A pair of pools, a minus b."""

    a: Pool
    b: Pool
    loss: float
    loss_width: float | None  # half of the 95% interval; None with one seed
    accuracy: float | None  # None if one of them was not scored
    p: float | None = None  # of the accuracies, corrected; None without predictions

    def verdict(self):
        if self.p is None or self.accuracy is None:
            return "not tested"
        if self.p >= 0.05:
            return "not distinguishable"
        return "better" if self.accuracy > 0 else "worse"


def compare_pairs(pools, key):
    """A Difference for each pair of pools, accuracies by the score key."""
    differences = []
    tested = []
    p_values = []
    for i, a in enumerate(pools):
        for b in pools[i + 1 :]:
            accuracy = None
            if a.accuracy(key) and b.accuracy(key):
                accuracy = a.accuracy(key)[0] - b.accuracy(key)[0]
            loss, loss_width = welch(a.losses(), b.losses())
            difference = Difference(a, b, loss, loss_width, accuracy)
            differences.append(difference)
            ours = shares(a, key)
            theirs = shares(b, key)
            if ours and theirs and len(ours) == len(theirs):
                tested.append(difference)
                p_values.append(sign_test(ours, theirs))
    for difference, p in zip(tested, holm(p_values)):
        difference.p = p
    return differences


# ----------------------------------------------------------------------------------------------------------
# Tables


def active_parameters(run):
    """Parameters that work on one token: the log's figure, else today's model's of that shape, else None."""
    if "active_parameters" in run.facts:
        return run.facts["active_parameters"]
    script = find_script(run)
    if script is None:
        return None
    renamed = RENAMED_FIELDS.get(run.facts["script"], {})
    fields = {renamed.get(name, name): value for name, value in run.config.items()}
    try:
        total, active = count_parameters(script, script.Config(**fields))
    except (TypeError, SystemExit):  # fields that it hasn't got, or a shape that it doesn't take
        return None
    return active if total == run.facts["parameters"] else None


def table(head, rows, align=None):
    """A Markdown table: its header and rows as lists of str; align: "---" or "--:" for each column."""
    text = ""
    for cells in (head, align or ["---"] * len(head), *rows):
        text += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return text


def leaderboard(pools, keys):
    """The ranking as a Markdown table, with a column for each score of keys."""
    head = ["", "architecture", "parameters", "active", "training FLOPs", "tokens", "validation loss"]
    head += [f"{task} ({convention}) acc_norm" for task, convention in keys]
    head += ["tokens/s", "device-hours", "seeds"]
    rows = []
    for pool in sorted(pools, key=lambda pool: (not pool.finished, pool.loss())):
        rank = str(len(rows) + 1) if pool.finished else "–"
        rows.append([rank, *leaderboard_row(pool, keys)])
    return table(head, rows)


def leaderboard_row(pool, keys):
    run = pool.first
    tokens = run.steps * run.config["batch_tokens"]
    flops = 3 * run.facts["flops_per_token"] * tokens  # forward, and backward of twice the work
    active = active_parameters(run)

    name = pool.name
    if not pool.finished:
        name += f" (unfinished: step {run.steps} of {run.config['max_steps']})"
    loss = f"{pool.loss():.4f}"
    if len(pool.runs) > 1:
        loss += f" ± {statistics.stdev(pool.losses()):.4f}"
    accuracies = []
    for key in keys:
        accuracy = pool.accuracy(key)
        accuracies.append(f"{100 * accuracy[0]:.2f} ± {100 * accuracy[1]:.2f}" if accuracy else "–")

    times = []
    hours = []
    for other in pool.runs:
        events = other.train.values()
        times += [event["ms"] for event in events]
        hours.append(sum(event["ms"] * event["processes"] for event in events) / 3.6e6)
    speed = "–"
    if times:
        speed = f"{run.config['batch_tokens'] / statistics.median(times) * 1000:,.0f}"
    return [
        name,
        f"{run.facts['parameters']:,}",
        "–" if active is None else f"{active:,}",
        f"{flops:.2e}",
        f"{tokens:,}",
        loss,
        *accuracies,
        speed,
        f"{statistics.mean(hours):.3g}",
        str(len(pool.runs)),
    ]


def pairs_tables(pools, key):
    """Two Markdown tables: the pairs one by one, and the matrix of verdicts."""
    opposite = {"better": "worse", "worse": "better"}
    rows = []
    verdicts = {}
    for pair in compare_pairs(pools, key):
        loss = f"{pair.loss:+.4f}"
        loss += " (one seed: no interval)" if pair.loss_width is None else f" ± {pair.loss_width:.4f}"
        accuracy = "–" if pair.accuracy is None else f"{100 * pair.accuracy:+.2f}"
        p = "–" if pair.p is None else f"{pair.p:.3g}"
        verdict = pair.verdict()
        verdicts[pair.a.name, pair.b.name] = verdict
        verdicts[pair.b.name, pair.a.name] = opposite.get(verdict, verdict)
        rows.append([f"{pair.a.name} – {pair.b.name}", loss, accuracy, p, verdict])
    names = [pool.name for pool in pools]
    matrix = []
    for a in names:
        matrix.append([f"**{a}**", *[verdicts.get((a, b), "") for b in names]])
    title = f"{key[0]} ({key[1]}) acc_norm"
    head = ["pair", "validation loss, 95% interval", f"{title}, points", "p, corrected", "the first is"]
    return table(head, rows), table([f"by {title}", *names], matrix)


# ----------------------------------------------------------------------------------------------------------
# Reference bands


def next_run_interval(values):
    """Half-width of the 95% t interval for one more run's loss, given those of some."""
    from scipy.stats import t

    n = len(values)
    if n == 1:
        return 0.01 * values[0]  # one run says nothing about the spread; take one percent
    return float(t.ppf(0.975, n - 1)) * statistics.stdev(values) * math.sqrt(1 + 1 / n)


def save_reference(path, pools):
    """One line per validated step: the mean over the seeds and the band for one more run like them (95%)."""
    if len(pools) != 1 or not pools[0].finished:
        fineweb.fail("--save_reference needs finished runs of one config that differ in the seed only")
    (pool,) = pools
    content = ""
    steps = pool.curve(lambda run: run.val)
    for step, mean in steps:
        half = next_run_interval([run.val[step] for run in pool.runs])
        line = {
            "step": step,
            "loss": mean,
            "low": mean - half,
            "high": mean + half,
            "n": len(pool.runs),
            "script": pool.first.facts["script"],
            "conditions": conditions(pool),
        }
        content += json.dumps(line) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    fineweb.write_atomic(path, lambda f: f.write(content.encode()))
    print(f"{path}: the band of {len(pool.runs)} run(s) at {len(steps)} steps")


def read_reference(path):
    """({step: line}, its conditions with the script's name). Raises SystemExit for another file."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            require(line, "low", "loss", "high", "n")
        wanted = lines[0]["conditions"] | {"script": lines[0]["script"]}
        return {line["step"]: line for line in lines}, wanted
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        fineweb.fail(f"{path} is not a reference: make one by --save_reference")


def against(path, runs):
    """Says step by step whether runs are inside a reference band; returns how many were outside somewhere."""
    band, wanted = read_reference(path)
    outside = 0
    for run in runs:
        steps = sorted(run.val.keys() & band.keys())
        if not steps:
            fineweb.fail(f"{run.folder} and {path} have no validated step in common")
        its = conditions(Pool("", [run])) | {"script": run.facts["script"]}
        for name, value in wanted.items():
            if name != "seeds" and its[name] != value:
                print(f"note: {run.folder} has another {name} than the reference: {its[name]}, not {value}")
        rows = []
        inside = 0
        for step in steps:
            line = band[step]
            loss = run.val[step]
            fits = line["low"] <= loss <= line["high"]
            inside += fits
            limits = f"{line['low']:.4f} to {line['high']:.4f}"
            answer = "inside" if fits else "OUTSIDE"
            rows.append([str(step), f"{loss:.4f}", f"{line['loss']:.4f}", limits, answer])
        print(f"{run.folder} against {path} ({band[steps[-1]]['n']} runs)")
        print(table(["step", "loss", "reference", "band", ""], rows))
        print(f"inside at {inside} of {len(steps)} steps\n")
        outside += inside < len(steps)
    return outside


# ----------------------------------------------------------------------------------------------------------
# The report

PAGE = string.Template("""<!doctype html>
<meta charset="utf-8">
<title>NanoTitan report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px }
td, th { border: 1px solid #bbb; padding: .25em .6em; text-align: right }
td:nth-child(2), th { text-align: left }
img { max-width: 100%; margin: 1em 0 }
</style>
$body
""")


def make_page(markdown, folder, pictures):
    """The report as one HTML page that holds its pictures, files in the folder."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    for file in pictures:
        encoded = base64.b64encode((folder / file).read_bytes()).decode()
        body = body.replace(f'src="{file}"', f'src="data:image/png;base64,{encoded}"')
    return PAGE.substitute(body=body)


def group_report(group, keys):
    """The tables of pools that are ranked together, as Markdown paragraphs."""
    paragraphs = [leaderboard(group, keys)]
    for pool in group:
        recipe = conditions(pool)["recipe"]
        own = ", ".join(field for field, value in recipe.items() if value == "the paper's")
        if own:
            paragraphs.append(f"{pool.name} trains by its paper's recipe: {own} are its own "
                              "(`--recipe shared` for the common one).\n")  # fmt: skip
    finished = [pool for pool in group if pool.finished]
    if len(finished) > 1 and keys:
        paragraphs += pairs_tables(finished, keys[0])
    return paragraphs


def report(out, pools, left_out):
    """Writes the tables, pictures and page into a folder; returns the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    paragraphs = ["# Which is better, and is it real?\n"]
    pictures = []
    for number, (group, reasons) in enumerate(fair_groups(pools)):
        if number:
            paragraphs.append("## Not comparable with those above\n")
            paragraphs.append("Ranked apart, because " + "; ".join(reasons) + ".\n")
        keys = {key for pool in group for run in pool.runs for key in run.scores}
        keys = sorted(keys, key=lambda key: (key[0], key[1] != "nanogpt"))
        paragraphs += group_report(group, keys)
        for file, words in draw(out, group, keys, f"group{number + 1}_" if number else ""):
            paragraphs.append(f"![{words}]({file})\n")
            pictures.append(file)
    if left_out:
        paragraphs.append("## Left out\n")
        paragraphs.append(table(["run", "why"], [[str(folder), why] for folder, why in left_out]))
    markdown = "\n".join(paragraphs)
    (out / "leaderboard.md").write_text(markdown, encoding="utf-8")
    (out / "index.html").write_text(make_page(markdown, out, pictures), encoding="utf-8")
    return markdown


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, as log/*")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report: report")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with this band instead")
    parser.add_argument("--save_reference", type=Path, metavar="FILE", help="write the runs' band instead")
    args = fineweb.parse_strictly(parser)
    try:
        run_command(args)
    except ImportError as missing:
        fineweb.fail(f"the package {missing.name} is missing: pip install -r requirements.txt")


def run_command(args):
    runs = []
    left_out = []
    for folder in args.runs:
        try:
            runs.append(read_run(folder))
        except Unreadable as reason:
            left_out.append((folder, str(reason)))
            print(f"left out: {folder}: {reason}")
    if not runs:
        fineweb.fail("there is no run to compare: give folders like log/gpt2-tiny")
    if args.against:
        outside = against(args.against, runs)
        raise SystemExit(1 if outside or left_out else 0)
    pools = pool_runs(runs)
    if args.save_reference:
        save_reference(args.save_reference, pools)
    else:
        for line in report(args.out, pools, left_out).splitlines():
            if not line.startswith("!["):
                print(line)
        print(f"the page: {args.out}/index.html")
    if left_out:
        fineweb.fail(f"{len(left_out)} of {len(args.runs)} folders were left out, see above")


if __name__ == "__main__":
    main()
