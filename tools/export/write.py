"""A run's newest checkpoint as the folder that others load: weights, config, tokenizer and model card."""
import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import torch

import fineweb
import hellaswag
from fineweb import fail
from tools.common import load_script, script_hash
from tools.export import weights
from tools.export.tokenizer import write_tokenizer

CHECKPOINTS = "step_????????.pt"


def check_out(out):
    """Raises SystemExit unless a folder is empty or not there yet."""
    if out.is_file():
        fail(f"--out {out} is a file: give a folder that is empty or not there yet")
    if out.exists() and any(out.iterdir()):
        fail(f"{out} is not empty: choose another --out")


@contextlib.contextmanager
def all_or_nothing(out):
    """A folder to write into. Its files go to `out` at the end, and none does if the writing fails."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=out) as scratch:
        yield Path(scratch)
        for path in list(Path(scratch).iterdir()):
            path.rename(out / path.name)


def read_run(folder):
    """(path of its own copy of its script, Model, checkpoint) of a run, or of one checkpoint of a run.

    Raises SystemExit if it has none.
    """
    paths = sorted(folder.glob(CHECKPOINTS), reverse=True)
    if folder.is_file():
        paths = [folder]
        folder = folder.parent
    copies = sorted(folder.glob("train_*.py"))
    if not paths or not copies:
        what = "copy of a training script" if paths else "checkpoint"
        fail(f"{folder} holds no {what}: give the folder of a run, as log/gpt2")
    script, why = load_script(copies[0].stem, folder)
    if script is None:
        fail(f"{copies[0]} {why}")
    checkpoint = fineweb.load_checkpoint(paths, copies[0].stem, vars(script.Config()))
    config = script.Config(**checkpoint["config"])
    # without the rows that pad the vocabulary, since other programs look a token up for each
    config.vocab_size = checkpoint["data"]["vocab_size"]
    checkpoint["model"]["wte.weight"] = checkpoint["model"]["wte.weight"][: config.vocab_size]
    model = script.Model(config).eval()
    model.load_state_dict(checkpoint["model"])
    return copies[0], model, checkpoint


@torch.no_grad()
def check_logits(ours, theirs, config, what):
    """Raises SystemExit, beginning with what, unless two functions of ids give the same logits (1, T, V)."""
    idx = torch.randint(config.vocab_size, (1, min(config.block_size, 1024)))
    expected = ours(idx)
    errors = (theirs(idx) - expected).abs().amax(-1)[0] / expected.abs().max()
    error = errors.quantile(0.75).item()  # at a few tokens a close choice of a router may be another
    if not error <= 1e-4:  # rounding makes up to 3e-5, the other form of GELU 2e-4
        fail(f"{what} (the logits differ by {error:.1e} of the largest)")


def read_results(path, checkpoint):
    """The loss and the scores of a checkpoint in a run's log, in words: a list of lines.

    A later --eval on other text is in the log, too: its loss, and its cloze, are no results of this run.
    """
    found = {}
    own = False
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:  # a blank line, or half of one of a killed run
            continue
        if event["event"] == "run":
            own = event["data"]["fingerprint"] == checkpoint["data"]["fingerprint"]
            val_tokens = event["config"]["val_tokens"]
        if event.get("step") != checkpoint["step"]:
            continue
        if event["event"] == "val" and own:  # of several the last counts
            loss = f"validation loss {event['loss']:.4f} nats per token"
            found["loss"] = f"{loss}, on up to {val_tokens:,} tokens"
        if event["event"] == "score" and (own or event["task"] == "hellaswag"):
            found[event["task"], event["convention"]] = hellaswag.one_line(event)
    return list(found.values())


HOW_HF = """Load it with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder!r}  # the one of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
```
"""
HOW_RWKV = """Load it with the package `rwkv`.

```python
import os
os.environ["RWKV_V7_ON"] = "1"  # before the import
from rwkv.model import RWKV
from rwkv.utils import PIPELINE

folder = {folder!r}  # the one of this file
model = RWKV(model=folder + "/model", strategy="cpu fp32")
tokenizer = PIPELINE(model, folder + "/tokenizer.json")
```
"""
HOW_OURS = """No library has a class for it: load it with the Model of its script, in the folder of NanoTitan.

```python
import json
from pathlib import Path
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tools.common import load_script

