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


# ==========================================================================
# Reading a run


def read_run(folder):
    """(its script, newest checkpoint) of a run: the module is the run's own copy. SystemExit if it has none."""
    paths = sorted(folder.glob(CHECKPOINTS), reverse=True)
    copies = sorted(folder.glob("train_*.py"))
    if not paths or not copies:
        what = "copy of a training script" if paths else "checkpoint"
        fail(f"{folder} holds no {what}: give the folder of a run, as log/gpt2")
    name = copies[0].stem
    script, why = load_script(name, folder)
    if script is None:
        fail(f"{copies[0]} {why}")
    return script, fineweb.load_checkpoint(paths, name, vars(script.Config()))


@torch.no_grad()
def check_logits(ours, theirs, config, what):
    """Raises SystemExit, which begins with what, unless two models give the same logits on random tokens.

    Each of them takes ids (1, T) and returns (1, T, V).
    """
    idx = torch.randint(config.vocab_size, (1, min(config.block_size, 1024)))
    expected = ours(idx)
    errors = (theirs(idx) - expected).abs().amax(-1)[0] / expected.abs().max()
    error = errors.quantile(0.9).item()  # at a few tokens a close choice of a router may be another
    if not error <= 1e-3:
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


# ==========================================================================
# The model card

LOST = {  # what other programs make of an export, beside transformers
    "mistral": "llama.cpp and CTranslate2 leave out the sliding window: beyond {window} tokens their logits "
    "are others.",
    "gemma": "llama.cpp and CTranslate2 take every sixth layer for one with full attention, here it is "
    "every {global_every}th.",
    "deepseek": "The class lacks the prediction of a second token: its parameters are left out.",
}


def is_lost(name, config):
    """Whether LOST's sentence on an architecture is true of a model."""
    if name == "mistral":
        return config.window < config.block_size
    if name == "gemma":
        return config.global_every != 6
    return name == "deepseek" and config.mtp_depth != "0"


def front_matter(data, library):
    """The YAML that the hub reads at the top of a model card: what is known, so no licence."""
    lines = ["---", "pipeline_tag: text-generation"]
    if library:
        lines.append(f"library_name: {library}")
    repository = data["dataset"].split(" ")[0]  # its folder may follow
    if "/" in repository and data["fingerprint"]:
        lines += ["datasets:", f"- {repository}"]
    return "\n".join([*lines, "---", ""])


def model_card(name, model, checkpoint, source, how):
    """README.md of an exported model, in Markdown.

    source: the run's copy of its script. how: Markdown that says how to load it.
    """
    step = checkpoint["step"]
    data = checkpoint["data"]
    config = model.config
    tokens = step * config.batch_tokens
    trained = sum(p.numel() for p in model.parameters())
    results = read_results(source.with_name("log.jsonl"), checkpoint)
    facts = {
        "architecture": name,
        "parameters": f"{trained:,} trained, without padding of the vocabulary",
        "steps": f"{step:,} of {config.max_steps:,}",
        "tokens": f"{tokens:,}",
        "initial weights": config.init_from or "random",
        "data": data["dataset"],
        "tokenizer": data["tokenizer"],
        "context": f"{config.block_size:,} tokens, those of the prompt and those to come",
        "recipe": f"{config.recipe}, with the settings below",
        "seed": config.seed,
        "script": f"{source.name}, sha256 {script_hash(source)}…",
    }
    lines = [f"# {name}, trained with NanoTitan", ""]
    if step == 0:
        lines += [f"Not trained: its weights were imported from {data['dataset']}.", ""]
        facts["initial weights"] = data["dataset"]
    lines += [
        f"A small language model ({trained:,} parameters, trained on {tokens:,} tokens), made to compare "
        "architectures and not for use: nothing has taught it to follow instructions, and what it says is "
        "often wrong.",
        "",
    ]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", "## Results", ""]
    if results:
        lines += [f"- {line}" for line in results]
        lines += ["", f"Of step {step}; ± is one standard error, over the items."]
    else:
        lines.append(f"The log has no evaluation of step {step} on the data above.")
    lines += ["", "## How to load it", "", how]
    if is_lost(name, config):
        lines += ["", LOST[name].format(**vars(config))]
    lines += ["", "## Config", "", "```json", json.dumps(checkpoint["config"], indent=1), "```", ""]
    library = "transformers" if name in weights.HF_CLASSES else None
    return front_matter(data, library) + "\n".join(lines)


