"""Losses by document: where documents begin, whose loss is whose, and what may be said of a difference."""
import importlib
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from test_context import made  # noqa: F401
from test_effects import rows
from test_export import retag

import fineweb
from tools import documents, verdicts
from tools.documents import Document, ScoredRun, Scores


def test_an_end_counts_to_the_document_before_it():
    targets = np.array([1, 1, 256, 2, 256, 256, 3, 3])
    found, count = documents.find_documents(targets, "bytes", len(targets))
    assert found.tolist() == [0, 0, 0, 1, 1, 2, 3, 3] and count == 4
    found, count = documents.find_documents(targets, "bytes", 3)  # training scored the first document
    assert found.tolist() == [0, 0, 0, 1, 1, 2, 3, 3] and count == 4
    found, count = documents.find_documents(targets, "bytes", 4)  # and half of the second
    assert found.tolist() == [0, 0, 0, 1, 2, 3, 4, 4] and count == 5


def test_documents_are_described():
    text = "plain text" + "한국어" + "half é"
    pieces = [piece.encode() for piece in ("plain text", "한국어", "half é")]
    targets = np.array([token for piece in pieces for token in [*piece, 256]])
    of_token, count = documents.find_documents(targets, "bytes", 15)
    plain, begun, rest, half = documents.describe_documents(targets, of_token, "bytes", 15)
    assert count == 4 and sum(map(len, pieces)) + 3 == len(targets) > len(text)
    assert plain == Document(11, 1.0, True) and begun.scored and not rest.scored and not half.scored
    assert (begun.tokens, rest.tokens) == (4, 6) and begun.ascii < 0.5 > rest.ascii
    assert half == Document(8, round(5 / 6, 3), False)
    assert [documents.is_ours(each) for each in (plain, begun, rest, half)] == [True, False, False, True]


def test_losses_of_real_runs_by_document(run, made, small_sample, monkeypatch):  # noqa: F811
    """By hand: each token's loss of the script's own model, in the documents' places."""
    monkeypatch.setattr(documents, "TOKENS_AT_ONCE", 200)  # several passes
    folder = made("llama")
    status, said = run(documents, folder, made("rwkv"), "--tokens", 4096, "--json", "out/documents.json")
    assert status == 0, said
    kept = json.loads(Path("out/documents.json").read_text())
    assert sum(each["tokens"] for each in kept["documents"]) == 4096
    assert sum(each["tokens"] for each in kept["documents"] if each["scored"]) == 2048
    script = importlib.import_module("train_llama")
    checkpoint = torch.load(folder / "step_000007.pt", weights_only=True)
    model = script.Model(script.Config(**checkpoint["config"])).eval()
    model.load_state_dict(checkpoint["model"])
    text = np.concatenate([np.asarray(shard) for shard in fineweb.Windows(small_sample, "val", 64).shards])
    text = torch.from_numpy(text[:4097].astype(np.int64))
    inputs, targets = text[:-1].view(64, 64), text[1:].view(64, 64)
    with torch.no_grad():
        _, loss = model(inputs, targets, reduction="none")
    loss = loss.flatten().tolist()
    expected = [[]]
    for place, token in enumerate(targets.flatten().tolist()):
        if place == 2048 and expected[-1]:
            expected.append([])  # what training didn't score
        expected[-1].append(loss[place])
        if token == 256:
            expected.append([])
    expected = [statistics.mean(each) for each in expected if each]
    found = {each["run"]: each["losses"] for each in kept["runs"]}
    assert found["llama"] == pytest.approx(expected, abs=2e-5) and len(expected) > 2
    assert f"| llama | {statistics.mean(loss):.4f} | {statistics.mean(loss[:2048]):.4f} |" in said
    tables = said[said.index("4,096 tokens of") :]
    status, again = run(documents, "out/documents.json")
    assert status == 0 and again == tables
    status, again = run(documents, folder, "out/documents.json", "--tokens", 4096)
    assert status == 0 and again.endswith(tables)


def scores(models, tokens, **kinds):
    """Scores of {model: {seed: losses}} on documents of so many tokens; kinds: share of ASCII, scored."""
    count = len(tokens)
    ascii = kinds.get("ascii", [1.0] * count)
    scored = kinds.get("scored", [True] * count)
    found = [Document(*each) for each in zip(tokens, ascii, scored, strict=True)]
    runs = []
    for model, by_seed in models.items():
        runs += [ScoredRun(f"{model}-{seed}", seed, 7, list(losses)) for seed, losses in by_seed.items()]
    return Scores("f", 64, found, runs)


