"""Export to other libraries and back, by the real libraries."""
import importlib
import itertools
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_same, load, perturbed, run_facts, size, with_own_tokenizer

import fineweb
import hellaswag
from tools.export import __main__ as export
from tools.export import tokenizer as tokenizers
from tools.export import weights, write

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
SCRIPTS = [*weights.HF_CLASSES, "rwkv", "mta"]
IMPORTED = [name for name in weights.HF_CLASSES if name != "deepseek"]
END = 256  # of the vocabulary of bytes, <|endoftext|>


def make_model(name, **fields):
    """A small model with large random weights, so that whatever is left out of attention shows."""
    script = importlib.import_module(f"train_{name}")
    fields = {**script.TINY_MODEL, "vocab_size": 320, "block_size": 64, **fields}
    return script, perturbed(script, **fields).eval()


BYTES = {"dataset": "sample", "tokenizer": "bytes", "vocab_size": 257, "fingerprint": "f"}


def trained(name, folder, step=7, data=BYTES, **fields):
    """A run's folder with the checkpoint of make_model(), and the model."""
    script, model = make_model(name, **fields)
    folder.mkdir(parents=True)
    shutil.copy(script.__file__, folder)
    optimizer = torch.optim.AdamW(model.optimizer_groups())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    script.save_checkpoint(folder, step, (math.inf, 0), data, model, optimizer, scaler)
    return model


def random_ids(n_rows=1):
    return torch.randint(257, (n_rows, 64), generator=torch.Generator().manual_seed(0))


# ---- whole models

