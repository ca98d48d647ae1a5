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
    checkpoint = {
        "format": script.CHECKPOINT_FORMAT, "script": script.__name__, "step": 7,
        "config": vars(config), "data": data, "model": model.state_dict(),
        "optimizer": {}, "scaler": {}, "rng": torch.get_rng_state(),
    }  # fmt: skip
    folder.mkdir(parents=True)
    torch.save(checkpoint, folder / "step_000007.pt")
    return model


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    export.main()


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
    run(monkeypatch, tmp_path / "log", "--out", tmp_path / "hf")
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
    run(monkeypatch, tmp_path / "run", "--out", tmp_path / "hf")
    fitting = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    fitting.resize_token_embeddings(257)  # a vocabulary that we have a tokenizer for
    fitting.save_pretrained(tmp_path / "hf257")
    run(monkeypatch, "--from", tmp_path / "hf257", "--out", tmp_path / "log/again")
    checkpoint = torch.load(tmp_path / "log/again/step_000000.pt", weights_only=True)
    ours = model.state_dict()
    for key, tensor in checkpoint["model"].items():
        assert torch.equal(tensor, ours[key][: len(tensor)]), key
    options = [
        "--run_name=again", "--resume", f"--data_dir={small_sample}", "--max_steps=2", "--val_tokens=512",
        "--batch_tokens=524288", "--eval_every=9", "--sample_tokens=3",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.__file__, *options])
    # the imported run has the default batch; a smaller one does here
    monkeypatch.setattr(script, "check_config", lambda config, world: setattr(config, "batch_tokens", 512))
    script.main()
    assert (tmp_path / "log/again/step_000002.pt").exists()


def test_a_mistral_without_a_window_is_one_that_sees_all(tmp_path, monkeypatch):
    trained("mistral", tmp_path / "run", vocab_size=257, window=64)
    run(monkeypatch, tmp_path / "run", "--out", tmp_path / "hf")
    fields = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(fields | {"sliding_window": None}))
    run(monkeypatch, "--from", tmp_path / "hf", "--out", tmp_path / "log")
    checkpoint = torch.load(tmp_path / "log/step_000000.pt", weights_only=True)
    assert checkpoint["config"]["window"] == checkpoint["config"]["block_size"] == 64


def test_rwkv_comes_out_as_the_file_that_its_package_loads(tmp_path, monkeypatch):
    """test_rwkv.py runs the package on these names and compares the logits."""
    model = trained("rwkv", tmp_path / "log")
    run(monkeypatch, tmp_path / "log", "--out", tmp_path / "out")
    state = torch.load(tmp_path / "out/model.pth", weights_only=True)
    expected = weights.to_official_rwkv(model.state_dict(), model.config)
    assert state.keys() == expected.keys() and "blocks.0.att.receptance.weight" in state
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    assert torch.equal(state["head.weight"], state["emb.weight"])


def test_mta_comes_out_under_its_own_names(tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file

    model = trained("mta", tmp_path / "log")
    run(monkeypatch, tmp_path / "log", "--out", tmp_path / "out")
    assert "no library has a class for it" in capsys.readouterr().out
    state = load_file(tmp_path / "out/model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "out/config.json").read_text())["architecture"] == "mta"


# ---- mistakes


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="holds no checkpoint"):
        run(monkeypatch, tmp_path / "nowhere", "--out", tmp_path / "hf")
    with pytest.raises(SystemExit, match="give the folder of a run to export, or --from"):
        run(monkeypatch, "--out", tmp_path / "hf")
    trained("gpt2", tmp_path / "log")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/something").write_text("")
    with pytest.raises(SystemExit, match="is not empty: choose another --out"):
        run(monkeypatch, tmp_path / "log", "--out", tmp_path / "hf")
    with pytest.raises(SystemExit, match="can't be loaded"):
        run(monkeypatch, "--from", tmp_path / "hf", "--out", tmp_path / "in")


@pytest.mark.parametrize("change", [{"format": 1}, {"config": {"n_layers": 2}}, {"script": "train_gone"}])
def test_checkpoints_of_another_version_are_refused(change, tmp_path, monkeypatch):
    trained("gpt2", tmp_path / "log")
    path = tmp_path / "log/step_000007.pt"
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(SystemExit, match="was written by another version of train_g"):
        run(monkeypatch, tmp_path / "log", "--out", tmp_path / "hf")


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

    def export_with(*texts):
        for old in (tmp_path / "log").glob("train_*.py"):
            old.unlink()
        for number, content in enumerate(texts, 1):
            suffix = f".{number}.py" if number > 1 else ".py"
            (tmp_path / f"log/train_{name}{suffix}").write_text(content)
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        run(monkeypatch, tmp_path / "log", "--out", out)
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


def test_of_several_copies_the_one_that_trained_last_counts(tmp_path, monkeypatch, capsys):
    trained("gpt2", tmp_path / "log")
    text = (ROOT / "train_gpt2.py").read_text()
    (tmp_path / "log/train_gpt2.py").write_text(text + "# the last one by the log\n")
    (tmp_path / "log/train_gpt2.2.py").write_text(text.replace("class Block(", "class Block2("))
    event = {
        "event": "run", "script": "train_gpt2", "processes": 1, "parameters": 1, "flops_per_token": 1,
        "script_hash": fineweb.sha256(tmp_path / "log/train_gpt2.py")[:16],
        "data": {"fingerprint": "f", "tokenizer": "bytes"},
        "config": vars(importlib.import_module("train_gpt2").Config()),
    }  # fmt: skip
    (tmp_path / "log/log.jsonl").write_text(json.dumps(event) + "\n")
    run(monkeypatch, tmp_path / "log", "--out", tmp_path / "out")
    event["script_hash"] = fineweb.sha256(tmp_path / "log/train_gpt2.2.py")[:16]
    (tmp_path / "log/log.jsonl").write_text(json.dumps(event) + "\n")
    with pytest.raises(SystemExit, match="train_gpt2.2.py"):
        run(monkeypatch, tmp_path / "log", "--out", tmp_path / "out2")


@pytest.mark.parametrize("fields, expected", [
    ({"activation_function": "relu"}, "has activation_function = relu, train_gpt2.py has gelu_new"),
    ({"n_inner": 96}, "n_inner|don't fit train_gpt2.py"),
    ({"vocab_size": 300}, "a vocabulary of 300, which is neither GPT-2's nor bytes"),
])  # fmt: skip
def test_gpt2_weights_that_do_not_fit_are_refused(fields, expected, tmp_path, monkeypatch):
    shape = {"vocab_size": 257, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    config = transformers.GPT2Config(**(shape | fields))
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match=expected):
        run(monkeypatch, "--from", tmp_path / "other", "--out", tmp_path / "in")


def test_another_architecture_is_refused(tmp_path, monkeypatch):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 64}
    config = transformers.OPTConfig(vocab_size=257, word_embed_proj_dim=32, **shape)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    expected = "is a OPTForCausalLM: only GPT-2, LLaMA, Mistral and Gemma 3 can be imported"
    with pytest.raises(SystemExit, match=expected):
        run(monkeypatch, "--from", tmp_path / "opt", "--out", tmp_path / "in")


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
