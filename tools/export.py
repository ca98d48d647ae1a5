"""
A finished run for use elsewhere, and others' weights for use here.

    python -m tools.export log/llama --out hf/llama     # to share: weights,
                                     # config, tokenizer and model card
    python -m tools.export --from gpt2 --out log/mine   # a run of step 0: for
                                     # train_gpt2.py's --sample and --eval

GPT-2, LLaMA, Mistral, Gemma and DeepSeek become transformers' own classes, for
AutoModelForCausalLM, pipelines and lm-evaluation-harness; RWKV-7 becomes the
authors' .pth, for the package rwkv. No library has a class for MTA, nor for a
script of your own, whatever its model: they become safetensors with our names.
--from takes GPT-2 (OpenAI's included), LLaMA, Mistral and Gemma weights, by
folder or name, that fit a script's Config.

A run whose script's model is not today's is refused: its weights would come
out as another model.
"""
import argparse
import ast
import base64
import contextlib
import dataclasses
import importlib
import json
import shlex
import tempfile
from pathlib import Path

import torch

import fineweb
import hellaswag
from tools import weights
from tools.common import script_hash as hash_of
from tools.compare import runs
from tools.models import count_parameters
from tools.sync import sections

# GPT-2's pattern of words. The vocabulary of bytes merges nothing, so it makes no difference there.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# ----------------------------------------------------------------------------------------------------------
# Export


def check_out(out):
    """Raises SystemExit unless a folder is empty or not there yet."""
    if out.is_file():
        fineweb.fail(f"--out {out} is a file: give a folder that is empty or not there yet")
    if out.exists() and any(out.iterdir()):
        fineweb.fail(f"{out} is not empty: choose another --out, or remove it")


@contextlib.contextmanager
def all_or_nothing(out):
    """A folder to write into. Its files go to `out` at the end, and none does if the writing fails."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=out) as scratch:
        yield Path(scratch)
        for path in list(Path(scratch).iterdir()):
            path.rename(out / path.name)


def import_script(name, folder):
    """The script that made a run, as a module. Raises SystemExit if it is not here or broken."""
    if not name.startswith("train_"):  # anything could be imported
        fineweb.fail(f"{folder} was made by {name}.py, which is no training script")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name != name:
            raise
        copy = folder / f"{name}.py"
        advice = f"copy {copy} to {name}.py" if copy.exists() else "put it back"
        fineweb.fail(f"{folder} was made by {name}.py, which is not here: {advice}")
    except Exception as error:  # it is a user's own, perhaps just being edited
        fineweb.fail(f"{name}.py can't be imported ({type(error).__name__}: {error})")


def read_checkpoint(folder):
    """A run's (script module, Config, newest checkpoint). Raises SystemExit if it has none."""
    import train_gpt2  # every script reads checkpoints by the same function

    if folder.is_file():
        fineweb.fail(f"{folder} is a file: give the folder of a run, as log/gpt2")
    checkpoint = train_gpt2.load_checkpoint(folder)
    if checkpoint is None:
        fineweb.fail(f"{folder} holds no checkpoint: give the folder of a run, as log/gpt2")
    name = checkpoint["script"]
    script = import_script(name, folder)
    other_version = f"{folder} was written by another version of {name}.py: use the tools of that one"
    if checkpoint["format"] != script.CHECKPOINT_FORMAT:
        fineweb.fail(other_version)
    try:
        config = script.Config(**checkpoint["config"])
    except TypeError:
        fineweb.fail(other_version)
    return script, config, checkpoint


def open_data(folder, config, checkpoint):
    """The facts of the data that a run was trained on. Raises SystemExit if data_dir holds others."""
    data = fineweb.open_dataset(config.data_dir, config.vocab_size, config.train_shards)
    if data["fingerprint"] != checkpoint["data"]["fingerprint"]:
        fineweb.fail(f"{folder} was trained on other data than there are now in {config.data_dir}")
    return data


def load_model(script, config, checkpoint, device):
    """The model of a checkpoint, ready to be evaluated on a device."""
    model = script.Model(config)
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval()


