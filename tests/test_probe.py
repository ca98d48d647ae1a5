"""Losses by document, by position, by context and of n-grams, where they are known."""
import dataclasses
import json
import math
import statistics
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, events, table_rows

import fineweb
import train_gpt2
from tools import probe
from tools.compare import stats
from tools.study import vary

# The logits of a token after k others are those of a fixed table, times 1 + 1 / (1 + k): so the loss depends
# on the last token and on how many there are before it.
SCRIPT = '''
import dataclasses
import torch

@dataclasses.dataclass
class Config:
    data_dir: str = ""
    vocab_size: int = 257
    block_size: int = 64
    val_tokens: int = 2048
    train_shards: int = 100
    seed: int = 1

class Model(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets=None):
        seen = torch.arange(idx.shape[1])[:, None]
        return self.wte(idx) * (1 + 1 / (1 + seen)), None
'''


@pytest.fixture
def made(tmp_path, sample):
    """made(name, seed, **fields of Config) -> the folder of a run on the sample, with random weights."""
    data = fineweb.open_dataset(sample, 257, 100)

    def make(name, seed=1, fingerprint=None, **fields):
        script = vary.load_text("train_tiny", SCRIPT)
        config = script.Config(data_dir=str(sample), seed=seed, **fields)
        torch.manual_seed(seed)
        of = data | {"fingerprint": fingerprint or data["fingerprint"]}
        folder = tmp_path / "log" / name
        folder.mkdir(parents=True)
        (folder / "step_000005.pt").write_text("nothing")  # an older one, which can't be read
        checkpoint = {"script": "train_tiny", "script_hash": "0", "step": 7, "data": of}
        checkpoint |= {"config": dataclasses.asdict(config), "model": script.Model(config).state_dict()}
        torch.save(checkpoint, folder / "step_000007.pt")
        (folder / "train_tiny.py").write_text(SCRIPT)
        return folder

    return make


def known_losses(folder, rows):
    """The losses (n, T) of windows by the table in a checkpoint, in numpy."""
    logits = torch.load(folder / "step_000007.pt", weights_only=True)["model"]["wte.weight"].double().numpy()
    inputs, targets = rows[:, :-1], rows[:, 1:]
    scaled = logits[inputs] * (1 + 1 / (1 + np.arange(inputs.shape[1])))[:, None]
    return np.log(np.exp(scaled).sum(-1)) - np.take_along_axis(scaled, targets[..., None], -1)[..., 0]


