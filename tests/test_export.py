"""Export to other libraries and back, by the real libraries."""
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import fineweb
from tools import export, weights

transformers = pytest.importorskip("transformers")
IMPORTED = [name for name in weights.HF_CLASSES if name != "deepseek"]


def trained(name, folder, **fields):
    """A run's folder with a checkpoint of a small random model, and the model."""
    script = importlib.import_module(f"train_{name}")
    config = script.Config(**{**script.TINY_MODEL, "vocab_size": 320, "block_size": 64, **fields})
    torch.manual_seed(0)
    model = script.Model(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for key, buffer in model.named_buffers():
        if key.endswith("router.bias"):
            buffer += 0.1 * torch.randn_like(buffer)
    data = {"dataset": "sample", "tokenizer": "bytes", "vocab_size": 257, "fingerprint": "f"}
    folder.mkdir(parents=True)
    optimizer = torch.optim.AdamW(model.optimizer_groups())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    script.save_checkpoint(folder, 7, config, data, model, optimizer, scaler)
    return model


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    export.main()


def retag(folder, **fields):
    """Changes fields of the checkpoint that trained() wrote."""
    path = folder / "step_000007.pt"
    torch.save(torch.load(path, weights_only=True) | fields, path)


def assert_close(ours, theirs):
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() <= 1e-5


# ---- names of tensors


@pytest.mark.parametrize("name", weights.HF_CLASSES)
def test_names_go_there_and_back_bit_for_bit(name, tmp_path):
    fields = {"mtp_depth": "0"} if name == "deepseek" else {}  # transformers has no MTP
    model = trained(name, tmp_path / "log", **fields)
    ours = model.state_dict()
    theirs = weights.to_hf(name, ours, model.config)
    assert theirs.keys() == weights.hf_model(name, model.config).state_dict().keys()
    back = weights.from_hf(name, theirs, model.config)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in ours.items())


@pytest.mark.parametrize("name", IMPORTED)
def test_a_config_goes_there_and_back(name):
    script = importlib.import_module(f"train_{name}")
    config = script.Config(**script.TINY_MODEL)
    assert weights.our_config(name, weights.hf_config(name, config), script.Config) == config


# ---- whole models


@pytest.mark.parametrize("name", weights.HF_CLASSES)
def test_transformers_loads_it_and_gives_the_same_logits(name, tmp_path, monkeypatch):
    model = trained(name, tmp_path / "log")
    call(monkeypatch, tmp_path / "log", "--out", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    idx = torch.randint(257, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(model(idx)[0], theirs(idx).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "The café's  number, of 1234 things\n\n it's — 日本."
    ids = fineweb.get_tokenizer("bytes").encode_ordinary(text)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.eos_token_id == 256
    card = (tmp_path / "hf/README.md").read_text()
    assert name in card and '"n_embd"' in card and "steps: 7" in card
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "hf"), device="cpu")
    (result,) = pipe("The number", max_new_tokens=5)
    assert result["generated_text"].startswith("The number")


@pytest.mark.parametrize("name", IMPORTED)
def test_out_and_back_in_is_the_same_model_and_the_script_takes_it(name, tmp_path, monkeypatch, small_sample):
    model = trained(name, tmp_path / "run")
    script = importlib.import_module(f"train_{name}")
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, "run", "--out", "hf")
    fitting = transformers.AutoModelForCausalLM.from_pretrained("hf")
    fitting.resize_token_embeddings(257)  # a vocabulary that we have a tokenizer for
    fitting.save_pretrained("hf257")
    call(monkeypatch, "--from", "hf257", "--out", "log/again")
    checkpoint = torch.load("log/again/step_000000.pt", weights_only=True)
    saved = torch.load("run/step_000007.pt", weights_only=True)
    assert checkpoint.keys() == saved.keys() and checkpoint["script"] == script.__name__
    ours = model.state_dict()
    for key, tensor in checkpoint["model"].items():
        assert torch.equal(tensor, ours[key][: len(tensor)]), key
    options = [
        "--run_name=again", "--resume", f"--data_dir={small_sample}", "--max_steps=2", "--warmup_steps=1",
        "--val_tokens=512", "--eval_every=9", "--sample_tokens=3",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [script.__file__, *options])
    script.main()
    assert Path("log/again/step_000002.pt").exists()