def read_log(folder):
    """(the runs.Run in a folder, None), or (None, why it can't be read)."""
    path = folder / "log.jsonl"
    if not path.is_file():
        return None, "its log.jsonl is not there"
    try:
        return runs.read_run(folder), None
    except (OSError, runs.Unreadable) as reason:
        return None, str(reason)


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


def check_script(folder, script, script_hash):
    """Raises SystemExit if a run's copy of its script has another model than the script has today."""
    name = script.__name__
    today = Path(script.__file__)
    if script_hash == hash_of(today):
        return
    copy = folder / f"{name}.py"
    if not copy.exists():
        print(f"{folder} holds no copy of {name}.py, so whether its model is today's can't be checked")
        return
    if model_code(copy.read_text(encoding="utf-8")) != model_code(today.read_text(encoding="utf-8")):
        fineweb.fail(f"{folder} was trained by another model than {name}.py has today: see "
                     f"diff {copy} {today.name}, and export it beside that version of {today.name}")  # fmt: skip


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


def front_matter(dataset, library):
    """The YAML that the hub reads at the top of a model card: what is known, so no licence."""
    from huggingface_hub import ModelCardData

    on_hub = []
    for known in fineweb.DATASETS.values():
        on_hub += [known["repository"], known["ready_made"]]
    repository = dataset.split(" ")[0]  # its folder may follow
    fields = {"pipeline_tag": "text-generation"}
    if library:
        fields["library_name"] = library
    if repository in on_hub:
        fields["datasets"] = [repository]
    if repository in on_hub or repository == "sample":
        fields["language"] = "en"
    return f"---\n{ModelCardData(**fields).to_yaml()}\n---\n"


def results(log, step):
    """The newest validation loss and scores of a step in a runs.Run, in words: a list of lines."""
    lines = []
    if step in log.val:
        tokens = log.config["val_tokens"]
        lines.append(f"validation loss {log.val[step]:.4f} nats per token, on up to {tokens:,} tokens")
    for by_step in log.scores.values():
        if step in by_step:
            lines.append(hellaswag.one_line(by_step[step]))
    return lines


def model_card(name, config, checkpoint, log, no_log, trained, library, how):
    """README.md of an exported model.

    no_log: why log is None. trained: number of trained parameters. library: the hub's name of the one
    that loads it, or None. how: Markdown that says how to load it.
    """
    step = checkpoint["step"]
    data = checkpoint["data"]
    tokens = step * config.batch_tokens
    settings = ""
    for field in runs.RECIPE_FIELDS:
        if hasattr(config, field):  # a script of one's own may lack it
            settings += f", {field} {getattr(config, field)}"
    init_from = getattr(config, "init_from", "")  # a script of one's own may lack it
    facts = {
        "architecture": name,
        "parameters": f"{trained:,} trained",
        "steps": f"{step:,} of {config.max_steps:,}",
        "tokens": f"{tokens:,}",
        "initial weights": init_from or "random",
        "data": data["dataset"],
        "tokenizer": data["tokenizer"],
        "recipe": config.recipe + settings,
        "seed": config.seed,
        "script": f"train_{name}.py, sha256 {checkpoint['script_hash']}…",
    }
    if log:
        facts["git commit"] = log.facts.get("git", "unknown")
        facts["torch"] = log.facts.get("torch", "unknown")
    lines = [f"# {name}, trained with NanoTitan", ""]
    if step == 0:
        imported = data["fingerprint"] == ""  # see import_weights()
        origin = f"were imported from {data['dataset']}" if imported else "are random"
        if init_from:
            origin = f"are those of {init_from}"
        lines += [f"Not trained yet: its weights {origin}.", ""]
    lines += [
        f"A small language model ({trained:,} parameters, trained on {tokens:,} tokens), made to compare "
        "architectures and not for use: nothing has taught it to follow instructions, and what it says is "
        "often wrong.",
        "",
    ]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", "## Results", ""]
    if log is None:
        lines.append(f"The run's losses and scores are unknown: {no_log}.")
    else:
        found = [f"- {line}" for line in results(log, step)]
        lines += found or [f"Step {step} was not evaluated."]
        lines += ["", f"Of step {step}; ± is one standard error, over the items."]
    lines += ["", "## How to load it", "", how]
    lines += ["", "## Config", "", "```json", json.dumps(checkpoint["config"], indent=1), "```", ""]
    return front_matter(data["dataset"], library) + "\n".join(lines)


