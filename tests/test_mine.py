"""A script of a user's own beside the seven: a copy of train_gpt2.py with changes."""
import importlib
import json
import sys

import pytest
import torch

from tools import export, runs, sync, table

SHORT = [
    "--tiny", "--block_size=32", "--batch_tokens=512", "--val_tokens=512", "--sample_tokens=4",
    "--warmup_steps=1", "--max_steps=2",
]  # fmt: skip


def call(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with the seven scripts and train_mine.py, which has ReLU and a schedule of its own."""
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
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "train_mine.py"
    sys.modules.pop("train_mine", None)


@pytest.mark.parametrize("options", [[], ["--check"]])
def test_sync_leaves_it_alone_and_says_so(options, mine, monkeypatch, capsys):
    before = mine.read_bytes()
    call(monkeypatch, sync, *options)
    said = capsys.readouterr().out
    assert said == "train_mine.py: left as it is, since it is not one of the 7 in tools/sync.py\n"
    assert mine.read_bytes() == before


def test_sync_still_repairs_the_others(mine, monkeypatch, capsys):
    llama = mine.with_name("train_llama.py")
    whole = llama.read_text()
    llama.write_text(whole.replace("def get_lr(config, step):", "def get_lr(config, step, more):"))
    with pytest.raises(SystemExit, match="1 scripts differ"):
        call(monkeypatch, sync, "--check")
    call(monkeypatch, sync)
    assert llama.read_text() == whole
    assert "train_llama.py: copied" in capsys.readouterr().out


def test_the_readmes_tables_have_the_seven(mine):
    """tools.table takes its rows from siblings()."""
    assert table.siblings is sync.siblings
    assert [path.name for path in sync.others()] == ["train_mine.py"]
    assert {path.name for path in sync.siblings()} == {*sync.SCRIPTS.values()} - {"train_gpt2.py"}


def test_it_trains_and_its_run_is_exported_and_compared(mine, monkeypatch, capsys, small_sample):
    """Its weights would fit GPT-2's class, which would compute something else with them."""
    from safetensors.torch import load_file

    script = importlib.import_module("train_mine")
    assert script.__file__ == str(mine)
    options = [*SHORT, f"--data_dir={small_sample}"]
    call(monkeypatch, script, *options)
    call(monkeypatch, export, "log/mine-tiny", "--out", "hf/mine")
    said = capsys.readouterr().out
    assert "mine: no library has a class for it, so the safetensors have train_mine.py's names" in said
    assert "can't be checked" not in said
    fields = json.loads((mine.parent / "hf/mine/config.json").read_text())
    assert fields.pop("architecture") == "mine" and "model_type" not in fields
    model = script.Model(script.Config(**fields))
    model.load_state_dict(load_file(mine.parent / "hf/mine/model.safetensors"))
    saved = torch.load("log/mine-tiny/step_000002.pt", weights_only=True)["model"]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved.items())
    card = (mine.parent / "hf/mine/README.md").read_text()
    assert "# mine, trained" in card and "import train_mine as script" in card
    assert "library_name" not in card and "validation loss" in card

    call(monkeypatch, importlib.import_module("train_gpt2"), *options)
    both = [runs.read_run(f"log/{name}-tiny") for name in ("mine", "gpt2")]
    assert [pool.name for pool in runs.pool_runs(both)] == ["gpt2", "mine"]


def test_a_script_that_has_gone_or_broken_is_one_line(mine, monkeypatch, small_sample):
    script = importlib.import_module("train_mine")
    call(monkeypatch, script, *SHORT, f"--data_dir={small_sample}")
    text = mine.read_text()
    sys.modules.pop("train_mine")
    mine.write_text("def broken(:\n")
    with pytest.raises(SystemExit, match=r"train_mine.py can't be imported \(SyntaxError"):
        call(monkeypatch, export, "log/mine-tiny", "--out", "hf/mine")
    mine.unlink()
    importlib.invalidate_caches()
    with pytest.raises(SystemExit, match="not here: copy log/mine-tiny/train_mine.py to train_mine.py"):
        call(monkeypatch, export, "log/mine-tiny", "--out", "hf/mine")
    mine.write_text(text.replace("class Block(nn.Module):", "class Block(nn.Module):\n    scale = 2"))
    importlib.invalidate_caches()
    with pytest.raises(SystemExit, match="was trained by another model than train_mine.py has today"):
        call(monkeypatch, export, "log/mine-tiny", "--out", "hf/mine")
    path = mine.parent / "log/mine-tiny/step_000002.pt"
    torch.save(torch.load(path, weights_only=True) | {"script": "shutil"}, path)
    with pytest.raises(SystemExit, match="made by shutil.py, which is no training script"):
        call(monkeypatch, export, "log/mine-tiny", "--out", "hf/mine")


@pytest.mark.parametrize("name", ["export", "sync"])
def test_help_fits_80_columns(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        call(monkeypatch, importlib.import_module(f"tools.{name}"), "--help")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10 and max(map(len, lines)) <= 79