OLDER = {  # what transformers 4, llama.cpp's converter and CTranslate2 read in config.json
    "gpt2": {"n_ctx": 64},
    "llama": {"rope_theta": 500_000.0},
    "mistral": {"rope_theta": 10_000.0},
    "gemma": {"rope_theta": 1e6, "rope_local_base_freq": 10_000.0, "sliding_window_pattern": 2},
    "deepseek": {"rope_theta": 10_000.0, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}


def test_one_checkpoint_of_a_run(tmp_path, run):
    trained("llama", tmp_path / "log", step=12)
    trained("llama", tmp_path / "other", step=9)
    (tmp_path / "other/step_00000009.pt").rename(tmp_path / "log/best.pt")
    for step, source in ((9, "log/best.pt"), (12, "log")):
        run(export, tmp_path / source, "--out", tmp_path / f"hf-{step}")
        assert f"- steps: {step} of" in (tmp_path / f"hf-{step}/README.md").read_text()


@pytest.mark.parametrize("name", weights.HF_CLASSES)
def test_transformers_loads_it_and_gives_the_same_logits(name, tmp_path, run):
    model = trained(name, tmp_path / "log", **({"global_every": 2} if name == "gemma" else {}))
    run(export, tmp_path / "log", "--out", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    idx = random_ids(2)
    with torch.no_grad():  # no rows for padding, which other programs want tokens for
        assert_close(model(idx)[0][..., :257], theirs(idx).logits)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert OLDER[name].items() <= config.items() and config["vocab_size"] == 257
    names = set(safetensors.load_file(tmp_path / "hf/model.safetensors"))
    assert ("h.0.ln_1.weight" in names) == (name == "gpt2")  # as OpenAI's file and mlx-lm have it
    files = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert files["tokenizer_class"] == "PreTrainedTokenizerFast"  # the name that transformers 4 knows
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "The café's  number, of 1234 things\n\n it's — 日本."
    ids = fineweb.get_tokenizer("bytes").encode_ordinary(text)
    assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == tokenizer.unk_token_id == END
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == END
    assert len(tokenizer("number " * 64, truncation=True)["input_ids"]) == 64
    assert theirs.generation_config.max_length == 64  # pipelines would go 256 tokens beyond the context


@pytest.mark.parametrize("name", ["gpt2", "mta"])
def test_a_tokenizer_of_ones_own_goes_with_the_model(name, tmp_path, run):
    folder, _, _ = with_own_tokenizer(tmp_path)
    data = fineweb.open_dataset(folder)
    size = data["vocab_size"]
    trained(name, tmp_path / "log", data=data, vocab_size=384, data_dir=str(folder))
    run(export, tmp_path / "log", "--out", tmp_path / "hf")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    text = "the of and to in a is that for it as was with"
    ids = fineweb.get_tokenizer(data["tokenizer"], str(folder)).encode_ordinary(text)
    assert tokenizer.encode(text) == ids and len(ids) > 8  # nothing put before them, nothing cut off
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == size and tokenizer.eos_token == "</s>" and tokenizer.eos_token_id == 2
    if name == "gpt2":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
        assert theirs.config.vocab_size == size
        assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mta", "rwkv"])
def test_the_cards_way_to_load_it_works(name, tmp_path, run):
    model = trained(name, tmp_path / "run")
    run(export, tmp_path / "run", "--out", tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)
    loaded = {}
    exec(code, loaded)
    ids = loaded["tokenizer"].encode("ab")
    assert (ids.ids if name == "mta" else ids) == [97, 98]
    with torch.no_grad():
        if name == "rwkv":  # its package computes the logits of the last token
            logits = loaded["model"].forward(random_ids()[0].tolist(), None)[0]
        else:
            logits = loaded["model"].eval()(random_ids())
            logits = (logits[0] if name == "mta" else logits.logits)[0, -1]
        assert_close(model(random_ids())[0][0, -1, :257], logits)


# ---- what an export holds beside the weights


@pytest.mark.parametrize("name", ["gpt2", "rwkv", "mta"])
def test_a_stopped_export_leaves_nothing_and_the_next_is_whole(name, tmp_path, monkeypatch, run):
    trained(name, tmp_path / "run")
    out = tmp_path / "out"
    held = []

    def stopped(*_):  # when the weights are written, and the card isn't yet
        held.extend(out.rglob("model.*"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write, "model_card", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(export, tmp_path / "run", "--out", out)
    assert held and not any(out.iterdir())
    run(export, tmp_path / "run", "--out", out)
    assert {"README.md", "tokenizer.json", held[0].name} <= {path.name for path in out.iterdir()}


def score(task, step, acc):
    figures = {"n": 400, "acc": acc, "acc_se": 0.022, "acc_norm": 0.7025, "acc_norm_se": 0.0229}
    return {"event": "score", "step": step, "task": task, "convention": "nanogpt"} | figures


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_card_has_the_runs_facts_and_results(name, tmp_path, run):
    from huggingface_hub import ModelCard

    trained(name, tmp_path / "run", seed=5)
    events = [
        run_facts(),
        {"event": "val", "step": 0, "loss": 5.5},
        {"event": "val", "step": 7, "loss": 3.3},
        score("cloze", 3, 0.5),
        {"event": "val", "step": 7, "loss": 1.71308},  # again, by a resumed run
        score("cloze", 7, 0.71),
        run_facts(fingerprint="other text", val_tokens=99),  # by --eval
        {"event": "val", "step": 7, "loss": 4.4},
        score("cloze", 7, 0.44),
        score("hellaswag", 7, 0.29),
    ]
    lines = [json.dumps(event) for event in events]
    lines[1:1] = ["", '{"event": "val", "st']  # of a killed run
    (tmp_path / "run/log.jsonl").write_text("\n".join(lines) + "\n")
    run(export, tmp_path / "run", "--out", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    library = {"library_name": "transformers"} if name in weights.HF_CLASSES else {}
    assert card.data.to_dict() == {"pipeline_tag": "text-generation"} | library  # no licence: none is known
    _, model = make_model(name, vocab_size=257)
    for fact in (
        f"# {name}", f"{size(model):,}", "7 of 19,073", f"{7 * 524_288:,}", "- data: sample",
        "- tokenizer: bytes", "64 tokens", '"seed": 5', "validation loss 1.7131 ", "4,096 tokens",
        "cloze (nanogpt): acc 71.00 ± 2.20, acc_norm 70.25 ± 2.29 (400 items, chance 25)",
        "hellaswag (nanogpt): acc 29.00",  # whose items are always the same
    ):  # fmt: skip
        assert fact in card.content, fact
    for other in ("3.3", "5.5", "4.4", "acc 50", "acc 44"):
        assert other not in card.content


# ---- what is imported runs


def small_gpt2(vocab_size=50_257, **fields):
    """A small GPT-2 of transformers with random weights."""
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": vocab_size}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(shape | fields))).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", IMPORTED)
def test_out_and_back_in_is_the_same_model(name, tmp_path, run):
    script, model = make_model(name, vocab_size=50_257)
    theirs = weights.hf_model(name, model.config)
    theirs.load_state_dict(weights.to_hf(name, model.state_dict(), model.config))
    if name == "mistral":  # without a window it is one that sees all
        model.config.window, theirs.config.sliding_window = 64, None
    theirs.save_pretrained("hf")
    run(export, "--from", "hf", "--out", "log/again")
    checkpoint = load(Path("log/again"), 0)
    assert checkpoint["script"] == script.SCRIPT and checkpoint["step"] == 0
    assert checkpoint["optimizer"] == checkpoint["scaler"] == {}
    assert checkpoint["config"] == vars(model.config) | {"run_name": "again"}
    data = {"dataset": "hf", "tokenizer": "gpt2", "vocab_size": 50_257, "fingerprint": ""}
    assert checkpoint["data"] == data
    assert_same(checkpoint["model"], model.state_dict())


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint(bias, tmp_path, run):
    script, model = make_model("gpt2", vocab_size=50_304)
    theirs = {}
    for key, parts in weights.tensor_names("gpt2", model.config).items():
        if key.endswith("bias") and not bias:
            for part in parts:
                model.state_dict()[part].zero_()
        else:  # all of them nn.Linear, under torch.compile's prefix
            theirs["_orig_mod." + key] = torch.cat([model.state_dict()[part] for part in parts])
    theirs["_orig_mod.lm_head.weight"] = theirs["_orig_mod.transformer.wte.weight"]
    fields = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    shape = {name: getattr(model.config, name) for name in fields}
    content = {"model": theirs, "model_args": shape | {"bias": bias, "dropout": 0.0}, "iter_num": 5}
    torch.save(content, "ckpt.pt")
    assert "GELU" in run(export, "--from", "ckpt.pt", "--out", "log/nano")[1]
    assert_same(load(Path("log/nano"), 0)["model"], model.state_dict())
    del theirs["_orig_mod.transformer.h.1.mlp.c_fc.weight"]
    torch.save(content, "less.pt")
    assert "less.pt lacks blocks.1.mlp.up.weight" in run(export, "--from", "less.pt", "--out", "log/less")[1]


@pytest.mark.parametrize("version", [3, 5])
def test_llmcs_checkpoint(version, tmp_path, run):
    """Written as llm.c's train_gpt2.py does it: float32 is version 3, bfloat16 version 5."""
    _, model = make_model("gpt2", vocab_size=50_304)
    config = model.config
    model = model.bfloat16().float() if version == 5 else model
    ours = model.state_dict()
    order = ["wte.weight", "wpe.weight"]
    for part in (
        "norm1.weight", "norm1.bias", "attention.{}.weight", "attention.{}.bias", "attention.proj.weight",
        "attention.proj.bias", "norm2.weight", "norm2.bias", "mlp.up.weight", "mlp.up.bias",
        "mlp.proj.weight", "mlp.proj.bias",
    ):  # fmt: skip
        for layer in range(config.n_layer):
            order += [f"blocks.{layer}.{part.format(letter)}" for letter in ("qkv" if "{}" in part else "-")]
    order += ["norm.weight", "norm.bias"]
    numbers = torch.cat([ours[name].flatten() for name in order])
    content = numbers.numpy() if version == 3 else numbers.bfloat16().view(torch.int16).numpy()
    header = np.zeros(256, dtype=np.int32)
    header[:8] = 20240326, version, 64, 50_257, config.n_layer, config.n_head, config.n_embd, 50_304
    Path("gpt2.bin").write_bytes(header.tobytes() + content.tobytes())
    run(export, "--from", "gpt2.bin", "--out", "log/llmc")
    assert_same(load(Path("log/llmc"), 0)["model"], ours)
    Path("half.bin").write_bytes(Path("gpt2.bin").read_bytes()[:99_999])
    assert "half.bin holds" in run(export, "--from", "half.bin", "--out", "log/half")[1]


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


@pytest.mark.slow
def test_the_commands_that_import_prints_work(tmp_path, monkeypatch, run):
    write_gpt2_data()
    theirs = small_gpt2()
    theirs.save_pretrained("theirs")
    _, said = run(export, "--from", "theirs", "--out", "log/my run")
    commands = re.findall(r"python train_gpt2.py (.*?)(?:, see .*)?$", said, re.MULTILINE)
    sample, evaluate, tune = map(shlex.split, commands)
    assert tune == ["--init_from", "log/my run/step_00000000.pt"]
    script = importlib.import_module("train_gpt2")
    status, said = run(script, *sample)
    assert status == 0 and said.count("Hello") >= 2
    options = ["--val_tokens=1920", "--sample_tokens=4", "--hellaswag=none.jsonl"]
    monkeypatch.setattr(hellaswag, "download", lambda path: fineweb.fail("no network"))
    status, said = run(script, *evaluate, *options)
    assert status == 0, said
    loss = float(re.findall("validation loss ([0-9.]+)", said)[0])
    windows = fineweb.Windows("data/fineweb10B", "val", 64, max_tokens=1920)
    rows = torch.from_numpy(windows.rows(range(len(windows))))
    with torch.no_grad():
        logits = theirs(rows[:, :-1]).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten()).item()
    assert loss == pytest.approx(expected, abs=6e-5)

    # and training starts at the loss of the weights that were imported
    options += ["--run_name=tuned", "--max_steps=1", "--warmup_steps=1", "--batch_tokens=128"]
    status, said = run(script, "--init_from=log/my run", *options)  # a run's folder is understood, too
    assert status == 0, said
    first, after = map(float, re.findall("validation loss ([0-9.]+)", said))
    assert first == pytest.approx(loss, abs=2e-4) and after != first


# ---- mistakes


def test_mistakes_are_one_line(tmp_path, run, capsys):
    trained("gpt2", tmp_path / "run")
    capsys.readouterr()  # that it was saved
    for name in ("full/something", "lora/adapter_config.json", "file", "ckpt.pt", "model.bin"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    mistakes = {
        ("--out", "hf"): "--from",
        ("nowhere", "--out", "hf"): "nowhere holds no checkpoint",
        ("run/nothing.pt", "--out", "hf"): "run/nothing.pt",
        ("run", "--out", "full"): "full is not empty",
        ("run", "--out", "file"): "--out file is a file",
        ("run", "--out", "file/hf"): ": Not a directory",
        ("--from", "full", "--out", "log/in"): "full has no config.json",
        ("--from", "lora", "--out", "log/in"): "lora is a LoRA adapter: merge it",
        ("--from", "run", "--out", "log/in"): "--init_from run/step_00000007.pt",
        ("--from", "file", "--out", "log/in"): "file is no GPT-2 of llm.c",
        ("--from", "model.bin", "--out", "log/in"): "model.bin is no GPT-2 of llm.c",
        ("--from", "ckpt.pt", "--out", "log/in"): "ckpt.pt is no checkpoint of nanoGPT",
        ("--from", "full", "--out", "file"): "--out log/NAME",
        ("--from", "full", "--out", "log"): "--out log/NAME",
        ("--from", "full", "--out", "log/.."): "--out log/NAME",
    }
    for arguments, expected in mistakes.items():
        status, said = run(export, *arguments)
        assert status == 1 and expected in said and said.count("\n") == 1, said
    assert not Path("hf").exists() and not Path("log").exists()
    with pytest.raises(SystemExit, match="gpt2 .*tools.export --from"):  # for --init_from gpt2
        fineweb.load_checkpoint(["gpt2"], "train_gpt2", {})


@pytest.mark.parametrize("change, expected", [
    ("lacks", "lacks weights: transformer.h.1.mlp.c_fc.weight"),
    ("two heads", "another model than train_gpt2.py's"),
    ({"activation_function": "relu"}, "another model than train_gpt2.py's"),
    ({"tie_word_embeddings": False}, "another model than train_gpt2.py's"),
    ({"n_inner": 96}, "don't fit train_gpt2.py"),
    ({"vocab_size": 300}, "a vocabulary of 300"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(change, expected, tmp_path, run):
    model = small_gpt2(**(change if isinstance(change, dict) else {}))
    model.save_pretrained("hf")
    tensors = safetensors.load_file("hf/model.safetensors")
    if change == "lacks":  # transformers would fill it in with random ones
        del tensors["transformer.h.1.mlp.c_fc.weight"]
    if change == "two heads":  # by the config it is one
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 0.01
    safetensors.save_file(tensors, "hf/model.safetensors", {"format": "pt"})
    status, said = run(export, "--from", "hf", "--out", "log/in")
    assert status == 1 and expected in said.splitlines()[-1] and not Path("log").exists()


@pytest.mark.parametrize("name, old, new", [
    ("gpt2", 'approximate="tanh"', 'approximate="none"'),
    ("rwkv", "F.relu(", "F.gelu("),
])  # fmt: skip
def test_a_run_of_an_edited_model_is_refused(name, old, new, tmp_path, run):
    trained(name, tmp_path / "log")
    copy = tmp_path / f"log/train_{name}.py"
    text = copy.read_text()
    assert old in text
    copy.write_text(text.replace("def validate(", "# which all share\ndef validate("))
    run(export, tmp_path / "log", "--out", tmp_path / "out")
    copy.write_text(text.replace(old, new))
    status, said = run(export, tmp_path / "log", "--out", tmp_path / "out2")
    assert status == 1 and f"train_{name}.py has another model" in said.splitlines()[-1]


@pytest.mark.slow
def test_gpt2_tokenizer_equals_tiktokens():
    try:
        encoding = fineweb.get_tokenizer("gpt2")
    except SystemExit:
        pytest.skip("GPT-2's vocabulary is not on this machine and there is no network")
    tokenizer = tokenizers.hf_tokenizer(encoding)
    for text in ("Hello, I'm a  model,", "  two  \n\n\tand a tab", "don't 12345 naïve 日本語 🙂 <|end"):
        assert tokenizer.encode(text).ids == encoding.encode_ordinary(text)
    assert tokenizer.get_vocab_size() == 50_257 and tokenizer.token_to_id("<|endoftext|>") == 50_256
