"""
What is behind a model's loss? Its newest checkpoint on the validation text.

    python -m tools.probe documents log/llama-? log/rwkv-?   # by document
    python -m tools.probe position log/llama-1 log/rwkv-1    # by position
    python -m tools.probe context log/llama-1 log/rwkv-1     # with less text
    python -m tools.probe recall log/llama-1 log/rwkv-1      # of what was there
    python -m tools.probe ngrams --data_dir data/bytes       # of a table

A run is loaded by its folder's copy of its script. ± is half of a 95% interval.
"""
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

import fineweb
from fineweb import fail
from tools.common import load_script, make_folder, parse, short, table
from tools.compare import comparison, plots, stats

TOKENS_AT_ONCE = 8192  # of a forward pass
REPEATED = 32  # random tokens of the text, which come twice
Runs = tyro.conf.Positional[tuple[Path, ...]]


@dataclasses.dataclass
class Documents:
    """The loss by document. Runs whose names differ in the seed at the end only are seeds of one model.

    An interval over seeds can't show what a few documents decide, so a difference has one over documents as
    well, and verdicts go by both, as their squares add up, with Holm's correction.
    """

    runs: Runs  # folders of runs
    tokens: int = 1 << 20  # of the validation text, more than training scored
    json: Path | None = None  # write the losses there


@dataclasses.dataclass
class Position:
    """The loss by position in the context: at the start of a window a model has little to go by."""

    runs: Runs  # folders of runs, as log/gpt2
    windows: int = 512  # of the validation text, spread over all of it
    json: Path | None = None  # write it there too


@dataclasses.dataclass
class Context(Position):
    """What is lost in the second half of each window with at most 2, 4, 8 … tokens to go by."""

    png: Path | None = None  # draw the losses themselves there


@dataclasses.dataclass
class Recall(Position):
    """The loss of tokens that come after the same token as before, again, and anew; does a model copy?

    As Arora et al., 2023, "Zoology", who leave out the pairs that are frequent in training.
    """


@dataclasses.dataclass
class Ngrams:
    """The loss of tables of n-grams that were counted in the very batches that a run sees.

    A model is worth its name only where it beats them. They are interpolated by Witten and Bell's rule
    (Bell, Cleary and Witten, Text Compression, 1990, method C): P(w | h) = (c(hw) + t(h) P(w | h')) /
    (c(h) + t(h)), where c counts, t(h) is the number of different tokens after the history h, and h' is h
    without its oldest token; before all a uniform guess.
    """

    data_dir: str = fineweb.SAMPLE  # folder of token shards
    largest: int = 6  # the longest n-gram
    steps: int = 4000  # of the run
    batch_tokens: int = 2048  # of a step
    block_size: int = 256  # of the run
    windows: int = 1024  # of the validation text, spread over all of it
    seed: int = 1  # of the run


