"""Others' weights as a run's folder with a checkpoint of step 0."""
import importlib
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import torch

import fineweb
import train_gpt2
from fineweb import fail
from tools.export import weights
from tools.export.tokenizer import hf_tokenizer
from tools.export.write import CHECKPOINTS, check_logits, check_out

ACCEPTED = {weights.HF_CLASSES[name]: name for name in ("gpt2", "llama", "mistral", "gemma")}
VOCAB_SIZE = fineweb.n_vocab("gpt2")

def check_folder(folder):
    """Raises SystemExit, with what to do, for a folder that holds no model of transformers."""
    runs = sorted(folder.glob(CHECKPOINTS))
    if runs:
        fail(f"{folder} is a run already: a training script starts from it with --init_from {runs[-1]}")
    if (folder / "adapter_config.json").exists():
        fail(f"{folder} is a LoRA adapter: merge it first (peft's merge_and_unload), and save that")
    if not (folder / "config.json").exists():
        fail(f"{folder} has no config.json: give the folder of a model of transformers, or its name")


def load_theirs(source):
    """transformers' model in a folder or of a name. SystemExit unless all its weights are there."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    try:
        model, info = load(source, dtype=torch.float32, output_loading_info=True)
    except ImportError:
        raise
    except Exception as error:  # damaged files can raise anything
        reason = str(error).strip() or type(error).__name__
        fail(f"{source} can't be loaded: {reason.splitlines()[0]}")
    if info["missing_keys"]:  # transformers would go on with random ones
        fail(f"{source} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])} and so on: "
             "it is not a whole model")  # fmt: skip
    return model.eval()


def check_tokenizer(source):
    """Raises SystemExit if a model comes with another tokenizer than GPT-2's."""
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(source)
    except Exception:  # anything, if there is none
        theirs = ()
    if len(theirs) < 257:  # where there is none, transformers may also make an empty one
        print(f"{source} has no tokenizer that can be read: its ids are taken for GPT-2's")
        return
    ours = hf_tokenizer(fineweb.get_tokenizer("gpt2"))
    if not ours.get_vocab().items() <= theirs.get_vocab().items():  # it may have special ones beyond
        fail(f"{source} has a vocabulary of its own: its ids don't mean what they mean in GPT-2's")


def read_transformers(source):
    """(name of the architecture, Config of its shape, state dict), as the two readers below."""
    if Path(source).is_dir():
        check_folder(Path(source))
    theirs = load_theirs(source)
    kind = type(theirs).__name__
    if kind not in ACCEPTED:
        fail(f"{source} is a {kind}: only GPT-2, LLaMA, Mistral and Gemma 3 can be imported")
    name = ACCEPTED[kind]
    script = importlib.import_module(f"train_{name}")
    config = weights.our_config(name, theirs.config, script.Config)
    check_tokenizer(source)
    model = script.Model(config).eval()
    try:
        model.load_state_dict(weights.from_hf(name, theirs.state_dict(), config))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        fail(f"{source}: its weights don't fit train_{name}.py: {reason}")
    what = (f"{source} is another model than train_{name}.py's with its weights, for example by "
            "its activation, positions, biases or a head of its own")  # fmt: skip
    check_logits(lambda idx: theirs(idx).logits, lambda idx: model(idx)[0], config, what)
    return name, config, model.state_dict()