def test_a_difference_by_hand():
    """Three documents, of which the second is another script and half of the text."""
    ours = {1: [1.0, 2.0, 3.0], 2: [1.2, 2.2, 3.2]}
    theirs = {1: [1.1, 2.6, 3.0], 2: [1.2, 3.0, 3.3], 3: [9.0, 9.0, 9.0]}
    kinds = {"ascii": [1.0, 0.2, 0.9], "scored": [True, True, False]}
    known = scores({"a": ours, "b": theirs}, [100, 200, 100], **kinds)
    (pair,) = documents.compare(known)
    assert (pair.a, pair.b, pair.seeds) == ("a", "b", [1, 2])
    assert pair.difference == pytest.approx(0.25 * -0.05 + 0.5 * -0.7 + 0.25 * -0.05)
    assert pair.in_script == pytest.approx(-0.05)
    by_seed = [0.25 * -0.1 + 0.5 * -0.6, 0.5 * -0.8 + 0.25 * -0.1]
    assert pair.of_seeds[0] == pytest.approx(statistics.variance(by_seed) / 2) and pair.of_seeds[1] == 1
    without = [(0.5 * -0.7 + 0.25 * -0.05) / 0.75, -0.05, (0.5 * -0.7 + 0.25 * -0.05) / 0.75]
    away = sum((each - pair.difference) ** 2 for each in without)
    assert pair.of_documents == (pytest.approx(2 / 3 * away), pytest.approx(1 / (2 / 16 + 1 / 4) - 1))
    assert pair.mover == 1 and pair.moved == pytest.approx(pair.difference - -0.05)
    said = documents.report(known)
    assert "400 tokens of 3 documents, 1 of them of other scripts. Training scored 300 tokens of" in said
    assert "of 2 documents, the longest 66.7% of them. So few documents" in said
    cells = rows(said)["a minus b"]
    assert cells[0] == "-0.3750" and cells[-2:] == ["-0.0500", "-0.3250 by number 2"]
    both = math.hypot(float(cells[1]), float(cells[2]))
    assert float(cells[3]) == pytest.approx(both, abs=2e-4) and cells[4] == "not distinguishable"
    assert rows(said)["a"][1:4] == ["1.7667 ± 1.2706", "3.1000 ± 1.2706", "2.1000 ± 1.2706"]


def test_what_all_names_begin_with_stands_in_the_head():
    models = {"st-1M-gpt2": {1: [1.0, 2.0]}, "st-1M-gpt2-rope": {1: [0.5, 2.0]}}
    said = documents.report(scores(models, [5, 5]))
    assert "| st-1M-… | loss |" in said
    assert "gpt2-rope minus gpt2" in rows(said) and {"gpt2", "gpt2-rope"} <= rows(said).keys()
    assert documents.shared_start(["gpt2", "gpt2-rope"]) == documents.shared_start(["st-1M-gpt2"]) == ""


def test_one_seed_gets_an_interval_over_documents_and_no_verdict():
    models = {"a": {1: [1.0, 2.0]}, "b": {1: [1.5, 2.7]}, "c": {2: [3.0, 3.0]}}
    said = documents.report(scores(models, [5, 5]))
    cells = rows(said)["a minus b"]
    assert cells[0] == "-0.6000" and cells[1] == "–" and float(cells[2]) > 0
    assert cells[3:6] == ["–", "one seed: no verdict", "–"]
    assert rows(said)["a minus c"][0] == "-1.5000" and rows(said)["a minus c"][4] == "not tested"
    assert "a minus b" not in documents.report(scores({"a": {1: [1.0]}}, [5]))


def test_a_long_or_lonely_text_is_doubted_and_a_good_one_not():
    doubt = "can decide a small difference"
    assert doubt in documents.in_words([Document(10, 1.0, True)] * 99)
    assert doubt not in documents.in_words([Document(10, 1.0, True)] * 100)
    assert doubt in documents.in_words([Document(10, 1.0, True)] * 100 + [Document(60, 1.0, True)])
    assert doubt not in documents.in_words([Document(10, 1.0, True)] * 100 + [Document(60, 1.0, False)])


