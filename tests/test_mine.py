"""A script of a user's own beside the seven: a copy of train_gpt2.py with changes."""
import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, load, losses

import train_gpt2
from tools import sync


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with the seven scripts and train_mine.py, which has ReLU squared and a schedule of its own."""
    for path in [sync.ORIGINAL, *sync.siblings()]:
        (tmp_path / path.name).write_text(path.read_text())
    text = sync.ORIGINAL.read_text()
    for old, new in [
        ('F.gelu(self.up(x), approximate="tanh")', "F.relu(self.up(x)) ** 2"),
        ("def get_lr(config, step):", "def get_lr(config, step, sharpness=1):"),  # which all seven share
    ]:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "train_mine.py").write_text(text)
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    monkeypatch.setattr(sync, "ORIGINAL", tmp_path / "train_gpt2.py")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "train_mine.py"
    sys.modules.pop("train_mine", None)


@pytest.mark.parametrize("check", [False, True])
def test_sync_leaves_it_alone_and_says_so(check, mine, capsys):
    before = mine.read_bytes()
    sync.main(check)
    assert capsys.readouterr().out.startswith("train_mine.py")
    assert mine.read_bytes() == before
    assert sync.others() == [mine]
    assert {path.name for path in sync.siblings()} == {*sync.SCRIPTS.values()} - {"train_gpt2.py"}


def test_it_trains_and_its_checkpoint_is_not_taken_for_gpt2s(mine, run, sample, tmp_path):
    """Its weights would fit GPT-2's class, which would compute something else with them."""
    script = importlib.import_module("train_mine")
    assert script.__file__ == str(mine)
    options = [*SMALL, f"--data_dir={sample}", "--max_steps=2"]
    assert run(script, *options)[0] == 0
    folder = tmp_path / "log/mine-tiny"
    assert len(losses(folder)) == 2 and (folder / "train_mine.py").read_bytes() == mine.read_bytes()
    model = script.Model(script.Config(**load(folder, 2)["config"]))
    model.load_state_dict(load(folder, 2)["model"])
    x = torch.randn(3, 16)
    mlp = model.blocks[0].mlp
    torch.testing.assert_close(mlp(x), mlp.proj(F.relu(mlp.up(x)) ** 2))
    assert run(script, "--tiny", "--resume", "--max_steps=3")[0] == 0
    status, said = run(train_gpt2, *options, "--run_name=mine-tiny", "--resume")
    assert status == 1 and "train_mine.py" in said and said.count("\n") == 1