# ==========================================================================
# The three kinds of folders. Each function writes the weights into one, and returns how to load them


def python(*lines):
    return "\n".join(["", "```python", *lines, "```"])


def write_hf(name, model, folder, out):
    """A model of transformers."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # one of a single step
    config = model.config
    theirs = weights.hf_model(name, config).eval()
    theirs.load_state_dict(weights.to_hf(name, model.state_dict(), config))
    what = f"the run's train_{name}.py has another model than transformers' {weights.HF_CLASSES[name]}"
    check_logits(lambda idx: model(idx)[0], lambda idx: theirs(idx).logits, config, what)
    # without max_length pipelines add 256 tokens, which may be more than the context
    theirs.generation_config.update(do_sample=True, top_k=50, max_length=config.block_size)
    theirs.save_pretrained(folder)
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) | weights.older_fields(name, config)
    path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    how = "Load it with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`."
    return how + "\n" + python(
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"folder = {str(out)!r}  # the one of this file",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForCausalLM.from_pretrained(folder)",
    )


def write_official_rwkv(model, folder, out):
    """The .pth of RWKV-7's authors."""
    import train_rwkv

    today = train_rwkv.Model(model.config).eval()
    today.load_state_dict(model.state_dict())
    what = "the run's train_rwkv.py has another model than today's, which is RWKV-7"
    check_logits(lambda idx: model(idx)[0], lambda idx: today(idx)[0], model.config, what)
    tensors = weights.to_official_rwkv(model.state_dict(), model.config)
    fineweb.write_atomic(folder / "model.pth", lambda file: torch.save(tensors, file))
    return "Load it with the package `rwkv`.\n" + python(
        "import os",
        "os.environ['RWKV_V7_ON'] = '1'  # before the import",
        "from rwkv.model import RWKV",
        "from rwkv.utils import PIPELINE",
        "",
        f"folder = {str(out)!r}  # the one of this file",
        "model = RWKV(model=folder + '/model', strategy='cpu fp32')",
        "tokenizer = PIPELINE(model, folder + '/tokenizer.json')",
    )


def write_safetensors(name, model, folder, out):
    """The tensors under our names."""
    from safetensors.torch import save_file

    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    fields = json.dumps({"architecture": name, **vars(model.config)}, indent=1)
    (folder / "config.json").write_text(fields, encoding="utf-8")
    print(f"{name}: no library has a class for it, so the safetensors have train_{name}.py's names")
    how = f"No library has a class for this architecture: load it with the Model of `train_{name}.py`."
    return how + "\n" + python(
        "import json",
        "from pathlib import Path",
        "from safetensors.torch import load_file",
        "from tokenizers import Tokenizer",
        "from tools.common import load_script",
        "",
        f"folder = Path({str(out)!r})  # the one of this file",
        f"script, _ = load_script('train_{name}', folder)  # its own copy",
        "fields = json.loads((folder / 'config.json').read_text())",
        "del fields['architecture']",
        "model = script.Model(script.Config(**fields))",
        "model.load_state_dict(load_file(folder / 'model.safetensors'))",
        "tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))",
    )


def export(folder, out):
    """Writes the newest checkpoint of a run as what others load."""
    check_out(out)
    script, checkpoint = read_run(folder)
    name = checkpoint["script"].removeprefix("train_")
    data = checkpoint["data"]
    config = script.Config(**checkpoint["config"])
    tokenizer = fineweb.get_tokenizer(data["tokenizer"], config.data_dir)
    # without the rows that pad the vocabulary: other programs look a token up for each
    config.vocab_size = data["vocab_size"]
    checkpoint["model"]["wte.weight"] = checkpoint["model"]["wte.weight"][: config.vocab_size]
    model = script.Model(config).eval()
    model.load_state_dict(checkpoint["model"])
    source = folder / f"train_{name}.py"
    with all_or_nothing(out) as part:
        if name in weights.HF_CLASSES:
            how = write_hf(name, model, part, out)
        elif name == "rwkv":
            how = write_official_rwkv(model, part, out)
        else:
            how = write_safetensors(name, model, part, out)
            shutil.copyfile(source, part / source.name)
        write_tokenizer(tokenizer, config.block_size, part)
        card = model_card(name, model, checkpoint, source, how)
        readme = part / "README.md"
        readme.write_text(card, encoding="utf-8")
        for path in part.iterdir():  # safetensors makes files that only their owner can read
            path.chmod(readme.stat().st_mode)
    print(f"{out}: {how.splitlines()[0]}")