@pytest.mark.parametrize("of_seeds, of_documents", [(0.01, 0.0), (0.0, 0.3), (0.01, 0.1)])
def test_equal_models_get_a_verdict_in_at_most_one_study_of_twenty(of_seeds, of_documents):
    """Three models with three seeds; each varies between seeds and, in its own way, between documents."""
    rng = np.random.default_rng(5)
    false = 0
    studies = 600
    for _ in range(studies):
        tokens = rng.lognormal(7, 1, 60).astype(int) + 1
        models = {}
        for name in "abc":
            by_document = rng.normal(0, of_documents, 60)
            by_seed = rng.normal(0, of_seeds, 3)
            noise = rng.normal(0, 1e-4, (3, 60))
            models[name] = dict(enumerate(2 + by_document + by_seed[:, None] + noise, 1))
        pairs = documents.compare(scores(models, tokens.tolist()))
        false += any(pair.verdict != verdicts.UNTOLD for pair in pairs)
    assert false <= 0.06 * studies


@pytest.mark.parametrize("spread", [0, 0.7, 1.4])
def test_an_interval_over_documents_holds_whatever_their_lengths(spread):
    """Sixty documents, whose lengths vary as the exponential of a normal distribution."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        weight = np.exp(rng.normal(0, spread, 60))
        values = rng.normal(0, 1, 60)
        half = verdicts.half_width([documents.over_documents(values, weight)], 0.05)
        held += abs(documents.weighted(values, weight)) <= half
    assert 0.94 <= held / 2000 <= 0.965


def test_a_difference_that_is_there_is_found():
    rng = np.random.default_rng(1)
    tokens = rng.integers(500, 3000, 60).tolist()
    models = {}
    for name, shift in (("a", 0.0), ("b", 0.1)):
        losses = 2 + shift + rng.normal(0, 0.1, 60) + rng.normal(0, 0.005, (3, 1))
        models[name] = dict(enumerate(losses, 1))
    (pair,) = documents.compare(scores(models, tokens))
    assert (pair.a, pair.b, pair.verdict) == ("a", "b", "better")


def test_mistakes_are_one_line(run, made, tmp_path, small_sample):  # noqa: F811
    good = made("gpt2")
    short = made("llama", block_size=16)
    less = made("mta", val_tokens=1024)
    other = made("mistral")
    retag(other, data={"dataset": "sample", "tokenizer": "bytes", "fingerprint": "other"})
    seed = made("gpt2", "gpt2-2", n_layer=1, seed=2)
    one = made("gpt2", "gpt2-1", seed=1)
    ahead = made("gpt2", "gpt2-3", seed=3)
    (ahead / "step_000007.pt").rename(ahead / "step_000009.pt")
    path = ahead / "step_000009.pt"
    torch.save(torch.load(path, weights_only=True) | {"step": 9}, path)
    (tmp_path / "none.json").write_text("{}")
    for given, words in (
        ([tmp_path / "nowhere"], "holds no checkpoint"),
        ([short], "has other block_size than the runs before it, 16 and not 64"),
        ([less], "has other val_tokens than the runs before it, 1024 and not 2048"),
        ([other], "has other data than the runs before it"),
        ([one, seed], "log/gpt2: n_layer differ. Rename its folder"),
        ([ahead], "gpt2-3 is at step 9, "),
        ([tmp_path / "none.json"], "none.json can't be read: Object missing required field"),
        (["--json", tmp_path], "is a folder, give the name of a file"),
    ):
        status, said = run(documents, good, *given, "--tokens", 2048)
        assert status == 1 and words in said.splitlines()[-1] and not said.startswith(f"{good}: "), said
    status, said = run(documents, other)
    assert status == 1 and f"was trained on other data than there are now in {small_sample}" in said
    later = scores({"m": {1: [1.0], 2: [1.0]}}, [5])
    later.runs[1].step = 9
    documents.write(tmp_path / "ahead.json", later)
    status, said = run(documents, tmp_path / "ahead.json")
    assert status == 1 and said.startswith("m-2 is at step 9, another seed of m at 7: give runs")
    run(documents, good, "--tokens", 2048, "--json", "a.json")
    status, said = run(documents, one, "a.json", "--tokens", 4096)
    assert status == 1 and said.startswith("these runs were not scored on the same documents: "), said
    run(documents, one, "--tokens", 4096, "--json", "b.json")
    status, said = run(documents, "a.json", "b.json")
    assert status == 1 and said.startswith("these runs were not scored on the same documents: "), said