def load_run(folder):
    """(a checkpoint, or a run's newest one, its Config, its Model). SystemExit if it can't be loaded."""
    paths = [folder] if folder.is_file() else sorted(folder.glob("step_*.pt"))
    if not paths:
        fail(f"{folder} holds no checkpoint: give the folder of a run, as log/gpt2")
    checkpoint = torch.load(paths[-1], map_location="cpu", weights_only=True)
    script, why = load_script(checkpoint["script"], paths[-1].parent)
    if script is None:
        fail(f"{folder} was made by {checkpoint['script']}.py, which {why}")
    try:
        config = script.Config(**checkpoint["config"])
        model = script.Model(config)
        model.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError) as error:
        fail(f"{folder} is of another version of {checkpoint['script']}.py: {str(error).splitlines()[0]}")
    data = fineweb.open_dataset(config.data_dir, config.vocab_size, config.train_shards)
    if data["fingerprint"] != checkpoint["data"]["fingerprint"]:
        fail(f"{folder} was trained on other data than there are now in {config.data_dir}")
    return checkpoint, config, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def read_windows(data_dir, block_size, most, spread=True):
    """Windows of the validation text, spread over all of it, or the first: (n, T + 1) int64 tensor."""
    windows = fineweb.Windows(data_dir, "val", block_size)
    n = min(len(windows), max(1, most))
    return torch.from_numpy(windows.rows(np.arange(n) * (len(windows) // n if spread else 1)))


@torch.no_grad()
def losses(model, rows):
    """The loss of each target of windows (n, T + 1), in nats: (n, T) float64."""
    found = []
    for part in rows.split(max(1, TOKENS_AT_ONCE // rows.shape[1])):
        part = part.to(next(model.parameters()).device)
        logits, _ = model(part[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="none")
        found.append(loss.reshape(len(part), -1).double().cpu())
    return torch.cat(found).numpy()


def mean_and_half(values):
    return [float(values.mean()), stats.half_interval(values)]


def write_json(path, found):
    if path:
        make_folder(path.parent)
        fineweb.write_atomic(path, lambda file: file.write((json.dumps(found) + "\n").encode()))


def by_position(each):
    """{"1 to 32": [mean loss, half of its interval over windows], …} of targets' losses (n, T)."""
    T = each.shape[1]
    ends = [0, *[32 * 4**power for power in range(10) if 32 * 4**power < T], T]
    found = {}
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        found[f"{start + 1} to {end}"] = mean_and_half(each[:, start:end].mean(axis=1))
    return found


def cut(rows, most):
    """The second half of windows (n, T + 1) in pieces (n T / most, most + 1), window by window.

    The last most / 2 tokens of all pieces together are the last T / 2 of all windows.
    """
    T = rows.shape[1] - 1
    starts = range(T // 2 - most // 2, T - most + 1, most // 2)
    return torch.stack([rows[:, start : start + most + 1] for start in starts], dim=1).flatten(0, 1)


def by_context(model, rows):
    """{"at most 4": [what is lost, half of its interval over windows], …, "all 256": [the loss, …]}."""
    T = rows.shape[1] - 1
    if T < 4 or T & (T - 1):
        fail(f"a context of {T} tokens is no power of two from 4 on")
    found = {}
    whole = losses(model, rows)[:, T // 2 :].mean(axis=1)
    for most in [2**power for power in range(1, T.bit_length() - 1)]:
        each = losses(model, cut(rows, most))[:, most // 2 :].mean(axis=1)
        found[f"at most {most}"] = mean_and_half(each.reshape(len(rows), -1).mean(axis=1) - whole)
    return found | {f"all {T}": mean_and_half(whole)}


def seen_before(row):
    """Which entries of an array (n,) have been there before: (n,) bool."""
    _, first, which = np.unique(row, return_index=True, return_inverse=True)
    return first[which] < np.arange(len(row))


def by_recall(each, rows):
    """{"pair seen": [mean loss, half of its interval], …} of targets' losses (n, T) in windows (n, T + 1)."""
    pair = np.array([seen_before(row) for row in n_grams(rows, 2, 1 << 16)])
    token = np.array([seen_before(row)[1:] for row in rows])
    found = {}
    for name, mask in {"pair seen": pair, "token seen": token & ~pair, "new": ~token}.items():
        some = mask.any(axis=1)
        weight = mask[some].sum(axis=1)
        values = (each * mask)[some].sum(axis=1) / weight
        found[name] = [weighted(values, weight), stats.half_width([over_documents(values, weight)])]
    return found


def by_repetition(model, rows, length):
    """{"gain by order": [mean, half of its interval], "chance in order": [mean, half]} of 64 repetitions.

    Random tokens of windows (n, T + 1) come again: how much lower the loss is in order than shuffled, and
    the probability of the right token in order. Olsson et al., 2022, find heads that copy in this way.
    """
    generator = torch.Generator().manual_seed(0)
    once = rows.flatten()[torch.randint(rows.numel(), (64, length), generator=generator)]
    shuffled = once[:, torch.randperm(length, generator=generator)]
    again = [losses(model, torch.cat((once, twice), dim=1))[:, length:] for twice in (once, shuffled)]
    each = {"gain by order": again[1] - again[0], "chance in order": np.exp(-again[0])}
    return {name: mean_and_half(values.mean(axis=1)) for name, values in each.items()}


def draw_context(path, found):
    """Writes a picture of what probe_windows has found of the context, a curve a run."""
    curves = {}
    for run in found:
        *lost, (whole, _) = run["losses"].values()
        means = [*(whole + more for more, _ in lost), whole]
        curves[run["run"]] = [(power, mean, 0.0) for power, mean in enumerate(means, 1)]
    make_folder(path.parent)
    title = "The loss with at most 2, 4, 8 … tokens to go by"
    with fineweb.one_line(f"{path} can't be written"):
        plots.draw_curves(path, title, "tokens to go by (log2)", "nats per token", curves)


def probe_windows(args):
    """Prints, for each run, what is to be known of its windows."""
    found = []
    for folder in args.runs:
        checkpoint, config, model = load_run(folder)
        rows = read_windows(config.data_dir, config.block_size, args.windows)
        if len(rows) < 2:
            fail(f"{folder}: one window gives no interval: --windows, or more text")
        facts = {"run": folder.name, "step": checkpoint["step"], "data": checkpoint["data"]["fingerprint"]}
        if isinstance(args, Context):
            measured = by_context(model, rows)
        elif isinstance(args, Recall):
            measured = by_recall(losses(model, rows), rows.numpy())
            measured |= by_repetition(model, rows, min(REPEATED, config.block_size // 2))
        else:
            measured = by_position(losses(model, rows))
        found.append(facts | {"windows": len(rows), "losses": measured})
    for head in dict.fromkeys(tuple(run["losses"]) for run in found):
        alike = [run for run in found if tuple(run["losses"]) == head]
        cells = [[f"{mean:.3f} ± {half:.3f}" for mean, half in run["losses"].values()] for run in alike]
        rows = [[run["run"], *each] for run, each in zip(alike, cells, strict=True)]
        print(table(["tokens", *head], rows))
    write_json(args.json, found)
    if isinstance(args, Context) and args.png:
        draw_context(args.png, found)


def score(folder, most):
    """The losses of a run by document, whose end counts to it: {data, block_size, documents, runs}."""
    checkpoint, config, model = load_run(folder)
    rows = read_windows(config.data_dir, config.block_size, most // config.block_size, spread=False)
    tokenizer = fineweb.get_tokenizer(checkpoint["data"]["tokenizer"], config.data_dir)
    ends = rows[:, 1:].flatten().numpy() == tokenizer.eot_token
    of_token = np.cumsum(ends) - ends
    counts = np.bincount(of_token)
    sums = np.bincount(of_token, weights=losses(model, rows).flatten())
    print(f"{folder}: {sums.sum() / counts.sum():.4f}", flush=True)
    run = {"run": folder.name, "seed": config.seed, "step": checkpoint["step"]}
    run["losses"] = [round(float(loss), 5) for loss in sums / counts]
    found = {"data": checkpoint["data"]["fingerprint"], "block_size": config.block_size, "runs": [run]}
    return found | {"documents": [{"tokens": int(n)} for n in counts]}


def together(all_scores):
    """Several scores as one. Raises SystemExit for scores of other texts."""
    texts = []
    for each in all_scores:
        lengths = [document["tokens"] for document in each["documents"]]
        texts.append((each["data"], each["block_size"], lengths))
    if texts.count(texts[0]) < len(texts):
        fail("these runs were not scored on the same documents: give all the same data and --tokens")
    return all_scores[0] | {"runs": [run for scores in all_scores for run in scores["runs"]]}


def weighted(values, weight):
    return float(weight @ values / weight.sum())


def over_documents(values, weight):
    """(squared standard error, degrees of freedom) of a weighted mean of two documents or more.

    By the jackknife (Tukey, 1958), with as many degrees of freedom as there'd be with so many documents of
    one length (Kish, 1965): where a few long ones count most, the plain error is too small.
    """
    without_each = (weight @ values - weight * values) / (weight.sum() - weight)
    away = without_each - weighted(values, weight)
    freedom = weight.sum() ** 2 / (weight**2).sum() - 1
    return float((len(values) - 1) / len(values) * (away**2).sum()), float(freedom)


def compare_documents(ours, theirs, weight):
    """(Estimate over both, half over seeds, half over documents) of {seed: losses by document (n,)} of two.

    The Estimate has no p, and there is no half over seeds, with fewer than two common seeds.
    """
    common = sorted(ours.keys() & theirs.keys())
    by_seed = [ours[seed] - theirs[seed] for seed in common]
    if not common:
        by_seed = [np.mean(list(ours.values()), axis=0) - np.mean(list(theirs.values()), axis=0)]
    values = np.mean(by_seed, axis=0)
    of_documents = over_documents(values, weight)
    if len(common) < 2:
        return stats.Estimate(weighted(values, weight)), None, stats.half_width([of_documents])
    of_seeds = stats.squared_error([weighted(each, weight) for each in by_seed])
    both = stats.estimate(weighted(values, weight), [of_seeds, of_documents], "both")
    return both, stats.half_width([of_seeds]), stats.half_width([of_documents])


def documents_tables(scores):
    """The models, best first, and their pairs, as two Markdown tables."""
    models = {}
    for run in scores["runs"]:
        model = run["run"].removesuffix(f"-{run['seed']}")
        models.setdefault(model, {})[run["seed"]] = np.array(run["losses"])
    tokens = np.array([document["tokens"] for document in scores["documents"]], dtype=float)
    means = {name: np.mean(list(by_seed.values()), axis=0) for name, by_seed in models.items()}
    order = sorted(models, key=lambda name: weighted(means[name], tokens))
    rows = [[name, f"{weighted(means[name], tokens):.4f}", str(len(models[name]))] for name in order]
    text = table(["", "loss", "seeds"], rows)
    pairs = comparison.all_pairs(order)
    found = [compare_documents(models[a], models[b], tokens) for a, b in pairs]
    corrected = stats.holm([both.p for both, *_ in found])
    rows = []
    for (a, b), (both, *halves), p in zip(pairs, found, corrected, strict=True):
        verdict = "no verdict" if p is None else "significant" if p < stats.LEVEL else "not significant"
        cells = ["–" if half is None else f"{half:.4f}" for half in (*halves, both.half)]
        cells += ["–" if p is None else f"{p:.3g}", verdict]
        rows.append([f"{a} – {b}", f"{both.difference:+.4f}", *cells])
    head = ["pair", "difference", "± over seeds", "± over documents", "± both", "p, corrected", "verdict"]
    return text + "\n" + table(head, rows)


def probe_documents(args):
    scores = together([score(folder, args.tokens) for folder in args.runs])
    write_json(args.json, scores)
    lengths = [document["tokens"] for document in scores["documents"]]
    if len(lengths) < 2:
        fail("this text is one document: --tokens takes more of it")
    longest = max(lengths) / sum(lengths)
    print(f"{sum(lengths):,} tokens of {len(lengths)} documents, the longest {longest:.1%}\n")
    print(documents_tables(scores), end="")


def n_grams(rows, n, vocab_size):
    """A number for each n tokens in a row: (rows, T) int64 to (rows, T - n + 1) int64."""
    windows = np.lib.stride_tricks.sliding_window_view(rows, n, axis=1)
    return windows @ vocab_size ** np.arange(n - 1, -1, -1)


def ngram_losses(train, val, vocab_size, largest):
    """What n-grams up to 1, 2, … largest tokens long get on all tokens of val but a row's first.

    Returns [the targets' losses (rows, T)] and [how many different n-grams there are, up to that length].
    train, val: (rows, T + 1) int64, as fineweb.Windows has them; nothing is counted across rows.
    """
    chance = np.full((len(val), val.shape[1] - 1), 1 / vocab_size)  # of each token but the first
    found = []
    entries = []
    for n in range(1, largest + 1):
        keys, counts = np.unique(n_grams(train, n, vocab_size), return_counts=True)
        histories, first = np.unique(keys // vocab_size, return_index=True)
        totals = np.add.reduceat(counts, first)
        kinds = np.diff(np.append(first, len(keys)))
        # a row's tokens that have n - 1 others before them; of single tokens the first is no target
        asked = n_grams(val, n, vocab_size)[:, 1 if n == 1 else 0 :]
        target = chance[:, max(0, n - 2) :]
        history = np.minimum(np.searchsorted(histories, asked // vocab_size), len(histories) - 1)
        place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
        count = np.where(keys[place] == asked, counts[place], 0)
        better = (count + kinds[history] * target) / (totals[history] + kinds[history])
        target[:] = np.where(histories[history] == asked // vocab_size, better, target)
        found.append(-np.log(chance))
        entries.append(len(keys) + (entries[-1] if entries else 0))
    return found, entries


def probe_ngrams(args):
    data = fineweb.open_dataset(args.data_dir)
    if args.largest > args.block_size or args.largest * math.log2(data["vocab_size"]) > 63:
        fail(f"--largest {args.largest} is too long for this vocabulary, or this --block_size")
    windows = fineweb.Windows(args.data_dir, "train", args.block_size)
    loader = fineweb.Loader(windows, args.batch_tokens // args.block_size, args.seed, max_steps=args.steps)
    ids = np.concatenate([loader.ids(step) for step in range(args.steps)])
    val = read_windows(args.data_dir, args.block_size, args.windows).numpy()
    found, entries = ngram_losses(windows.rows(ids), val, data["vocab_size"], args.largest)
    rows = []
    for n, each in enumerate(found):
        split = by_recall(each, val)
        means = [each.mean(), *(mean for mean, _ in split.values())]
        rows.append([str(n + 1), short(entries[n]), *(f"{mean:.4f}" for mean in means)])
    print(table(["tokens, with the one to guess", "entries", "validation loss", *split], rows), end="")


def main():
    args = parse(Documents | Position | Context | Recall | Ngrams, "tools.probe", __doc__)
    for path in (getattr(args, "json", None), getattr(args, "png", None)):
        if path and path.is_dir():
            fail(f"{path} is a folder: name a file in it")
    if isinstance(args, Documents):
        probe_documents(args)
    elif isinstance(args, Ngrams):
        probe_ngrams(args)
    else:
        probe_windows(args)


if __name__ == "__main__":
    main()
