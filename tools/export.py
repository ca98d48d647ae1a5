"""
A finished run for use elsewhere, and others' weights for use here.

    python -m tools.export log/llama --out hf/llama         # weights, config, tokenizer, model card
    python -m tools.export --from hf/llama --out log/again  # a checkpoint for train_llama.py

GPT-2, LLaMA, Mistral, Gemma and DeepSeek become transformers' own classes, for AutoModelForCausalLM,
pipelines and lm-evaluation-harness; RWKV-7 becomes the authors' .pth, for the package rwkv. No library
has a class for MTA: it becomes safetensors with our names. --from takes GPT-2 (OpenAI's included),
LLaMA, Mistral and Gemma weights that fit a script's Config.

A run whose script's model is not today's is refused: its weights would come out as another model.
"""
import argparse
import ast
import base64
import importlib
import json
import tempfile
from pathlib import Path

import torch

import fineweb
from tools import compare, weights
from tools.sync import sections

# GPT-2's pattern of words. The vocabulary of bytes merges nothing, so it makes no difference there.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# ----------------------------------------------------------------------------------------------------------
# Export


def read_checkpoint(folder):
    """A run's (script module, Config, newest checkpoint). Raises SystemExit if it has none."""
    import train_gpt2  # every script reads checkpoints by the same function

    checkpoint = train_gpt2.load_checkpoint(folder)
    if checkpoint is None:
        fineweb.fail(f"{folder} holds no checkpoint: give the folder of a run, as log/gpt2")
    name = checkpoint["script"]
    other_version = f"{folder} was written by another version of {name}.py: use the tools of that one"
    try:
        script = importlib.import_module(name)
        config = script.Config(**checkpoint["config"])
    except (ImportError, TypeError):
        fineweb.fail(other_version)
    if checkpoint["format"] != script.CHECKPOINT_FORMAT:
        fineweb.fail(other_version)
    return script, config, checkpoint


def model_code(text):
    """A script's own definitions, by which two texts have the same model: without comments and layout.

    The fields of Config are left out, since a checkpoint has their values, and so are --tiny and the recipe.
    """
    own = ""
    for title, lines in sections(text)[1:]:  # the first part is the docstring
        if title is None and not lines[0].startswith(" "):
            own += "".join(lines)
    try:
        tree = ast.parse(own or text)  # without the banners all of it counts
    except SyntaxError:
        return own or text
    definitions = []
    for node in tree.body:
        names = [getattr(target, "id", None) for target in getattr(node, "targets", [])]
        if names not in (["TINY_MODEL"], ["RECIPE"]):
            definitions.append(ast.unparse(node))
    return "\n".join(definitions)


def check_script(folder, script):
    """Raises SystemExit if a run's copy of its script has another model than the script has today."""
    name = script.__name__
    today = Path(script.__file__)
    try:
        script_hash, _ = compare.trained_hash(folder, compare.read_log(folder / "log.jsonl").training())
    except (OSError, compare.Unreadable):
        script_hash = None
    if script_hash == compare.hash_file(today):
        return
    copy = compare.find_copy(folder, name, script_hash) or compare.find_copy(folder, name, None)
    if copy is None:
        print(f"{folder} holds no copy of {name}.py, so whether its model is today's can't be checked")
        return
    if model_code(copy.read_text(encoding="utf-8")) != model_code(today.read_text(encoding="utf-8")):
        fineweb.fail(f"{folder} was trained by another model than {name}.py has today: "
                     f"see diff {copy} {today.name}, and export it beside that version of {today.name}")  # fmt: skip


def hf_tokenizer(name):
    """transformers' tokenizer that gives the same ids as ours called name."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    encoding = fineweb.get_tokenizer(name)
    end = "<|endoftext|>"
    with tempfile.TemporaryDirectory() as folder:  # Windows opens no temporary file twice
        file = Path(folder) / "vocabulary.tiktoken"
        with open(file, "wb") as f:
            for token in range(encoding.eot_token):
                token_bytes = encoding.decode_single_token_bytes(token)
                f.write(base64.b64encode(token_bytes) + b" %d\n" % token)
        special = {end: encoding.eot_token}
        tokenizer = TikTokenConverter(str(file), pattern=WORDS, extra_special_tokens=special).converted()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end)


def model_card(name, config, checkpoint, how):
    """README.md of an exported model: what it is, and what the checkpoint knows of its training."""
    numbers = sum(tensor.numel() for tensor in checkpoint["model"].values())
    facts = {
        "architecture": name,
        "steps": checkpoint["step"],
        "tokens": f"{checkpoint['step'] * config.batch_tokens:,}",
        "data": checkpoint["data"]["dataset"],
        "tokenizer": checkpoint["data"]["tokenizer"],
        "parameters": f"{numbers:,} (with buffers)",
    }
    lines = [f"# {name}, trained with NanoTitan", "", how, ""]
    for key, value in facts.items():
        lines.append(f"- {key}: {value}")
    lines += ["", "Config:", "", "```json", json.dumps(checkpoint["config"], indent=1), "```", ""]
    return "\n".join(lines)


def write_hf(name, config, checkpoint, out):
    """Writes transformers' model and tokenizer; returns how to load them."""
    tokenizer = hf_tokenizer(checkpoint["data"]["tokenizer"])
    model = weights.hf_model(name, config)
    model.load_state_dict(weights.to_hf(name, checkpoint["model"], config))
    padding = list(range(len(tokenizer), config.vocab_size))  # rows of the embedding that are no token
    model.generation_config.update(do_sample=True, top_k=50, suppress_tokens=padding or None)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return "Load it with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`."


