"""
A finished run for use elsewhere, and others' weights for use here.

    python -m tools.export log/llama --out hf/llama            # config.json, model.safetensors, tokenizer, model card
    python -m tools.export --from hf/llama --out log/again     # a checkpoint that train_llama.py resumes, scores and samples

GPT-2, LLaMA, Mistral, Gemma and DeepSeek come out as transformers' own classes, for AutoModelForCausalLM, pipelines and
lm-evaluation-harness. RWKV-7 comes out as the official .pth, for the rwkv package. For MTA there is no class elsewhere:
safetensors with our names. Back in come GPT-2 (OpenAI's included), LLaMA, Mistral and Gemma weights of a fitting shape.
"""
import argparse
import base64
import importlib
import json
import tempfile
from pathlib import Path

import torch

import fineweb
from tools import mapping

CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
           "gemma": "Gemma3ForCausalLM", "deepseek": "DeepseekV3ForCausalLM"}  # fmt: skip


def read_checkpoint(folder):
    """(the script's module, its Config, the newest checkpoint) of a run. Raises SystemExit if there is none."""
    import train_gpt2  # every script reads checkpoints by the same function

    checkpoint = train_gpt2.load_checkpoint(folder)
    if checkpoint is None:
        fineweb.fail(f"{folder} holds no checkpoint: give the folder of a run, as log/gpt2")
    try:
        script = importlib.import_module(checkpoint["script"])
        return script, script.Config(**checkpoint["config"]), checkpoint
    except (ImportError, TypeError):
        fineweb.fail(f"{folder} was written by {checkpoint['script']}.py in another version: use the tools of that one")


def hf_tokenizer(name):
    """transformers' tokenizer that gives the same ids as ours called name."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    encoding = fineweb.get_tokenizer(name)
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's; bytes have no merges
    with tempfile.NamedTemporaryFile("wb", suffix=".tiktoken") as f:
        for token in range(encoding.eot_token):
            f.write(base64.b64encode(encoding.decode_single_token_bytes(token)) + b" %d\n" % token)
        f.flush()
        converter = TikTokenConverter(f.name, pattern=pattern, extra_special_tokens={"<|endoftext|>": encoding.eot_token})
        tokenizer = converter.converted()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def model_card(name, config, checkpoint, how):
    """README.md of an exported model: what it is and how it was trained, as far as the checkpoint knows."""
    facts = {"architecture": name, "steps": checkpoint["step"], "tokens": f"{checkpoint['step'] * config.batch_tokens:,}",
             "data": checkpoint["data"]["dataset"], "tokenizer": checkpoint["data"]["tokenizer"],
             "parameters": f"{sum(t.numel() for n, t in checkpoint['model'].items()):,} (with buffers)"}  # fmt: skip
    lines = [f"# {name}, trained with NanoTitan\n", how, "", *[f"- {key}: {value}" for key, value in facts.items()], ""]
    lines += ["Config:\n", "```json", json.dumps(checkpoint["config"], indent=1), "```\n"]
    return "\n".join(lines)


def export(folder, out):
    """Writes the newest checkpoint of a run as what others load."""
    script, config, checkpoint = read_checkpoint(folder)
    name, weights = script.__name__.removeprefix("train_"), checkpoint["model"]
    if out.exists() and any(out.iterdir()):
        fineweb.fail(f"{out} is not empty: choose another --out, or remove it")
    tokenizer = None
    if name in CLASSES:
        import transformers

        tokenizer = hf_tokenizer(checkpoint["data"]["tokenizer"])
        model = getattr(transformers, CLASSES[name])(mapping.hf_config(name, config))
        model.load_state_dict(getattr(mapping, f"to_hf_{name}")(weights, config))
        padding = list(range(len(tokenizer), config.vocab_size))
        model.generation_config.update(do_sample=True, top_k=50, suppress_tokens=padding or None)
        model.save_pretrained(out)
        how = "Load it with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`."
    elif name == "rwkv":
        out.mkdir(parents=True, exist_ok=True)
        fineweb.write_atomic(out / "model.pth", lambda f: torch.save(mapping.to_official_rwkv(weights, config), f))
        how = "`RWKV(model='model', strategy='cpu fp32')` of the package `rwkv` loads it (with RWKV_V7_ON=1)."
    else:
        from safetensors.torch import save_file

        out.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, out / "model.safetensors")
        (out / "config.json").write_text(json.dumps({"architecture": name, **checkpoint["config"]}, indent=1))
        how = f"No library has this architecture's class: load it with `train_{name}.py`'s Model; the names are its own."
        print(f"{name}: no library has a class for it, so the safetensors have train_{name}.py's names")
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    (out / "README.md").write_text(model_card(name, config, checkpoint, how))
    print(f"{out}: {how}")


def import_weights(source, out):
    """Writes a checkpoint of step 0 out of a transformers model's folder or name."""
    import transformers

    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        fineweb.fail(f"{source} can't be loaded: {str(error).splitlines()[0]}")
    name = next((name for name, cls in CLASSES.items() if type(theirs).__name__ == cls and name != "deepseek"), None)
    if name is None:
        fineweb.fail(f"{source} is a {type(theirs).__name__}: only GPT-2, LLaMA, Mistral and Gemma 3 come in")
    if list(out.glob("step_*.pt")):
        fineweb.fail(f"{out} already holds a run: choose another --out")
    script = importlib.import_module(f"train_{name}")
    config = mapping.our_config(name, theirs.config, script.Config)
    # what a Config can't say (other biases, scalings, untied heads) would come in wrong without a word
    expected = mapping.hf_config(name, config).to_dict()
    for field, value in theirs.config.to_dict().items():
        matters = field in mapping.MEANT_BY_CONFIG and field in expected
        if matters and expected[field] != value:
            fineweb.fail(f"{source} has {field} = {value}, train_{name}.py has {expected[field]}: its weights don't fit")
    weights = getattr(mapping, f"from_hf_{name}")(theirs.state_dict(), config)
    model = script.Model(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        fineweb.fail(f"{source}: its weights don't fit train_{name}.py: {str(error).splitlines()[-1].strip()}")
    tokenizers = {257: "bytes"} | {size: "gpt2" for size in range(50_257, 50_305)}
    if config.vocab_size not in tokenizers:
        fineweb.fail(f"{source} has a vocabulary of {config.vocab_size:,}, which is neither GPT-2's nor bytes")
    tokenizer = tokenizers[config.vocab_size]
    data = {"dataset": str(source), "tokenizer": tokenizer, "vocab_size": fineweb.VOCAB_SIZE[tokenizer], "fingerprint": ""}
    checkpoint = {"format": 1, "script": script.__name__, "step": 0, "config": vars(config), "data": data,
                  "model": model.state_dict(), "optimizer": {}, "scaler": {}, "rng": torch.get_rng_state()}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    fineweb.write_atomic(out / "step_000000.pt", lambda f: torch.save(checkpoint, f))
    print(f"{out}: step 0 of {script.__name__}.py. Next: python {script.__name__}.py --run_name {out.name} --eval")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run, as log/llama")
    parser.add_argument("--from", dest="source", help="folder or name of a transformers model to bring in instead")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = fineweb.parse_strictly(parser)
    if (args.run is None) == (args.source is None):
        fineweb.fail("give the folder of a run to export, or --from and a transformers model to bring in")
    try:
        export(args.run, args.out) if args.run else import_weights(args.source, args.out)
    except ImportError as missing:
        fineweb.fail(f"this needs a package that is missing: pip install {missing.name}")


if __name__ == "__main__":
    main()
