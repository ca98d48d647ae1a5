"""
Does a difference hold on more text, and from document to document?

    python -m tools.documents log/llama-? log/rwkv-?
    python -m tools.documents log/*-? --json results/documents.json
                                         # the tables, later, and with others:
    python -m tools.documents results/documents.json log/mine-?

Scores each run's newest checkpoint on the validation text, up to --tokens of
it where training scored the first --val_tokens, and keeps the loss of each
document. Runs whose names differ in the seed at the end only are seeds of one
model.

All seeds are scored on the same documents, so an interval over seeds can't show
that a few of these decide. Here a difference has an interval over seeds, one
over documents (each counts by its length) and one over both, as their squares
add up; the verdicts go by that one, at 5%, with Holm's correction for the
pairs. The last column is the document that moves the difference most, and by
how much. The losses without other scripts leave out the documents of which
less than half of the characters are ASCII.
"""
import argparse
import copy
import dataclasses
import json
import os
import statistics
from pathlib import Path

import msgspec
import numpy as np
import torch

import fineweb
from tools import verdicts
from tools.export import check_script, load_model, open_data, read_checkpoint
from tools.page import table
from tools.runs import VARYING_FIELDS

TOKENS_AT_ONCE = 8192  # of a forward pass
LEAST_ASCII = 0.5  # of a document's characters, or it is of another script
LONG = 0.05  # of the text that training scored is much for one document
FEW = 100  # documents are few
DIGITS = 5  # kept of a document's loss


class Document(msgspec.Struct, forbid_unknown_fields=True):
    """What is known of a document; one that training scored in part only is two of them."""

    tokens: int
    ascii: float  # share of its characters
    scored: bool  # whether training scored it


def model_name(run, seed):
    """A run's name without the seed at its end."""
    return run.removesuffix(f"-{seed}")


class ScoredRun(msgspec.Struct, forbid_unknown_fields=True):
    """A run's losses."""

    run: str
    seed: int
    step: int
    losses: list[float]  # of each document, in nats per token

    @property
    def model(self):
        return model_name(self.run, self.seed)


class Scores(msgspec.Struct, forbid_unknown_fields=True):
    """Runs that were scored on the same documents, in the same windows."""

    data: str  # its fingerprint
    block_size: int
    documents: list[Document]
    runs: list[ScoredRun]


# ----------------------------------------------------------------------------------------------------------
# Scoring


def find_documents(targets, tokenizer, n_scored):
    """(the document of each token: (n,) int64, from 0; how many there are).

    targets: (n,) int64 in the order of the text. A document begins after an end-of-text, which counts to
    the one before. One that goes on behind the first n_scored tokens is two.
    """
    ends = targets == fineweb.VOCAB_SIZE[tokenizer] - 1  # the last id; this takes no vocabulary's files
    documents = np.cumsum(ends) - ends
    cut = np.arange(len(targets)) >= n_scored
    if 0 < n_scored < len(targets) and documents[n_scored - 1] == documents[n_scored]:
        documents = documents + cut
    return documents, int(documents[-1]) + 1


def describe_documents(targets, documents, tokenizer, n_scored):
    """The Document of each."""
    encoding = fineweb.get_tokenizer(tokenizer)
    found = []
    for tokens in np.split(targets, np.flatnonzero(np.diff(documents)) + 1):
        text = encoding.decode([token for token in tokens.tolist() if token < encoding.eot_token])
        share = sum(character.isascii() for character in text) / max(1, len(text))
        found.append(Document(len(tokens), round(share, 3), False))
    begins = 0
    for document in found:
        document.scored = begins < n_scored
        begins += document.tokens
    return found