def write_official_rwkv(config, checkpoint, out):
    """Writes the authors' .pth; returns how to load it."""
    state_dict = weights.to_official_rwkv(checkpoint["model"], config)
    fineweb.write_atomic(out / "model.pth", lambda f: torch.save(state_dict, f))
    return "`RWKV(model='model', strategy='cpu fp32')` of the package `rwkv` loads it (with RWKV_V7_ON=1)."


def write_safetensors(name, checkpoint, out):
    """Writes the tensors under our names; returns how to load them."""
    from safetensors.torch import save_file

    tensors = {key: tensor.contiguous() for key, tensor in checkpoint["model"].items()}
    save_file(tensors, out / "model.safetensors")
    fields = {"architecture": name, **checkpoint["config"]}
    (out / "config.json").write_text(json.dumps(fields, indent=1), encoding="utf-8")
    print(f"{name}: no library has a class for it, so the safetensors have train_{name}.py's names")
    return f"No library has a class for this architecture: load it with `train_{name}.py`'s Model."


def export(folder, out):
    """Writes the newest checkpoint of a run as what others load."""
    script, config, checkpoint = read_checkpoint(folder)
    check_script(folder, script)
    name = script.__name__.removeprefix("train_")
    if out.exists() and any(out.iterdir()):
        fineweb.fail(f"{out} is not empty: choose another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    if name in weights.HF_CLASSES:
        how = write_hf(name, config, checkpoint, out)
    elif name == "rwkv":
        how = write_official_rwkv(config, checkpoint, out)
    else:
        how = write_safetensors(name, checkpoint, out)
    (out / "README.md").write_text(model_card(name, config, checkpoint, how), encoding="utf-8")
    print(f"{out}: {how}")


# ----------------------------------------------------------------------------------------------------------
# Import


def check_fields(source, name, theirs, config):
    """Raises SystemExit if transformers' configuration says what the script's Config can't."""
    expected = weights.hf_config(name, config).to_dict()
    given = theirs.to_dict()
    if name == "mistral" and given["sliding_window"] is None:
        given["sliding_window"] = config.window  # which sees all positions
    for field in weights.MEANT_BY_CONFIG & expected.keys() & given.keys():
        if given[field] != expected[field]:
            fineweb.fail(f"{source} has {field} = {given[field]}, train_{name}.py has {expected[field]}: "
                         "its weights don't fit")  # fmt: skip


def choose_tokenizer(source, vocab_size):
    """The name of our tokenizer with a vocabulary of this size, padded or not."""
    if vocab_size == fineweb.VOCAB_SIZE["bytes"]:
        return "bytes"
    if fineweb.VOCAB_SIZE["gpt2"] <= vocab_size <= 50_304:
        return "gpt2"
    fineweb.fail(f"{source} has a vocabulary of {vocab_size:,}, which is neither GPT-2's nor bytes")


def import_weights(source, out):
    """Writes a checkpoint of step 0 from a transformers model's folder or name."""
    import transformers

    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        fineweb.fail(f"{source} can't be loaded: {str(error).splitlines()[0]}")
    accepted = {weights.HF_CLASSES[name]: name for name in ("gpt2", "llama", "mistral", "gemma")}
    kind = type(theirs).__name__
    if kind not in accepted:
        fineweb.fail(f"{source} is a {kind}: only GPT-2, LLaMA, Mistral and Gemma 3 can be imported")
    name = accepted[kind]
    if list(out.glob("step_*.pt")):
        fineweb.fail(f"{out} already holds a run: choose another --out")
    script = importlib.import_module(f"train_{name}")
    config = weights.our_config(name, theirs.config, script.Config)
    check_fields(source, name, theirs.config, config)
    tokenizer = choose_tokenizer(source, config.vocab_size)
    model = script.Model(config)
    try:
        model.load_state_dict(weights.from_hf(name, theirs.state_dict(), config))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        fineweb.fail(f"{source}: its weights don't fit train_{name}.py: {reason}")
    data = {
        "dataset": str(source),
        "tokenizer": tokenizer,
        "vocab_size": fineweb.VOCAB_SIZE[tokenizer],
        "fingerprint": "",
    }
    checkpoint = {
        "format": script.CHECKPOINT_FORMAT,
        "script": script.__name__,
        "step": 0,
        "config": vars(config),
        "data": data,
        "model": model.state_dict(),
        "optimizer": {},
        "scaler": {},
        "rng": torch.get_rng_state(),
    }
    out.mkdir(parents=True, exist_ok=True)
    fineweb.write_atomic(out / "step_000000.pt", lambda f: torch.save(checkpoint, f))
    print(f"{out}: step 0 of train_{name}.py. Next: python train_{name}.py --run_name {out.name} --eval")


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run, as log/llama")
    parser.add_argument("--from", dest="source", help="a transformers model to import: folder or name")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = fineweb.parse_strictly(parser)
    if (args.run is None) == (args.source is None):
        fineweb.fail("give the folder of a run to export, or --from and a transformers model to import")
    try:
        if args.run:
            export(args.run, args.out)
        else:
            import_weights(args.source, args.out)
    except ImportError as missing:
        fineweb.fail(f"this needs a package that is missing: pip install {missing.name}")


if __name__ == "__main__":
    main()