def code(*lines):
    return "\n".join(["", "```python", *lines, "```"])


def write_hf(name, config, checkpoint, trained, folder, out):
    """Writes transformers' model and tokenizer into a folder; returns how to load them from `out`."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # one of a single step
    tokenizer = hf_tokenizer(checkpoint["data"]["tokenizer"])
    model = weights.hf_model(name, config)
    model.load_state_dict(weights.to_hf(name, checkpoint["model"], config))
    padding = list(range(len(tokenizer), config.vocab_size))  # rows of the embedding that are no token
    end = tokenizer.eos_token_id  # not the last id of a padded vocabulary
    model.config.update({"bos_token_id": end, "eos_token_id": end})
    model.generation_config.update(bos_token_id=end, eos_token_id=end, do_sample=True, top_k=50)
    model.generation_config.update(suppress_tokens=padding or None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    how = "Load it with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`."
    left_out = trained - sum(p.numel() for p in model.parameters())
    if left_out:
        how += f" The class lacks the prediction of a second token: its {left_out:,} parameters are left out."
    return how + "\n" + code(
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"folder = {str(out)!r}  # the one of this file",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForCausalLM.from_pretrained(folder)",
    )


def write_official_rwkv(config, checkpoint, folder):
    """Writes the authors' .pth into a folder; returns how to load it, in Markdown."""
    state_dict = weights.to_official_rwkv(checkpoint["model"], config)
    fineweb.write_atomic(folder / "model.pth", lambda f: torch.save(state_dict, f))
    how = "`RWKV(model='model', strategy='cpu fp32')` of the package `rwkv` loads it (with RWKV_V7_ON=1)."
    tokenizer = checkpoint["data"]["tokenizer"]
    return f"{how}\n\nIts tokens are those of `fineweb.get_tokenizer({tokenizer!r})`."


def write_safetensors(name, checkpoint, folder, out):
    """Writes the tensors under our names into a folder; returns how to load them from `out`."""
    from safetensors.torch import save_file

    tensors = {key: tensor.contiguous() for key, tensor in checkpoint["model"].items()}
    save_file(tensors, folder / "model.safetensors")
    fields = {"architecture": name, **checkpoint["config"]}
    (folder / "config.json").write_text(json.dumps(fields, indent=1), encoding="utf-8")
    print(f"{name}: no library has a class for it, so the safetensors have train_{name}.py's names")
    how = f"No library has a class for this architecture: load it with `train_{name}.py`'s Model."
    return how + "\n" + code(
        "import json",
        "from pathlib import Path",
        "from safetensors.torch import load_file",
        "import fineweb",
        f"import train_{name} as script",
        "",
        f"folder = Path({str(out)!r})  # the one of this file",
        "fields = json.loads((folder / 'config.json').read_text())",
        "del fields['architecture']",
        "model = script.Model(script.Config(**fields))",
        "model.load_state_dict(load_file(folder / 'model.safetensors'))",
        f"tokenizer = fineweb.get_tokenizer({checkpoint['data']['tokenizer']!r})",
    )


def export(folder, out):
    """Writes the newest checkpoint of a run as what others load."""
    script, config, checkpoint = read_checkpoint(folder)
    log, no_log = read_log(folder)
    check_script(folder, script, checkpoint["script_hash"])
    name = script.__name__.removeprefix("train_")
    trained, _ = count_parameters(script, config)
    check_out(out)
    library = "transformers" if name in weights.HF_CLASSES else None
    with all_or_nothing(out) as part:
        if library:
            how = write_hf(name, config, checkpoint, trained, part, out)
        elif name == "rwkv":
            how = write_official_rwkv(config, checkpoint, part)
        else:
            how = write_safetensors(name, checkpoint, part, out)
        card = model_card(name, config, checkpoint, log, no_log, trained, library, how)
        readme = part / "README.md"
        readme.write_text(card, encoding="utf-8")
        for path in part.iterdir():  # safetensors makes files that only their owner can read
            path.chmod(readme.stat().st_mode)
    print(f"{out}: {how.splitlines()[0]}")


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