def read_nanogpt(path):
    """nanoGPT's ckpt.pt, whose names are those of transformers."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        shape = checkpoint["model_args"]
        fields = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
        config = train_gpt2.Config(**{name: shape[name] for name in fields})
        ours = {}
        our_names = weights.tensor_names("gpt2", config)
        for theirs, tensor in checkpoint["model"].items():
            names = our_names.get(theirs.removeprefix("_orig_mod."), [])  # torch.compile's prefix
            ours |= zip(names, tensor.chunk(max(1, len(names))))
        model = train_gpt2.Model(config)
        missing = model.load_state_dict(ours, strict=False).missing_keys
    except Exception as error:  # a file can hold anything
        fail(f"{path} is no checkpoint of nanoGPT ({type(error).__name__}: {str(error)[:80]})")
    missing = [name for name in missing if not name.endswith("bias")]  # without biases, ours stay 0
    if missing:
        fail(f"{path} lacks {missing[0]} and so on: it is not a whole checkpoint of nanoGPT")
    print(f"{path}: nanoGPT's GELU is the exact one, train_gpt2.py's its tanh form: logits differ a little")
    return "gpt2", config, model.state_dict()


def read_llmc(path):
    """llm.c's .bin of a GPT-2: 256 int32, then each tensor, of all layers before the next (train_gpt2.py)."""
    header = np.fromfile(path, dtype=np.int32, count=256)
    types = {3: "float32", 5: "uint16"}  # bfloat16, which numpy hasn't
    if len(header) < 256 or header[0] != 20240326 or header[1] not in types:
        fail(f"{path} is no GPT-2 of llm.c, version 3 or 5: of a model of transformers give the folder")
    shape = zip(("block_size", "_", "n_layer", "n_head", "n_embd", "vocab_size"), header[2:8].tolist())
    config = train_gpt2.Config(**{name: value for name, value in shape if name != "_"})  # _: without padding
    numbers = torch.from_numpy(np.fromfile(path, dtype=types[header[1]], offset=1024))
    if header[1] == 5:
        numbers = numbers.view(torch.bfloat16).float()
    names = ["wte.weight", "wpe.weight"]
    for parts in weights.block_names("gpt2", config, 0).values():
        for layer in range(config.n_layer):
            names += [f"blocks.{layer}.{part}" for part in parts]
    names += ["norm.weight", "norm.bias"]
    ours = train_gpt2.Model(config).state_dict()
    sizes = [ours[name].numel() for name in names]
    if len(numbers) != sum(sizes):
        fail(f"{path} holds {len(numbers):,} numbers, its header promises {sum(sizes):,}: get it again")
    for name, part in zip(names, numbers.split(sizes)):
        ours[name] = part.view_as(ours[name])
    return "gpt2", config, ours


def import_weights(source, out):
    """Writes a run of step 0 from a model of transformers, nanoGPT or llm.c with GPT-2's vocabulary."""
    if out.absolute().parent.resolve() != Path("log").resolve() or out.name == "..":
        fail(f"--out {out}: the scripts look for runs in log/, so make it --out log/NAME")
    check_out(out)
    if not Path(source).is_file():
        name, config, state_dict = read_transformers(source)
    elif source.endswith(".pt"):
        name, config, state_dict = read_nanogpt(source)
    else:
        name, config, state_dict = read_llmc(source)
    if not VOCAB_SIZE <= config.vocab_size <= 50_304:  # padded to a multiple of 128
        fail(f"{source} has a vocabulary of {config.vocab_size:,}, which is not GPT-2's")
    config.run_name = out.name
    config.batch_tokens -= config.batch_tokens % config.block_size
    script = importlib.import_module(f"train_{name}")
    model = script.Model(config)
    model.load_state_dict(state_dict)
    # the fingerprint of no tokens, so the first dataset that it meets is another one
    data = {"dataset": source, "tokenizer": "gpt2", "vocab_size": VOCAB_SIZE, "fingerprint": ""}
    optimizer = torch.optim.AdamW(model.optimizer_groups())  # without moments, as before the first step
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(script.__file__, out)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    script.save_checkpoint(out, 0, (math.inf, 0), data, model, optimizer, scaler)

    command = f"python train_{name}.py --run_name {shlex.quote(out.name)}"
    print(f'Next: {command} --sample "Hello"')
    if not list(Path(config.data_dir).glob("*.bin")):
        print("For data to score it on: python fineweb.py --pretokenized --shards 1")
    print(f"To score it: {command} --eval")
    start = shlex.quote(str(max(out.glob(CHECKPOINTS))))
    print(f"To fine-tune it: python train_{name}.py --init_from {start}, see the README")
