"""Tables of n-grams against a plain count, and what they get where the answer is known."""
import json
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from tools import ngram


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
    sizes = []
    for n in range(1, largest + 1):
        sizes.append(sum(len(after) for history, after in following.items() if len(history) < n))
    return found, sizes


@pytest.mark.parametrize("largest", [1, 2, 5])
def test_the_losses_are_those_of_a_plain_count(largest):
    rng = np.random.default_rng(largest)
    # few tokens and a skewed choice of them: histories that were seen often, rarely and never
    train, val = (np.minimum(rng.geometric(0.4, size=(rows, 9)), 7) for rows in (30, 10))
    val[0, 3] = 7  # the rarest
    found, entries = ngram.losses(train, val, 9, largest)
    wanted, sizes = plain(train, val, 9, largest)
    assert found == pytest.approx(wanted, rel=1e-12) and entries == sizes


def test_chances_add_up_to_one():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 5, size=(20, 7))
    history = rng.integers(0, 5, size=4)
    rows = np.array([[*history, token] for token in range(6)])  # one token is never seen
    for n in range(2, 6):
        # what a row costs in all; all its tokens but the last are the same in all rows
        costs = [(n - 1) * ngram.losses(train, row[None, -n:], 6, n)[0][-1] for row in rows]
        before = (n - 2) * ngram.losses(train, rows[:1, -n:-1], 6, n)[0][-1] if n > 2 else 0.0
        assert sum(math.exp(before - cost) for cost in costs) == pytest.approx(1)


def test_what_needs_two_tokens_is_learnt_with_three():
    """Each token is the sum of the two before it: pairs say nothing, triples everything."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 7, size=(4000, 10))
    for at in range(2, 10):
        rows[:, at] = (rows[:, at - 1] + rows[:, at - 2]) % 7
    (one, two, three), _ = ngram.losses(rows[:3000], rows[3000:], 7, 3)
    assert one == pytest.approx(math.log(7), abs=0.01) and two == pytest.approx(math.log(7), abs=0.01)
    assert three < 0.15 * math.log(7) + 1 / 9 * math.log(7)  # the first of a row's nine can't be known


def test_the_command(run, small_sample):
    options = ["--data_dir", small_sample, "--steps", 40, "--val_tokens", 4096]
    status, said = run(ngram, *options, "--largest", 4, "--json", "out/ngram.json")
    assert status == 0, said
    lines = said.splitlines()
    kept = json.loads(Path("out/ngram.json").read_text())
    assert [line.split("|")[2].strip() for line in lines[2:]] == [f"{loss:.4f}" for loss in kept["losses"]]
    assert kept["losses"] == sorted(kept["losses"], reverse=True) and len(kept["losses"]) == 4
    assert [line.split("|")[3].strip() for line in lines[2:]] == [f"{size:,}" for size in kept["entries"]]
    assert kept["options"]["steps"] == 40 and kept["data"]
    more = run(ngram, *options[:2], "--steps", 160, *options[4:], "--largest", 4)[1]
    assert float(more.splitlines()[-1].split("|")[2]) < kept["losses"][-1]  # more text, a lower loss
    other = run(ngram, *options, "--largest", 4, "--seed", 2)[1]
    assert other != said  # other windows


@pytest.mark.parametrize("options, words", [
    (["--data_dir", "nowhere"], "no token shards in nowhere"),
    (["--block_size", "100"], "--batch_tokens 2048 is not a multiple of --block_size 100"),
    (["--largest", "300"], "--largest 300 is more than --block_size 256"),
    (["--largest", "8"], "--largest 8: too long for a vocabulary of 257, choose a smaller one"),
])  # fmt: skip
def test_what_is_wrong_is_one_line(run, small_sample, options, words):
    if "--data_dir" not in options:
        options = ["--data_dir", small_sample, *options]
    status, said = run(ngram, *options)
    assert status == 1 and words in said and said.count("\n") == 1