@torch.no_grad()
def losses(model, rows, device):
    """The loss of each target of windows (n, T + 1), in their order: (n * T,)."""
    found = []
    parts = rows.split(max(1, TOKENS_AT_ONCE // rows.shape[1]))
    for part in fineweb.with_estimate(parts, "scoring a run", "--tokens makes it shorter"):
        part = part.to(device)
        _, loss = model(part[:, :-1], part[:, 1:], reduction="none")
        found.append(loss.reshape(-1).double().cpu())
    return torch.cat(found).numpy()


class Text:
    """The windows that runs are scored on, and their documents.

    Raises SystemExit, with one line, if the data are gone or other than those the first run was trained on.
    """

    def __init__(self, folder, config, checkpoint, most):
        data = open_data(folder, config, checkpoint)
        self.data = data["fingerprint"]
        self.block_size = config.block_size
        windows = fineweb.Windows(config.data_dir, "val", config.block_size)
        count = min(len(windows), max(1, most // config.block_size))
        n_scored = min(count, max(1, config.val_tokens // config.block_size)) * config.block_size
        self.rows = torch.from_numpy(windows.rows(np.arange(count)))
        targets = self.rows[:, 1:].flatten().numpy()
        self.of_token, self.n_documents = find_documents(targets, data["tokenizer"], n_scored)
        self.documents = describe_documents(targets, self.of_token, data["tokenizer"], n_scored)

    def by_document(self, of_tokens):
        """The mean of each document's figures: a list of n_documents floats."""
        sums = np.bincount(self.of_token, weights=of_tokens, minlength=self.n_documents)
        counts = np.bincount(self.of_token, minlength=self.n_documents)
        return [round(float(value), DIGITS) for value in sums / counts]


def check_together(folders):
    """Raises SystemExit, with one line, unless runs can be scored on one text and named seeds are seeds.

    So nothing is scored before all are known to be fit for it.
    """
    first = None
    seeds_of = {}  # model -> (a folder, what must be the same in its other seeds)
    for folder in folders:
        script, config, checkpoint = read_checkpoint(folder)
        check_script(folder, script, checkpoint["script_hash"])
        text = {"data": checkpoint["data"]["fingerprint"]}
        text |= {name: getattr(config, name) for name in ("block_size", "val_tokens")}
        first = first or text
        for what, here in text.items():
            if here != first[what]:
                fineweb.fail(f"{folder} has other {what} than the runs before it, {here} and not "
                             f"{first[what]}: give runs with the same")  # fmt: skip
        same = {name: value for name, value in checkpoint["config"].items() if name not in VARYING_FIELDS}
        same |= {"seed": None, "script": checkpoint["script_hash"], "step": checkpoint["step"]}
        model = model_name(folder.name, config.seed)
        other, wanted = seeds_of.setdefault(model, (folder, same))
        differing = [name for name in same if same[name] != wanted.get(name)]
        if differing == ["step"]:
            fineweb.fail(f"{folder} is at step {same['step']:,}, {other} at {wanted['step']:,}: "
                         "give runs that have come as far")  # fmt: skip
        if differing:
            fineweb.fail(f"{folder} is no other seed of {other}: {', '.join(differing)} differ. "
                         "Rename its folder")  # fmt: skip


def score(folders, most, device, like=None):
    """The Scores of runs, in the order of their folders, with a line for each.

    Raises SystemExit before the first is scored if they can't be put together, or with the Scores `like`.
    """
    check_together(folders)
    text = None
    runs = []
    for folder in folders:
        script, config, checkpoint = read_checkpoint(folder)
        if text is None:
            text = Text(folder, config, checkpoint, most)
            check_same(like or text, text)
        model = load_model(script, config, checkpoint, device)
        found = text.by_document(losses(model, text.rows, device))
        runs.append(ScoredRun(folder.name, config.seed, checkpoint["step"], found))
        print(f"{folder}: {mean_loss(runs[-1], text.documents):.4f}", flush=True)
    return Scores(text.data, text.block_size, text.documents, runs)


# ----------------------------------------------------------------------------------------------------------
# What they say


def weights(documents, use=lambda document: True):
    """The tokens of each document, 0 of those that are not used: (n,)."""
    return np.array([document.tokens if use(document) else 0 for document in documents], dtype=np.float64)


def is_ours(document):
    """Whether it is of the Latin script, by and large."""
    return document.ascii >= LEAST_ASCII


def weighted(values, weight):
    """The mean of values by document, each weighted by its length; None if no document is used."""
    return float(weight @ values / weight.sum()) if weight.any() else None


def mean_loss(run, documents):
    return weighted(np.array(run.losses), weights(documents))


def models_of(runs):
    """{model: {seed: its losses by document, (n,)}}, the lowest seed first."""
    found = {}
    for run in sorted(runs, key=lambda run: (run.model, run.seed)):
        found.setdefault(run.model, {})[run.seed] = np.array(run.losses)
    return found


def over_documents(values, weight):
    """(squared standard error, degrees of freedom) of a mean of documents weighted by their lengths.

    By the jackknife (Tukey, 1958), with as many degrees of freedom as there'd be with so many documents of
    one length (Kish, 1965): where a few long ones count most, the plain error is too small. None with
    fewer than two documents.
    """
    used = weight > 0
    n = int(used.sum())
    if n < 2:
        return None
    away = without_each(values, weight)[used] - weighted(values, weight)
    freedom = weight.sum() ** 2 / (weight**2).sum() - 1
    return float((n - 1) / n * (away**2).sum()), float(freedom)


def without_each(values, weight):
    """The weighted mean without each of the values in turn: (n,)."""
    return (weight @ values - weight * values) / (weight.sum() - weight)


class Pair:
    """The difference of two models, a minus b, over the seeds that both have."""

    def __init__(self, a, b, ours, theirs, documents):
        self.a = a
        self.b = b
        self.seeds = sorted(ours.keys() & theirs.keys())
        seeds = self.seeds or [None]
        by_seed = [of_seed(ours, seed) - of_seed(theirs, seed) for seed in seeds]  # (n documents,) each
        by_document = np.mean(by_seed, axis=0)
        weight = weights(documents)
        self.difference = weighted(by_document, weight)
        self.in_script = weighted(by_document, weights(documents, is_ours))
        self.of_seeds = None
        if len(self.seeds) > 1:
            self.of_seeds = verdicts.squared_error([weighted(values, weight) for values in by_seed])
        self.of_documents = over_documents(by_document, weight)
        self.p = None
        parts = [self.of_seeds, self.of_documents]
        self.both = verdicts.estimate(self.difference, parts, "both") if None not in parts else None
        self.mover, self.moved = self.most_moving(by_document, weight)

    def turned(self):
        """The same pair as b minus a."""
        other = copy.copy(self)
        other.a, other.b = self.b, self.a
        other.difference = -self.difference
        other.in_script = None if self.in_script is None else -self.in_script
        other.moved = -self.moved
        if self.both:
            other.both = dataclasses.replace(self.both, difference=other.difference)
        return other

    def most_moving(self, values, weight):
        """(the number of the document that moves the difference most, from 0, by how much)."""
        if (weight > 0).sum() < 2:
            return 0, 0.0
        moved = self.difference - without_each(values, weight)
        number = int(np.abs(moved).argmax())
        return number, float(moved[number])

    @property
    def verdict(self):
        """What the loss of a is, compared with b's, after `p` was corrected."""
        if self.p is None:
            return verdicts.ONE_SEED if len(self.seeds) == 1 else "not tested"
        if self.p >= verdicts.LEVEL:
            return verdicts.UNTOLD
        return verdicts.BETTER if self.difference < 0 else verdicts.WORSE


def of_seed(by_seed, seed):
    """A model's losses by document with a seed, the mean over its seeds where that is None."""
    return np.mean(list(by_seed.values()), axis=0) if seed is None else by_seed[seed]


def compare(scores):
    """The Pairs of all models, those with the lowest loss first, p-values by Holm."""
    models = models_of(scores.runs)
    weight = weights(scores.documents)
    order = sorted(models, key=lambda name: weighted(of_seed(models[name], None), weight))
    pairs = []
    for i, a in enumerate(order):
        for b in order[i + 1 :]:
            pairs.append(Pair(a, b, models[a], models[b], scores.documents))
    tested = [pair for pair in pairs if pair.both]
    for pair, p in zip(tested, verdicts.holm([pair.both.p for pair in tested]), strict=True):
        pair.p = p
    return pairs


# ----------------------------------------------------------------------------------------------------------
# In words and tables


def counted_tokens(lengths):
    """Documents of so many tokens in words, and whether they're enough: (text, bool)."""
    share = max(lengths) / sum(lengths)
    text = f"{sum(lengths):,} tokens of {counted(len(lengths))}, the longest {share:.1%} of them"
    return text, share <= LONG and len(lengths) >= FEW


def in_words(documents):
    """The text in two sentences or three; doubts about what training scored stand at the end."""
    others = [document for document in documents if not is_ours(document)]
    scored, enough = counted_tokens([document.tokens for document in documents if document.scored])
    text = f"{sum(document.tokens for document in documents):,} tokens of {counted(len(documents))}"
    text += f", {len(others)} of them of other scripts" if others else ""
    text += f". Training scored {scored}."
    if not enough:
        text += (" So few documents, or one so long, can decide a small difference in what training "
                 "scored: go by the tables below.")  # fmt: skip
    return text


def doubt(config, tokenizer):
    """A line on the text that runs of a Config are validated on, empty if it is good enough."""
    windows = fineweb.Windows(config.data_dir, "val", config.block_size, max_tokens=config.val_tokens)
    targets = windows.rows(np.arange(len(windows)))[:, 1:].flatten()
    of_token, _ = find_documents(targets, tokenizer, len(targets))
    text, enough = counted_tokens(np.bincount(of_token).tolist())
    if enough:
        return ""
    return (f"{config.data_dir}: runs are validated on {text}. A few documents can decide a small "
            "difference: after the runs see python -m tools.documents log/…")  # fmt: skip


def counted(n):
    return "1 document" if n == 1 else f"{n:,} documents"


def mean_cell(by_seed, weight):
    """The mean loss over seeds and documents with its interval over seeds."""
    if not weight.any():
        return "–"
    values = [weighted(losses, weight) for losses in by_seed.values()]
    half = verdicts.half_interval(values)
    return f"{statistics.mean(values):.4f}" + ("" if half is None else f" ± {half:.4f}")


def shared_start(names):
    """What all names begin with up to a hyphen, as "architectures-0.25M-"; empty if there is only one."""
    start = os.path.commonprefix(list(names)) if len(names) > 1 else ""
    return start[: start.rfind("-") + 1]


def models_table(scores):
    """Each model's loss on all the text and on parts of it, the best first."""
    models = models_of(scores.runs)
    start = shared_start(models)
    parts = {
        "loss": weights(scores.documents),
        "what training scored": weights(scores.documents, lambda document: document.scored),
        "the rest": weights(scores.documents, lambda document: not document.scored),
        "without other scripts": weights(scores.documents, is_ours),
    }
    rows = []
    for name, by_seed in models.items():
        cells = [mean_cell(by_seed, weight) for weight in parts.values()]
        step = next(run.step for run in scores.runs if run.model == name)
        rows.append([name.removeprefix(start), *cells, str(len(by_seed)), f"{step:,}"])
    rows.sort(key=lambda row: float(row[1].split(" ")[0]))
    head = [f"{start}…" if start else "", *parts, "seeds", "step"]
    return table(head, rows, ["---"] + ["--:"] * (len(parts) + 2))


def half_cell(part):
    return "–" if part is None else f"{verdicts.half_width([part], verdicts.LEVEL):.4f}"


def pairs_table(pairs):
    """The differences of all pairs, a row each."""
    start = shared_start({name for pair in pairs for name in (pair.a, pair.b)})
    rows = []
    for pair in pairs:
        both = "–" if pair.both is None else f"{pair.both.half:.4f}"
        p = "–" if pair.p is None else f"{pair.p:.3g}"
        other = "–" if pair.in_script is None else f"{pair.in_script:+.4f}"
        moved = f"{pair.moved:+.4f} by number {pair.mover + 1}"
        halves = [half_cell(pair.of_seeds), half_cell(pair.of_documents), both]
        name = f"{pair.a.removeprefix(start)} minus {pair.b.removeprefix(start)}"
        rows.append([name, f"{pair.difference:+.4f}", *halves, pair.verdict, p, other, moved])
    head = ["", "difference", "± over seeds", "± over documents", "± both", "verdict", "p, corrected"]
    head += ["without other scripts", "moved most"]
    return table(head, rows, ["---", "--:", "--:", "--:", "--:", "---", "--:", "--:", "--:"])


def report(scores):
    """The text, the models and their pairs as Markdown."""
    parts = [in_words(scores.documents) + "\n", models_table(scores)]
    pairs = compare(scores)
    if pairs:
        parts.append(pairs_table(pairs))
    return "\n".join(parts)


# ----------------------------------------------------------------------------------------------------------
# Files


def read(path):
    """The Scores in a file. Raises SystemExit, with one line, if it can't be read."""
    try:
        scores = msgspec.json.decode(path.read_bytes(), type=Scores)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        fineweb.fail(f"{path} can't be read: {getattr(error, 'strerror', None) or error}")
    if any(len(run.losses) != len(scores.documents) for run in scores.runs):
        fineweb.fail(f"{path} can't be read: a run has not a loss for each document")
    return scores


def write(path, scores):
    """Writes Scores, a document and a run to the line."""
    kept = msgspec.to_builtins(scores)
    blocks = []
    for name in ("documents", "runs"):
        lines = ",\n".join(json.dumps(each, separators=(",", ":")) for each in kept.pop(name))
        blocks.append(f'"{name}": [\n{lines}\n]')
    first = [f'"{name}": {json.dumps(value)}' for name, value in kept.items()]
    text = "{" + ", ".join([*first, *blocks]) + "}\n"
    fineweb.make_folder(path.parent)
    fineweb.write_atomic(path, lambda file: file.write(text.encode()))


def check_same(first, other):
    """Raises SystemExit unless two Scores, or Texts, are of the same documents in the same windows."""
    ours = first.data, first.block_size, first.documents
    if ours != (other.data, other.block_size, other.documents):
        fineweb.fail("these runs were not scored on the same documents: "
                     "score all with the same data, windows, --val_tokens and --tokens")  # fmt: skip


def together(all_scores):
    """Several Scores as one; of a run that is in two the later counts.

    Raises SystemExit if they are of other texts, or seeds of one model of other steps.
    """
    first, *others = all_scores
    runs = {run.run: run for run in first.runs}
    for other in others:
        check_same(first, other)
        runs |= {run.run: run for run in other.runs}
    steps = {}
    for run in runs.values():
        if steps.setdefault(run.model, run.step) != run.step:
            fineweb.fail(f"{run.run} is at step {run.step:,}, another seed of {run.model} at "
                         f"{steps[run.model]:,}: give runs that have come as far")  # fmt: skip
    return Scores(first.data, first.block_size, first.documents, list(runs.values()))


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    name = "python -m tools.documents"
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=as_written)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, and files of --json")
    parser.add_argument("--tokens", type=fineweb.positive, default=1 << 20, metavar="N",
                        help="of the validation text at most [1,048,576]")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the losses there")
    args = fineweb.parse_strictly(parser)
    fineweb.refuse_folder("--json", args.json)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = [path for path in args.runs if path.is_file()]
    folders = [path for path in args.runs if not path.is_file()]
    found = [read(path) for path in files]
    if folders:
        found.append(score(folders, args.tokens, device, *found[:1]))
    scores = together(found)
    if args.json:
        write(args.json, scores)
    print(report(scores), end="")


if __name__ == "__main__":
    main()