folder = Path({folder!r})  # the one of this file
script, _ = load_script({script!r}, folder)
model = script.Model(script.Config(**json.loads((folder / "config.json").read_text())))
model.load_state_dict(load_file(folder / "model.safetensors"))
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
```
"""


def write_hf(name, model, end, folder):
    """A model of transformers, for which the token end ends a text."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # one of a single step
    config = model.config
    theirs = weights.hf_model(name, config, end).eval()
    theirs.load_state_dict(weights.to_hf(name, model.state_dict(), config))
    what = f"the run's train_{name}.py has another model than transformers' {weights.HF_CLASSES[name]}"
    check_logits(lambda idx: model(idx)[0], lambda idx: theirs(idx).logits, config, what)
    # without max_length pipelines add 256 tokens, which may be more than the context
    theirs.generation_config.update(do_sample=True, top_k=50, max_length=config.block_size)
    theirs.config.update(weights.older_fields(name, config))
    # GPT-2's names without their prefix, as in OpenAI's file: transformers reads both, mlx-lm those alone
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in theirs.state_dict().items()}
    theirs.save_pretrained(folder, state_dict=tensors)


def write_official_rwkv(model, folder):
    """The .pth of RWKV-7's authors."""
    import train_rwkv

    today = train_rwkv.Model(model.config).eval()
    today.load_state_dict(model.state_dict())
    what = "the run's train_rwkv.py has another model than today's, which is RWKV-7"
    check_logits(lambda idx: model(idx)[0], lambda idx: today(idx)[0], model.config, what)
    tensors = weights.to_official_rwkv(model.state_dict(), model.config)
    fineweb.write_atomic(folder / "model.pth", lambda file: torch.save(tensors, file))


def write_ours(model, source, folder):
    """The tensors under our names, and the script."""
    from safetensors.torch import save_file

    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(vars(model.config), indent=1), encoding="utf-8")
    shutil.copyfile(source, folder / source.name)


def losses_elsewhere(name, config):
    """Sentences on what is lost of an export, in the class or in other programs, or an empty string."""
    lost = []
    if name == "mistral" and config.window < config.block_size:
        lost.append(f"Beyond {config.window} tokens llama.cpp and mlx-lm 0.32, which leave out the window, "
                    "and CTranslate2 4.8 give other logits.")  # fmt: skip
    if name == "gemma" and config.window < config.block_size:
        lost.append(f"After prompts of more than {config.window} tokens CTranslate2 4.8 gives other logits.")
    if name == "gemma" and config.global_every != 6:
        lost.append(f"llama.cpp gives every sixth layer full attention, not every {config.global_every}.")
    if name == "deepseek":
        lost.append("mlx-lm 0.32 doesn't load it: its DeepSeek has a head that isn't tied to the embedding.")
    if name == "deepseek" and config.mtp_depth != "0":
        lost.append("The class lacks the prediction of a second token: its parameters are left out.")
    return " ".join(lost)


def model_card(name, model, checkpoint, source, how):
    """README.md of an exported model, in Markdown. source: the run's script. how: to load it."""
    step = checkpoint["step"]
    data = checkpoint["data"]
    config = model.config
    tokens = step * config.batch_tokens
    trained = sum(p.numel() for p in model.parameters())
    library = ["library_name: transformers"] if name in weights.HF_CLASSES else []
    lines = ["---", "pipeline_tag: text-generation", *library, "---", f"# {name}, trained with NanoTitan", ""]
    if step == 0:
        lines += [f"Not trained: its weights were imported from {data['dataset']}.", ""]
    lines += [
        f"A small language model ({trained:,} parameters, trained on {tokens:,} tokens), made to compare "
        "architectures and not for use: nothing has taught it to follow instructions, and what it says is "
        "often wrong.",
        "",
        f"- architecture: {name}",
        f"- parameters: {trained:,} trained, without padding of the vocabulary",
        f"- steps: {step:,} of {config.max_steps:,}",
        f"- tokens: {tokens:,}",
        f"- data: {data['dataset']}",
        f"- tokenizer: {data['tokenizer']}",
        f"- context: {config.block_size:,} tokens, those of the prompt and those to come",
        f"- script: {source.name}, sha256 {script_hash(source)}…",
        "",
        "## Results",
        "",
    ]
    results = read_results(source.with_name("log.jsonl"), checkpoint)
    lines += [f"- {line}" for line in results] or ["The log has none of this step and data."]
    lines += ["", f"Of step {step}; ± is one standard error, over the items."] if results else []
    lines += ["", "## How to load it", "", how, losses_elsewhere(name, config), ""]
    lines += ["## Config", "", "```json", json.dumps(checkpoint["config"], indent=1), "```", ""]
    return "\n".join(lines)


def export(folder, out):
    """Writes the newest checkpoint of a run as what others load."""
    check_out(out)
    source, model, checkpoint = read_run(folder)
    name = source.stem.removeprefix("train_")
    tokenizer = fineweb.get_tokenizer(checkpoint["data"]["tokenizer"], model.config.data_dir)
    with all_or_nothing(out) as part:
        if name in weights.HF_CLASSES:
            how = HOW_HF
            write_hf(name, model, tokenizer.eot_token, part)
        elif name == "rwkv":
            how = HOW_RWKV
            write_official_rwkv(model, part)
        else:
            how = HOW_OURS
            write_ours(model, source, part)
        how = how.format(folder=str(out), script=source.stem)
        write_tokenizer(tokenizer, model.config.block_size, part)
        readme = part / "README.md"
        readme.write_text(model_card(name, model, checkpoint, source, how), encoding="utf-8")
        for path in part.iterdir():  # safetensors makes files that only their owner can read
            path.chmod(readme.stat().st_mode)
    print(f"{out}: {how.splitlines()[0]}")