def windows(sample, count, block_size=64):
    every = fineweb.Windows(sample, "val", block_size)
    return every.rows(np.arange(count) * (len(every) // count))


def test_losses_by_position(run, made, sample, monkeypatch):
    monkeypatch.setattr(probe, "TOKENS_AT_ONCE", 200)  # several passes
    folder = made("tiny", block_size=256)
    status, said = run(probe, "position", folder, "--windows", 20, "--json", "out/position.json")
    (found,) = json.loads(Path("out/position.json").read_text())
    expected = known_losses(folder, windows(sample, 20, 256))
    assert status == 0 and list(found["losses"]) == ["1 to 32", "33 to 128", "129 to 256"]
    for name, (start, end) in zip(found["losses"], [(0, 32), (32, 128), (128, 256)], strict=True):
        of_windows = expected[:, start:end].mean(axis=1)
        half = 2.0930 * of_windows.std(ddof=1) / math.sqrt(20)
        assert found["losses"][name] == pytest.approx([of_windows.mean(), half], rel=1e-4)
    assert table_rows(said)["tiny"] == ["{:.3f} ± {:.3f}".format(*each) for each in found["losses"].values()]
    assert found["windows"] == 20 and found["step"] == 7


def test_the_same_tokens_are_guessed_with_each_length():
    rows = torch.arange(3 * 17).reshape(3, 17)
    for most in (2, 4, 8, 16):
        pieces = probe.cut(rows, most)
        assert pieces.shape == (3 * 16 // most, most + 1)
        assert torch.equal(pieces[:, most // 2 + 1 :].reshape(3, 8), rows[:, 9:])
        assert (pieces.diff(dim=1) == 1).all()  # neighbours in the text


def test_what_is_lost_with_less_text(run, made, sample):
    folder = made("tiny")
    folders = folder, made("short", block_size=16)
    status, said = run(probe, "context", *folders, "--windows", 9, "--json", "c.json", "--png", "new/c.png")
    found = json.loads(Path("c.json").read_text())[0]["losses"]
    assert status == 0 and list(found) == [*[f"at most {n}" for n in (2, 4, 8, 16, 32)], "all 64"]
    rows = windows(sample, 9)
    whole = known_losses(folder, rows)[:, 32:].mean(axis=1)
    assert found["all 64"][0] == pytest.approx(whole.mean(), rel=1e-5)
    pieces = probe.cut(torch.from_numpy(rows), 4).numpy()
    few = known_losses(folder, pieces)[:, 2:].reshape(9, -1).mean(axis=1)
    assert found["at most 4"][0] == pytest.approx((few - whole).mean(), rel=1e-4)
    assert said.count("| tokens |") == 2  # a table for each length
    assert Path("new/c.png").stat().st_size > 5000


def test_losses_of_what_a_window_has_had_before(run, made, sample):
    folder = made("tiny")
    status, said = run(probe, "recall", folder, "--windows", 9, "--json", "r.json")
    found = json.loads(Path("r.json").read_text())[0]["losses"]
    rows = windows(sample, 9)
    losses = {"pair seen": [], "token seen": [], "new": []}
    for row, of_row in zip(rows.tolist(), known_losses(folder, rows), strict=True):
        for at, loss in enumerate(of_row, 1):
            pairs = list(zip(row[: at - 1], row[1:at], strict=True))
            seen = "token seen" if row[at] in row[:at] else "new"
            losses["pair seen" if (row[at - 1], row[at]) in pairs else seen].append(loss)
    assert "gain by order" in said and 0 < found.pop("chance in order")[0] < 1 > found.pop("gain by order")[0]
    assert status == 0 and {name: mean for name, (mean, _) in found.items()} == pytest.approx(
        {name: statistics.mean(each) for name, each in losses.items()}, rel=1e-5)
    assert all(0 < half < 1 for _, half in found.values()) and "| pair seen |" in said


def test_what_copies_gains_by_the_order_of_what_comes_again():
    class Copier(torch.nn.Module):
        """Sure of the token after the last one's place before, if there is one."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(20.0))

        def forward(self, idx, targets=None):
            same = (idx[:, :, None] == idx[:, None, :]).tril(-1)  # (B, T, T)
            after = torch.nn.functional.one_hot(idx.roll(-1, 1), 1000).float()  # (B, T, V)
            return self.scale * (same / same.sum(-1, keepdim=True).clamp(min=1)).float() @ after, None

    text = torch.arange(1000).view(8, 125)
    (gain, half), (chance, _) = probe.by_repetition(Copier(), text, 32).values()
    assert gain > 0.9 * math.log(1000) > 10 * half and chance > 0.9
    model = Copier()
    model.scale.data.zero_()
    gained, chance = probe.by_repetition(model, text, 32).values()
    assert gained + chance == pytest.approx([0.0, 0.0, 1 / 1000, 0.0], abs=1e-6)


# ---- documents


def test_losses_by_document(run, made, sample):
    first, second = made("a-1"), made("b-1", seed=2)
    status, said = run(probe, "documents", first, second, "--tokens", 4096, "--json", "d.json")
    assert status == 0, said
    kept = json.loads(Path("d.json").read_text())
    rows = fineweb.Windows(sample, "val", 64).rows(np.arange(64))
    loss = known_losses(first, rows).flatten()
    ends = np.flatnonzero(rows[:, 1:].flatten() == 256) + 1  # an end counts to the document before it
    expected = [each for each in np.split(loss, ends) if len(each)]
    assert [document["tokens"] for document in kept["documents"]] == [len(each) for each in expected]
    found = kept["runs"][0]
    assert found["losses"] == pytest.approx([statistics.mean(each) for each in expected], abs=2e-5)
    assert table_rows(said)["a"][0] == f"{loss.mean():.4f}"
    assert "4,096 tokens of " in said


def test_a_difference_by_hand():
    """Three documents, of which the second is half of the text."""
    ours = {1: np.array([1.0, 2.0, 3.0]), 2: np.array([1.2, 2.2, 3.2])}
    theirs = {1: np.array([1.1, 2.6, 3.0]), 2: np.array([1.2, 3.0, 3.3]), 3: np.array([9.0, 9.0, 9.0])}
    weight = np.array([100.0, 200.0, 100.0])
    both, of_seeds, of_documents = probe.compare_documents(ours, theirs, weight)
    assert both.difference == pytest.approx(0.25 * -0.05 + 0.5 * -0.7 + 0.25 * -0.05)
    by_seed = [0.25 * -0.1 + 0.5 * -0.6, 0.5 * -0.8 + 0.25 * -0.1]
    assert of_seeds == pytest.approx(12.7062 * math.sqrt(statistics.variance(by_seed) / 2), rel=1e-4)
    values = np.array([-0.05, -0.7, -0.05])
    without = [(0.5 * -0.7 + 0.25 * -0.05) / 0.75, -0.05, (0.5 * -0.7 + 0.25 * -0.05) / 0.75]
    away = sum((each - both.difference) ** 2 for each in without)
    part = probe.over_documents(values, weight)
    assert part == (pytest.approx(2 / 3 * away), pytest.approx(1 / (2 / 16 + 1 / 4) - 1))
    assert both.half == pytest.approx(math.hypot(of_seeds, of_documents))
    one, of_seeds, of_documents = probe.compare_documents({1: ours[1]}, theirs, weight)
    assert one.p is None and of_seeds is None and of_documents > 0


def test_equal_models_differ_significantly_in_at_most_one_study_of_twenty():
    """Three models with three seeds; each varies between seeds and, in its own way, between documents."""
    rng = np.random.default_rng(5)
    for of_seeds, of_documents in ((0.01, 0.0), (0.0, 0.3), (0.01, 0.1)):
        false = 0
        studies = 300
        for _ in range(studies):
            tokens = rng.lognormal(7, 1, 60) + 1
            models = []
            for _ in range(3):
                losses = 2 + rng.normal(0, of_documents, 60) + rng.normal(0, of_seeds, (3, 1))
                models.append(dict(enumerate(losses + rng.normal(0, 1e-4, (3, 60)))))
            pairs = [(models[0], models[1]), (models[0], models[2]), (models[1], models[2])]
            p = stats.holm([probe.compare_documents(a, b, tokens)[0].p for a, b in pairs])
            false += min(p) < 0.05
        assert false <= 0.06 * studies


@pytest.mark.parametrize("spread", [0, 0.7, 1.4])
def test_an_interval_over_documents_holds_whatever_their_lengths(spread):
    """Sixty documents, whose lengths vary as the exponential of a normal distribution."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        weight = np.exp(rng.normal(0, spread, 60))
        values = rng.normal(0, 1, 60)
        half = stats.half_width([probe.over_documents(values, weight)])
        held += abs(probe.weighted(values, weight)) <= half
    assert 0.94 <= held / 2000 <= 0.965


def test_mistakes_are_one_line(run, made, sample, tmp_path):
    good = made("good")
    for arguments, words in (
        (["context", tmp_path / "nowhere"], "holds no checkpoint"),
        (["context", made("odd", block_size=24)], "24 tokens"),
        (["position", made("other", fingerprint="x")], "other data"),
        (["position", good, "--windows", 1], "--windows"),
        (["position", good, "--json", "."], "is a folder"),
        (["context", good, "--png", "."], "is a folder"),
        (["documents", good, made("short", block_size=16), "--tokens", 4096], "same documents"),
        (["ngrams", "--data_dir", sample, "--largest", 8], "--largest 8"),
    ):
        status, said = run(probe, *arguments)
        assert status == 1 and words in said.splitlines()[-1], said
    path = good / "step_000007.pt"
    torch.save(torch.load(path, weights_only=True) | {"script": "os"}, path)
    status, said = run(probe, "position", good)
    assert status == 1 and "is no training script" in said


def test_a_real_run_without_a_copy_of_its_script(run, sample):
    options = [*SMALL, f"--data_dir={sample}", "--val_tokens=1000000", "--max_steps=1", "--run_name=a"]
    assert run(train_gpt2, *options)[0] == 0
    Path("log/a/train_gpt2.py").unlink()
    status, _ = run(probe, "position", "log/a", "--windows", 1_000_000, "--json", "p.json")  # all there are
    (found,) = json.loads(Path("p.json").read_text())
    loss = events(Path("log/a"), "val")[-1]["loss"]
    assert status == 0 and found["losses"]["1 to 32"][0] == pytest.approx(loss, rel=1e-5)


# ---- n-grams


def plain(train, val, vocab_size, largest):
    """The same by dictionaries, a token at a time."""
    following = defaultdict(Counter)
    for row in train.tolist():
        for end in range(len(row)):
            for n in range(1, largest + 1):
                if end - n + 1 >= 0:
                    following[tuple(row[end - n + 1 : end])][row[end]] += 1

    def chance(history, token):
        shorter = chance(history[1:], token) if history else 1 / vocab_size
        after = following.get(history)
        if after is None:
            return shorter
        return (after[token] + len(after) * shorter) / (after.total() + len(after))

    found = []
    for n in range(1, largest + 1):
        total = 0.0
        for row in val.tolist():
            for at in range(1, len(row)):
                total -= math.log(chance(tuple(row[max(0, at - n + 1) : at]), row[at]))
        found.append(total / (len(val) * (val.shape[1] - 1)))
    lengths = [len(history) + 1 for history, after in following.items() for _ in after]
    return found, [sum(length <= n for length in lengths) for n in range(1, largest + 1)]


@pytest.mark.parametrize("largest", [1, 2, 5])
def test_the_losses_of_n_grams_are_those_of_a_plain_count(largest):
    rng = np.random.default_rng(largest)
    # few tokens and a skewed choice of them: histories that were seen often, rarely and never
    train, val = (np.minimum(rng.geometric(0.4, size=(rows, 9)), 7) for rows in (30, 10))
    val[0, 3] = 7  # the rarest
    found, entries = probe.ngram_losses(train, val, 9, largest)
    wanted, sizes = plain(train, val, 9, largest)
    assert [each.mean() for each in found] == pytest.approx(wanted, rel=1e-12) and entries == sizes


def test_the_n_grams_of_a_run(run, sample):
    options = ["ngrams", "--data_dir", sample, "--largest", 4, "--windows", 16]
    status, said = run(probe, *options, "--steps", 40)
    shown = [float(table_rows(said)[str(n)][1]) for n in range(1, 5)]
    assert status == 0 and shown == sorted(shown, reverse=True)
    assert "| validation loss | pair seen | token seen | new |" in said
    more = table_rows(run(probe, *options, "--steps", 160)[1])
    assert float(more["4"][1]) < shown[-1]  # more text, a lower loss
    assert run(probe, *options, "--steps", 40, "--seed", 2)[1] != said  # other windows