def test_a_mistral_without_a_window_is_one_that_sees_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained("mistral", tmp_path / "run", vocab_size=257, window=64)
    call(monkeypatch, "run", "--out", "hf")
    fields = json.loads(Path("hf/config.json").read_text())
    Path("hf/config.json").write_text(json.dumps(fields | {"sliding_window": None}))
    call(monkeypatch, "--from", "hf", "--out", "log/again")
    checkpoint = torch.load("log/again/step_000000.pt", weights_only=True)
    assert checkpoint["config"]["window"] == checkpoint["config"]["block_size"] == 64


def test_rwkv_comes_out_as_the_file_that_its_package_loads(tmp_path, monkeypatch):
    """test_rwkv.py runs the package on these names and compares the logits."""
    model = trained("rwkv", tmp_path / "log")
    call(monkeypatch, tmp_path / "log", "--out", tmp_path / "out")
    state = torch.load(tmp_path / "out/model.pth", weights_only=True)
    expected = weights.to_official_rwkv(model.state_dict(), model.config)
    assert state.keys() == expected.keys() and "blocks.0.att.receptance.weight" in state
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    assert torch.equal(state["head.weight"], state["emb.weight"])


def test_mta_comes_out_under_its_own_names(tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file

    model = trained("mta", tmp_path / "log")
    call(monkeypatch, tmp_path / "log", "--out", tmp_path / "out")
    assert "no library has a class for it" in capsys.readouterr().out
    state = load_file(tmp_path / "out/model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "out/config.json").read_text())["architecture"] == "mta"


# ---- mistakes


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained("gpt2", tmp_path / "run")
    Path("file").write_text("")
    Path("full").mkdir()
    Path("full/something").write_text("")
    mistakes = {
        ("--out", "hf"): "give the folder of a run to export, or --from",
        ("nowhere", "--out", "hf"): "nowhere holds no checkpoint",
        ("run/step_000007.pt", "--out", "hf"): "step_000007.pt is a file: give the folder of a run",
        ("run", "--out", "full"): "is not empty: choose another --out",
        ("run", "--out", "file"): "--out file is a file: give a folder",
        ("run", "--out", "file/hf"): "file.*: Not a directory",
        ("--from", "full", "--out", "log/in"): "full can't be loaded",
        ("--from", "file", "--out", "log/in"): "--from file is a file: give the folder that it is in",
        ("--from", "full", "--out", "file"): "the scripts look for runs in log/",
        ("--from", "full", "--out", "log"): "the scripts look for runs in log/",
        ("--from", "full", "--out", "log/.."): "the scripts look for runs in log/",
    }
    for arguments, expected in mistakes.items():
        with pytest.raises(SystemExit, match=expected) as error:
            call(monkeypatch, *arguments)
        assert "\n" not in error.value.code
    assert not Path("hf").exists() and not Path("log").exists()
    Path("log/a").mkdir(parents=True)
    Path("log/a/log.jsonl").write_text("{}")
    with pytest.raises(SystemExit, match="log/a is not empty"):
        call(monkeypatch, "--from", "full", "--out", "log/a")
    with pytest.raises(SystemExit, match="log/b is a file"):
        Path("log/b").write_text("")
        call(monkeypatch, "--from", "full", "--out", "log/b")


def test_a_model_that_lacks_weights_is_refused(tmp_path, monkeypatch):
    """transformers would fill them in with random ones."""
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(tmp_path)
    trained("gpt2", tmp_path / "run", vocab_size=257)
    call(monkeypatch, "run", "--out", "hf")
    tensors = load_file("hf/model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, "hf/model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="hf lacks weights: transformer.h.1.mlp.c_fc.weight"):
        call(monkeypatch, "--from", "hf", "--out", "log/in")


@pytest.mark.parametrize("change", [{"format": 1}, {"config": {"n_layers": 2}}])
def test_checkpoints_of_another_version_are_refused(change, tmp_path, monkeypatch):
    trained("gpt2", tmp_path / "log")
    retag(tmp_path / "log", **change)
    with pytest.raises(SystemExit, match="was written by another version of train_gpt2.py"):
        call(monkeypatch, tmp_path / "log", "--out", tmp_path / "hf")


def edit(text, *pairs):
    for old, new in pairs:
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("name", ["gpt2", "rwkv"])
def test_an_edited_model_is_refused(name, tmp_path, monkeypatch, capsys):
    trained(name, tmp_path / "log")
    script = Path(importlib.import_module(f"train_{name}").__file__)
    text = script.read_text()

    retag(tmp_path / "log", script_hash="of another text")

    def export_with(*texts):
        for old in (tmp_path / "log").glob("train_*.py"):
            old.unlink()
        for number, content in enumerate(texts, 1):
            suffix = f".{number}.py" if number > 1 else ".py"
            (tmp_path / f"log/train_{name}{suffix}").write_text(content)
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        call(monkeypatch, tmp_path / "log", "--out", out)
        return capsys.readouterr().out

    said = export_with()
    assert f"holds no copy of train_{name}.py, so whether its model is today's can't be checked" in said
    assert "can't be checked" not in export_with(text)
    other = edit(text, ("nn.Embedding(", "nn.Embedding( "), ("class Block", "# more of it\nclass Block"))
    export_with(other)  # comments and layout make no other model
    export_with(edit(text, ("n_layer: int = option(12,", "n_layer: int = option(6,")))  # defaults
    export_with(edit(text, ("RECIPE = ", "RECIPE = None or ")))
    export_with(edit(text, ("def validate(", "def validated(")))  # which all scripts share
    edited = edit(text, ("class Block(nn.Module):", "class Block(nn.Module):\n    scale = 2"))
    export_with(edited, text)  # the newest is today's
    with pytest.raises(SystemExit, match=f"was trained by another model than train_{name}.py has today"):
        export_with(text, edited)


def test_of_several_copies_the_one_that_made_the_checkpoint_counts(tmp_path, monkeypatch):
    trained("gpt2", tmp_path / "log")
    text = (ROOT / "train_gpt2.py").read_text()
    first = tmp_path / "log/train_gpt2.py"
    second = tmp_path / "log/train_gpt2.2.py"
    first.write_text(text + "# the same model\n")
    second.write_text(text.replace("class Block(", "class Block2("))
    retag(tmp_path / "log", script_hash=fineweb.script_hash(first))
    call(monkeypatch, tmp_path / "log", "--out", tmp_path / "out")
    retag(tmp_path / "log", script_hash=fineweb.script_hash(second))
    with pytest.raises(SystemExit, match="train_gpt2.2.py"):
        call(monkeypatch, tmp_path / "log", "--out", tmp_path / "out2")


@pytest.mark.parametrize("fields, expected", [
    ({"activation_function": "relu"}, "has activation_function = relu, train_gpt2.py has gelu_new"),
    ({"n_inner": 96}, "n_inner|don't fit train_gpt2.py"),
    ({"vocab_size": 300}, "a vocabulary of 300, which is neither GPT-2's nor bytes"),
])  # fmt: skip
def test_gpt2_weights_that_do_not_fit_are_refused(fields, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = {"vocab_size": 257, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    config = transformers.GPT2Config(**(shape | fields))
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match=expected):
        call(monkeypatch, "--from", "other", "--out", "log/in")


def test_another_architecture_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 64}
    config = transformers.OPTConfig(vocab_size=257, word_embed_proj_dim=32, **shape)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    expected = "is a OPTForCausalLM: only GPT-2, LLaMA, Mistral and Gemma 3 can be imported"
    with pytest.raises(SystemExit, match=expected):
        call(monkeypatch, "--from", "opt", "--out", "log/in")


def test_gpt2_tokenizer_equals_tiktokens():
    try:
        encoding = fineweb.get_tokenizer("gpt2")
    except SystemExit:
        pytest.skip("GPT-2's vocabulary is not on this machine and there is no network")
    tokenizer = export.hf_tokenizer("gpt2")
    texts = [
        "Hello, I'm a language model,",
        "  two  spaces\n\n\tand a tab",
        "don't WE'LL 12345 naïve 日本語 🙂 <|endoftext",
    ]
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False) == encoding.encode_ordinary(text)
    assert len(tokenizer) == 50_257 and tokenizer.eos_token_id == 50_256
