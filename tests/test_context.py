"""How much of its context a model uses, of models for which that is known."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_export import retag, trained

import fineweb
from tools import context


def test_the_same_tokens_are_guessed_with_each_length():
    rows = torch.arange(3 * 17).reshape(3, 17)
    for most in (2, 4, 8, 16):
        pieces = context.cut(rows, most)
        assert pieces.shape == (3 * 16 // most, most + 1)
        assert torch.equal(pieces[:, most // 2 + 1 :].reshape(3, 8), rows[:, 9:])
        assert (pieces.diff(dim=1) == 1).all()  # neighbours in the text


def test_what_is_lost_without_the_text_before(monkeypatch):
    """A model whose loss is 1 / (the number of tokens it sees), in pieces of several forward passes."""
    monkeypatch.setattr(context, "TOKENS_AT_ONCE", 40)

    def model(idx, targets, reduction):
        assert reduction == "none" and torch.equal(idx[:, 1:], targets[:, :-1])
        return None, (1 / torch.arange(1.0, idx.shape[1] + 1)).repeat(len(idx), 1)

    rows = torch.randint(0, 9, (7, 33))
    for most in (2, 8, 32):
        expected = np.mean([1 / n for n in range(most // 2 + 1, most + 1)])
        assert context.losses(model, rows, most, "cpu") == pytest.approx([expected] * 7)


@pytest.fixture
def made(tmp_path, small_sample, capsys):
    """made(name, **fields) -> the folder of a run that says it was trained on the sample, a random model.

    It is log/NAME, or log/CALLED.
    """

    def made(name, called=None, **fields):
        folder = tmp_path / f"log/{called or name}"
        trained(name, folder, **{"data_dir": str(small_sample), "val_tokens": 2048} | fields)
        found = fineweb.open_dataset(small_sample)
        retag(folder, data={"dataset": "sample", "tokenizer": "bytes", "fingerprint": found["fingerprint"]})
        capsys.readouterr()  # that it was saved
        return folder

    return made


def test_a_window_is_all_that_a_model_sees(run, made, small_sample):
    """Mistral with one layer and a window of 8: from 9 tokens on nothing is lost; LLaMA loses to the end."""
    near = made("mistral", n_layer=1, window=8)
    far = made("llama", n_layer=1)
    state = made("rwkv")
    status, said = run(context, near, far, state, "--windows", 20, "--json", "out/context.json")
    assert status == 0, said
    kept = {result["architecture"]: result for result in json.loads(Path("out/context.json").read_text())}
    lost = {name: np.array(result["lost"]) for name, result in kept.items()}
    assert kept["mistral"]["lengths"] == [2, 4, 8, 16, 32, 64] and kept["rwkv"]["windows"] == 20
    assert (np.abs(lost["mistral"][3:]) < 1e-6).all() and (np.abs(lost["mistral"][:2, 0]) > 1e-4).all()
    assert (np.abs(lost["llama"][:-1, 0]) > 1e-5).all()
    assert all((each[-1] == 0).all() and (each[:2, 1] > 0).all() for each in lost.values())
    table = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in said.splitlines()[2:]}
    assert table.keys() == {"mistral", "llama", "rwkv"}
    cells = [cell.strip() for cell in table["llama"]]
    assert cells[:-1] == [f"{more:.3f} ± {half:.3f}" for more, half in kept["llama"]["lost"][:-1]]
    # the loss with the whole context is that of the second half of each window
    import train_llama

    config = train_llama.Config(data_dir=str(small_sample), block_size=64, val_tokens=2048)
    rows = context.read_rows(config, 20)
    checkpoint = torch.load(far / "step_000007.pt", weights_only=True)
    model = train_llama.Model(train_llama.Config(**checkpoint["config"])).eval()
    model.load_state_dict(checkpoint["model"])
    _, loss = model(rows[:, :-1], rows[:, 1:], reduction="none")
    assert kept["llama"]["loss"] == pytest.approx(loss.reshape(20, 64)[:, 32:].mean().item(), rel=1e-5)


def test_contexts_of_two_lengths_are_two_tables(run, made):
    short = made("llama", block_size=16)
    status, said = run(context, short, made("gpt2"), "--windows", 4)
    assert status == 0 and "| loss with 16 |" in said and "| loss with 64 |" in said


def test_mistakes_are_one_line(run, made, tmp_path, small_sample):
    good = made("gpt2")
    odd = made("llama", block_size=24)
    other = made("mistral")
    retag(other, data={"dataset": "sample", "tokenizer": "bytes", "fingerprint": "other"})
    for folder, words in (
        (tmp_path / "nowhere", "holds no checkpoint"),
        (odd, "its context of 24 tokens is no power of two from 4 on"),
        (other, f"was trained on other data than there are now in {small_sample}"),
    ):
        status, said = run(context, good, folder)
        assert status == 1 and words in said and said.count("\n") == 1, said