def load_theirs(source):
    """transformers' model in a folder or of a name. Raises SystemExit unless all its weights are there."""
    import transformers

    if Path(source).is_file():
        fineweb.fail(f"--from {source} is a file: give the folder that it is in")
    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    try:
        model, info = load(source, dtype=torch.float32, output_loading_info=True)
    except ImportError:
        raise
    except Exception as error:  # damaged files can raise anything
        reason = str(error).strip() or type(error).__name__
        fineweb.fail(f"{source} can't be loaded: {reason.splitlines()[0]}")
    if info["missing_keys"]:  # transformers would go on with random ones
        fineweb.fail(f"{source} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])} and so on: "
                     "it is not a whole model")  # fmt: skip
    return model


def run_config(script, shape, tokenizer, run_name):
    """The Config of an imported run: its shape, and what fits the tokenizer for the rest.

    A model of bytes has the data and settings of --tiny, which is one too.
    """
    values = dict(script.RECIPE)
    if tokenizer == "bytes":
        values |= script.TINY_RUN
    for field in ("vocab_size", "block_size"):
        values[field] = getattr(shape, field)
    values["run_name"] = run_name
    config = dataclasses.replace(shape, **values)
    rows = max(1, config.batch_tokens // config.block_size)
    power = 1 << (rows.bit_length() - 1)  # of two, which any number of GPUs and micro-batches divides
    config.batch_tokens = power * config.block_size
    return config


def import_weights(source, out):
    """Writes a run of step 0 from a transformers model's folder or name."""
    if out.absolute().parent.resolve() != Path("log").resolve() or out.name == "..":
        fineweb.fail(f"--out {out}: the scripts look for runs in log/, so make it --out log/NAME")
    check_out(out)
    theirs = load_theirs(source)
    accepted = {weights.HF_CLASSES[name]: name for name in ("gpt2", "llama", "mistral", "gemma")}
    kind = type(theirs).__name__
    if kind not in accepted:
        fineweb.fail(f"{source} is a {kind}: only GPT-2, LLaMA, Mistral and Gemma 3 can be imported")
    name = accepted[kind]
    script = importlib.import_module(f"train_{name}")
    shape = weights.our_config(name, theirs.config, script.Config)
    check_fields(source, name, theirs.config, shape)
    tokenizer = choose_tokenizer(source, shape.vocab_size)
    config = run_config(script, shape, tokenizer, out.name)
    fineweb.check_run(config, 1)
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
        "fingerprint": "",  # of no tokens, so the first dataset that it meets is another one
    }
    optimizer = torch.optim.AdamW(model.optimizer_groups())  # without moments, as before the first step
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    out.mkdir(parents=True, exist_ok=True)
    script.save_checkpoint(out, 0, config, data, model, optimizer, scaler)
    fineweb.keep_copy(Path(script.__file__), out)  # last, so what is stopped before it can be tried again
    print_next(script, config, tokenizer, out)


def print_next(script, config, tokenizer, out):
    """Prints the commands that sample from an imported run and score it."""
    command = f"python {Path(script.__file__).name} --run_name {shlex.quote(out.name)}"
    print(f'Next: {command} --sample "Hello"')
    evaluate = f"{command} --eval"
    if not list(Path(config.data_dir).glob("*.bin")):
        option = "--sample" if tokenizer == "bytes" else "--pretokenized --shards 1"
        evaluate = f"python fineweb.py {option} && {evaluate}"
    print(f"To score it: {evaluate}")
    print(f"This takes the {tokenizer} tokens in {config.data_dir}, or those in a --data_dir that you name.")
    checkpoint = shlex.quote(str(out / "step_000000.pt"))
    print(f"To fine-tune it: python {Path(script.__file__).name} --init_from {checkpoint}, see the README")


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("run", nargs="?", type=Path, help="a run to export, as log/llama")
    add("--from", dest="source", metavar="MODEL", help="a transformers model to import: folder or name")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; for --from log/NAME")
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
    except OSError as error:
        fineweb.fail(f"{error.filename or args.out}: {error.strerror or error}")


if __name__ == "__main__":
    main()
