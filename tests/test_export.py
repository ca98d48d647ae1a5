"""Export to other libraries and back, by the real libraries."""
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import fineweb
import hellaswag
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
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 256
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


# ---- what an export holds beside the weights

SCRIPTS = [*weights.HF_CLASSES, "rwkv", "mta"]


def test_files_have_the_permissions_of_any_other_file(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        for name in SCRIPTS:
            trained(name, tmp_path / name)
            call(monkeypatch, tmp_path / name, "--out", tmp_path / "out" / name)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) >= 4 * len(weights.HF_CLASSES) + 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


@pytest.mark.parametrize("name", ["gpt2", "rwkv", "mta"])
def test_an_export_that_is_stopped_leaves_nothing(name, tmp_path, monkeypatch):
    trained(name, tmp_path / "run")
    held = []

    def stopped(*_):  # when the weights are written, and the card isn't yet
        held.extend((tmp_path / "out").rglob("model.*"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "model_card", stopped)
        with pytest.raises(KeyboardInterrupt):
            call(monkeypatch, tmp_path / "run", "--out", tmp_path / "out")
    assert held and not any((tmp_path / "out").iterdir())
    call(monkeypatch, tmp_path / "run", "--out", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "README.md" in names and names & {"model.safetensors", "model.pth"}


def write_log(folder, script, *events):
    """A log.jsonl of one start and these events."""
    start = {
        "event": "run", "script": script.__name__, "processes": 1, "parameters": 1, "flops_per_token": 1,
        "git": "abc123-dirty", "torch": "9.9.9", "data": {"fingerprint": "f", "tokenizer": "bytes"},
        "config": vars(script.Config(val_tokens=4096)),
    }  # fmt: skip
    lines = [json.dumps(event) for event in (start, *events)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")


SCORE = {"event": "score", "task": "cloze", "convention": "nanogpt", "n": 400, "acc": 0.71, "acc_se": 0.022,
         "acc_norm": 0.7025, "acc_norm_se": 0.0229}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_card_has_the_runs_facts_and_results(name, tmp_path, monkeypatch):
    from huggingface_hub import ModelCard

    model = trained(name, tmp_path / "run", seed=5)
    script = importlib.import_module(f"train_{name}")
    write_log(
        tmp_path / "run", script,
        {"event": "val", "step": 0, "loss": 5.5},
        {"event": "train", "step": 0, "ms": 1},
        {"event": "val", "step": 7, "loss": 3.3},
        SCORE | {"step": 3, "acc": 0.5},
        SCORE | {"step": 7},
        {"event": "val", "step": 7, "loss": 1.71308},  # by a later --eval
    )  # fmt: skip
    call(monkeypatch, tmp_path / "run", "--out", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    fields = {"language": "en", "pipeline_tag": "text-generation"}
    if name in weights.HF_CLASSES:
        fields["library_name"] = "transformers"
    assert card.data.to_dict() == fields  # no licence: nobody has said one
    trainable = sum(parameter.numel() for parameter in model.parameters())
    tokens = 7 * 524_288
    expected = [
        "# " + name, f"- parameters: {trainable:,} trained", "- steps: 7 of 19,073", f"- tokens: {tokens:,}",
        "- data: sample", "- tokenizer: bytes", "- seed: 5", "- git commit: abc123-dirty", "- torch: 9.9.9",
        "- recipe: paper, max_lr 0.0006, ", f"sha256 {fineweb.script_hash(script.__file__)}",
        "validation loss 1.7131 nats per token, on up to 4,096 tokens", "one standard error",
        "cloze (nanogpt): acc 71.00 ± 2.20, acc_norm 70.25 ± 2.29 (400 items, chance 25)",
        f"({trainable:,} parameters, trained on {tokens:,} tokens)", "not for use", '"n_embd"',
    ]  # fmt: skip
    for words in expected:
        assert words in card.content, words
    assert "3.3" not in card.content and "5.5" not in card.content and "acc 50" not in card.content


def test_the_card_says_what_is_not_known(tmp_path, monkeypatch):
    import train_gpt2 as script

    trained("gpt2", tmp_path / "run")

    def card():
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        call(monkeypatch, tmp_path / "run", "--out", out)
        return (out / "README.md").read_text()

    assert "losses and scores are unknown: its log.jsonl is not there." in card()
    (tmp_path / "run/log.jsonl").write_text("nothing\nof the kind\n")
    assert "losses and scores are unknown: line 1 of its log.jsonl is not an event of a run." in card()
    write_log(tmp_path / "run", script, {"event": "val", "step": 3, "loss": 3.3})
    assert "Step 7 was not evaluated." in card()
    data = {"dataset": "HuggingFaceFW/fineweb-edu sample/10BT", "tokenizer": "bytes", "fingerprint": "f"}
    retag(tmp_path / "run", data=data)
    assert "datasets:\n- HuggingFaceFW/fineweb-edu\nlanguage: en\n" in card()
    retag(tmp_path / "run", data=data | {"dataset": "files"})
    assert "language" not in card().split("---")[1]
    retag(tmp_path / "run", step=0)
    assert "Not trained yet: its weights are random." in card()
    retag(tmp_path / "run", data=data | {"dataset": "gpt2", "fingerprint": ""})
    assert "Not trained yet: its weights were imported from gpt2." in card()


@pytest.mark.parametrize("name", ["llama", "mta"])
def test_the_cards_way_to_load_it_works(name, tmp_path, monkeypatch):
    model = trained(name, tmp_path / "run")
    call(monkeypatch, tmp_path / "run", "--out", tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)
    loaded = {}
    exec(code, loaded)
    assert loaded["tokenizer"].encode("ab") == [97, 98]
    idx = torch.randint(257, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = loaded["model"].eval()(idx)
        assert_close(model(idx)[0], logits[0] if name == "mta" else logits.logits)


# ---- what is imported runs


def make_hf(folder, vocab_size):
    """A small GPT-2 of transformers with random weights, in a folder."""
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 96}
    config = transformers.GPT2Config(vocab_size=vocab_size, bos_token_id=256, eos_token_id=256, **shape)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def mean_loss(model, data_dir, n_tokens):
    """transformers' loss on the first validation windows."""
    windows = fineweb.Windows(data_dir, "val", 96, max_tokens=n_tokens)
    rows = torch.from_numpy(windows.rows(range(len(windows))))
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def write_gpt2_data():
    """Made up, but of GPT-2's size: tokens in data/fineweb10B and a vocabulary in data/gpt2."""
    folder = Path("data/fineweb10B")
    folder.mkdir(parents=True)
    for split in ("val", "train"):
        tokens = torch.randint(50_257, (60_000,), generator=torch.Generator().manual_seed(1)).numpy()
        content = fineweb.shard_header(len(tokens)) + tokens.astype("uint16").tobytes()
        (folder / f"x_{split}_000000.bin").write_bytes(content)
    # the files' way to write the 256 bytes, in this order: those that can be printed, then the others
    letters = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + n) for n in range(256 - len(letters))]
    merges = list(itertools.product(letters, letters))[:50_000]
    names = letters + [first + second for first, second in merges]
    Path("data/gpt2").mkdir()
    lines = ["#version"] + [" ".join(pair) for pair in merges]
    Path("data/gpt2/vocab.bpe").write_text("\n".join(lines) + "\n", encoding="utf-8")
    Path("data/gpt2/encoder.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))


def printed_commands(said):
    """What follows "Next:" and "To score it:"."""
    return re.findall(r"^(?:Next|To score it): (.*)$", said, re.MULTILINE)


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_the_commands_that_import_prints_work(tokenizer, tmp_path, monkeypatch, run, request):
    theirs = make_hf(tmp_path / "theirs", fineweb.VOCAB_SIZE[tokenizer])
    script = importlib.import_module("train_gpt2")
    if tokenizer == "gpt2":
        write_gpt2_data()
    status, said = run(export, "--from", "theirs", "--out", "log/my run")
    assert status == 0
    sample, evaluate = printed_commands(said)
    (tune,) = re.findall("^To fine-tune it: (.*), see the README$", said, re.MULTILINE)
    assert tune == "python train_gpt2.py --init_from 'log/my run/step_000000.pt'"
    assert sample == "python train_gpt2.py --run_name 'my run' --sample \"Hello\""
    if tokenizer == "bytes":
        get, evaluate = evaluate.split(" && ")
        assert get == "python fineweb.py --sample"
        shutil.copytree(request.getfixturevalue("small_sample"), "data/sample")
    assert evaluate == "python train_gpt2.py --run_name 'my run' --eval"

    status, said = run(script, *shlex.split(sample)[2:])
    assert status == 0 and said.count("Hello") >= 2
    options = ["--val_tokens=1920", "--sample_tokens=4", "--hellaswag=none.jsonl"]
    monkeypatch.setattr(hellaswag, "download", lambda path: fineweb.fail("no network"))
    status, said = run(script, *shlex.split(evaluate)[2:], *options)
    assert status == 0, said
    events = map(json.loads, Path("log/my run/log.jsonl").read_text().splitlines())
    (loss,) = [event["loss"] for event in events if event["event"] == "val"]
    data_dir = "data/sample" if tokenizer == "bytes" else "data/fineweb10B"
    assert loss == pytest.approx(mean_loss(theirs, data_dir, 1920), rel=1e-5)
    assert ("cloze" in said) == (tokenizer == "bytes")

    # and training starts at the loss of the weights that were imported
    options += ["--run_name=tuned", f"--data_dir={data_dir}", "--max_steps=1", "--warmup_steps=0", "--batch_tokens=192"]
    status, said = run(script, *shlex.split(tune)[2:], *options)
    assert status == 0, said
    events = map(json.loads, Path("log/tuned/log.jsonl").read_text().splitlines())
    first, after = [event["loss"] for event in events if event["event"] == "val"]
    assert first == pytest.approx(loss, rel=1e-5) and after != first


def test_the_next_command_in_a_fresh_process(tmp_path, run):
    """As a user types it, in the project's root."""
    for name in ("fineweb.py", "hellaswag.py", "train_gpt2.py"):
        shutil.copy(ROOT / name, tmp_path)
    make_hf(tmp_path / "theirs", 257)
    _, said = run(export, "--from", "theirs", "--out", "log/mine")
    command = printed_commands(said)[0]
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    process = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "Hello" in process.stdout


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
