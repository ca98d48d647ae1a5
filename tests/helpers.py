"""What tests share: models, runs, closeness, comparisons with references, data."""
import copy
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
import torch.utils.checkpoint
from conftest import ROOT, text
from reference import cross_entropy

import fineweb
from tools.export import weights

# ==========================================================================
# Models


def tiny(script, **fields):
    """The Config of a small model of bytes."""
    return script.Config(**{**script.TINY_MODEL, "vocab_size": 257, "block_size": 48, **fields})


def make(script, dtype=torch.float32, **fields):
    """A small model in training, none of whose parameters is at its special initial value, such as 0."""
    torch.manual_seed(0)
    model = script.Model(tiny(script, **fields))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.to(dtype)


@functools.cache
def in_full(script, **fields):
    """The real model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return script.Model(script.Config(**fields))


def size(model):
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def perturbed(script, std=0.2, **fields):
    """A small Model that is far from its initial values, 0s and 1s, so that whatever is left out shows.

    std is that of the noise on matrices; vectors, mixers and kernels get more.
    """
    torch.manual_seed(0)
    model = script.Model(script.Config(**fields))
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() > 1 and "mix" not in name and "conv" not in name
        parameter.data += (std if is_matrix else 0.3) * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith("router.bias"):
            buffer += 0.3 * torch.randn_like(buffer)
    return model


def tokens(*shape, vocab_size=257, seed=0):
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, shape, generator=generator)


# ==========================================================================
# Runs

SHORT = ["--tiny", "--block_size=32", "--batch_tokens=512", "--val_tokens=512", "--sample_tokens=4",
         "--warmup_steps=2", "--log_every=1"]  # fmt: skip
SMALL = [*SHORT, "--n_layer=1", "--n_head=2", "--n_embd=16"]  # of GPT-2: a run of half a second
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def command(data, *options, launcher=(sys.executable,)):
    """The command of a run of train_gpt2.py in a process of its own."""
    return [*launcher, str(ROOT / "train_gpt2.py"), *SMALL, f"--data_dir={data}", *options]


def read_log(folder):
    """The events of a run's log; it may hold blank lines and half lines."""
    found = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            pass
    return found


def events(folder, kind):
    """The events of a kind; of a step that was done twice the last one."""
    found = [event for event in read_log(folder) if event["event"] == kind]
    return list({event.get("step", number): event for number, event in enumerate(found)}.values())


def losses(folder):
    """The training loss of each step."""
    return [event["loss"] for event in events(folder, "train")]


def load(folder, step):
    return torch.load(folder / f"step_{step:08d}.pt", weights_only=True)


def assert_same(a, b):
    """Two dicts of tensors are equal to the bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ==========================================================================
# Closeness and gradients


def assert_close(ours, theirs, relative=1e-5, what=""):
    """The largest difference is at most relative times the largest value."""
    assert ours.shape == theirs.shape, f"{what}: {ours.shape} and {theirs.shape}"
    error = (ours.double() - theirs.double()).abs().max() / theirs.abs().max().clamp(min=1e-30)
    assert error <= relative, f"{what}: relative error {error:.1e}"


def assert_all_close(ours, theirs, relative=1e-5):
    """The same of all tensors of two dicts."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_close(tensor, theirs[name], relative, name)


def gradients(model, loss):
    """{name: gradient} of a loss, for the parameters that it depends on."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def joined(tensors):
    """{name: tensor} with what has to be measured by one scale in one tensor.

    That is an attention's q, k and v, since some of their gradients are 0 but for rounding: that of
    GPT-2's k.bias, and those of q and k in a window of one token. And MTA's gate: its bias is one
    number, and so is its gradient, a sum of terms that cancel.
    """
    groups = {}
    for name, tensor in tensors.items():
        name = re.sub(r"\.[qkv]\.", ".qkv.", name)
        name = name.replace("attention.gate.bias", "attention.gate.weight")
        groups.setdefault(name, []).append(tensor.flatten())
    return {name: torch.cat(group) for name, group in groups.items()}


# ==========================================================================
# What any model does


def assert_sees_no_later_token(model, tolerance=1e-5):
    """A token changes its own logits and those after it."""
    idx = tokens(2, 48)
    before = model(idx)[0]
    for t in (0, 1, 13, 31, 32, 47):
        edited = idx.clone()
        edited[:, t] = (edited[:, t] + 1) % 257
        after = model(edited)[0]
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=tolerance, atol=tolerance)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


def assert_decodes(model):
    """Token by token the logits are those of the whole; there is no end at block_size."""
    idx = tokens(2, 40)
    whole, state = model(idx)[0], None
    for n in range(11, 41):
        logits, state = model.decode(idx[:, :n], state)
        torch.testing.assert_close(logits, whole[:, n - 1], rtol=1e-4, atol=2e-4)
    assert model.decode(tokens(2, 60))[0].shape == (2, 257)


def assert_all_learn(model):
    """Every parameter has a gradient and is in one group of the optimizer's."""
    model(tokens(2, 48), tokens(2, 48, seed=1))[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    grouped = [id(parameter) for group in model.optimizer_groups() for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


def assert_overfits(script):
    """It learns a batch by heart in forty steps."""
    torch.manual_seed(0)
    model = script.Model(tiny(script, vocab_size=64))
    optimizer = torch.optim.AdamW(model.optimizer_groups(), lr=3e-3, betas=(0.9, 0.95))
    idx, targets = tokens(2, 1, 20, vocab_size=64)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(idx, targets)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.after_step()
    assert loss.item() < 0.3


# ==========================================================================
# Windows


def changed_by_a_token(script, n_layer, **fields):
    """Positions of 1,024 whose logits depend on token 100, in the script's own window."""
    shape = dict(n_head=2, n_embd=16, n_inner=8, vocab_size=300)
    model = perturbed(script, n_layer=n_layer, **shape | fields)
    idx = tokens(1, 1024)
    other = idx.clone()
    other[0, 100] = (other[0, 100] + 1) % 300
    with torch.no_grad():
        differs = model(idx)[0] != model(other)[0]
    return differs.any(-1)[0].nonzero().flatten().tolist()


def assert_flex_equals_mask(script, model, idx, monkeypatch):
    """flex_attention, which only CUDA takes, gives the same logits as the mask, and compiles to one graph."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = model(idx)[0]
        monkeypatch.setattr(script, "can_flex", lambda x: True)
        torch.compiler.reset()
        net = torch.compile(model, dynamic=False, fullgraph=True, backend=record)
        found = net(idx)[0]
    (graph,) = graphs
    assert "flex_attention" in graph.code
    assert_close(found, expected, what="flex_attention")


# ==========================================================================
# transformers


def transformers_twin(name, model):
    """transformers' model of architecture name, with the same weights in the same precision."""
    pytest.importorskip("transformers")
    twin = weights.hf_model(name, model.config).to(model.wte.weight.dtype)
    assert twin.config._attn_implementation == "sdpa"
    if name == "deepseek":
        twin.set_experts_implementation("eager")
    twin.load_state_dict(weights.to_hf(name, model.state_dict(), model.config))
    return twin.train(model.training)


def assert_parity(name, model, idx, targets, relative=1e-5):
    """Logits, loss and all gradients are transformers'; the loss is that in fp64, too."""
    twin = transformers_twin(name, model)
    logits, no_loss = model(idx)
    theirs = twin(input_ids=idx, use_cache=False).logits
    assert no_loss is None
    assert_close(logits, theirs, relative, "logits")
    assert_close(model(idx[:, :9])[0], theirs[:, :9], relative, "logits of a shorter context")
    no_logits, loss = model(idx, targets)
    reference = cross_entropy(theirs, targets)
    assert no_logits is None
    assert_close(loss, reference, relative, "loss")
    reference.backward()
    grads = {key: p.grad for key, p in twin.named_parameters()}
    grads = weights.from_hf(name, twin.state_dict() | grads, model.config)
    ours = gradients(model, loss)
    assert ours.keys() == dict(model.named_parameters()).keys()
    theirs = {key: grads[key] for key in ours}
    assert_all_close(joined(ours), joined(theirs), relative)
    _, exact = copy.deepcopy(model).double()(idx, targets)
    assert exact.dtype == torch.float64
    assert_close(loss, exact, 1e-6, "loss in fp64")


# ==========================================================================
# Runs that were never trained, whose answers are known

RUN_CONFIG = {
    "n_layer": 4, "vocab_size": 257, "block_size": 256, "batch_tokens": 2048, "seed": 1, "max_steps": 20,
    "warmup_steps": 10, "max_lr": 0.002, "min_lr": 0.0002, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95,
    "adam_eps": 1e-8, "grad_clip": 1.0, "recipe": "shared", "data_dir": "data/x", "train_shards": 100,
    "val_tokens": 4096, "run_name": "", "init_from": "",
}  # fmt: skip


def run_facts(script="train_made_up", fingerprint="f", facts=None, **fields):
    """A run event; facts: more of it, fields: of its config."""
    data = {"dataset": "d", "tokenizer": "bytes", "vocab_size": 257, "fingerprint": fingerprint}
    event = {
        "event": "run", "script": script, "script_hash": "0123", "processes": 1, "parameters": 800_000,
        "active_parameters": 800_000, "flops_per_token": 1.6e6, "device": "cpu", "torch": "2.13.0",
        "dtype": "float32", "data": data, "config": RUN_CONFIG | fields,
    }  # fmt: skip
    return event | (facts or {})


def score_event(step, right, n):
    """A score event by which the first `right` of n items, all with the answer 0, were answered right."""
    predictions = "0" * right + "1" * (n - right)
    return {"event": "score", "step": step, "task": "cloze", "convention": "nanogpt", "n": n,
            "acc_norm": right / n, "predictions_norm": predictions}  # fmt: skip


def write_run(folder, losses=(5.0, 4.0, 3.0), right=50, n=400, **facts):
    """A run's folder: validated at steps 0, 10, 20 …; the first `right` of its n items were answered right.

    facts: of its run event, see run_facts().
    """
    folder.mkdir(parents=True)
    last = 10 * (len(losses) - 1)
    events = [run_facts(**{"max_steps": last} | facts)]
    for step in range(last):
        events.append({"event": "train", "step": step, "loss": 3.0, "norm": 1.0, "ms": 100.0})
    for at, loss in enumerate(losses):
        events += [{"event": "val", "step": 10 * at, "loss": loss}, score_event(10 * at, right, n)]
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "cloze_nanogpt.json").write_text(json.dumps({"labels": "0" * n}))
    return folder


def make_run(entry="mine", loss=3.0, seed=1, base="gpt2", rate=1.0, study="s", size="0.8M", steps=200,
             at=None, ms=100.0, fresh=None, changed=(), **facts):  # fmt: skip
    """A run of a study, without files. fresh: its training loss; at: the step that it has come to."""
    from tools.compare.runs import Run

    found = run_facts(max_steps=steps, seed=seed, **{"max_lr": 0.002 * rate, "min_lr": 0.0002 * rate} | facts)
    train = {}
    for step in range(0, steps, 10):
        train[step] = {"step": step, "loss": loss if fresh is None else fresh, "ms": ms, "processes": 1}
    at = steps if at is None else at
    folder = Path(f"log/{study}-{size}-{entry}-x{rate:g}-{seed}")
    place = {"name": study, "size": size, "entry": entry, "base": base, "rate": rate}
    return Run(folder, found, found["script_hash"], list(changed), train, {0: 5.5, at: loss}, {}, {}, ms,
               ms * steps, {}, place)  # fmt: skip


def make_entry(entry, losses, **options):
    """Runs of an entry with the seeds 1, 2, 3 …"""
    return [make_run(entry, loss, seed, **options) for seed, loss in enumerate(losses, 1)]


def table_rows(text):
    """{first cell: the other cells} of all Markdown tables in a text, of a name's rows the first."""
    found = {}
    for line in text.splitlines():
        if line.startswith("| "):
            _, name, *cells, _ = line.split("|")
            found.setdefault(name.strip(), [cell.strip() for cell in cells])
    return found


# ==========================================================================
# Data: text, shards, items


def write(folder, *options, env=None):
    """Runs fineweb.py with these options in folder: (exit status, what it printed)."""
    command = [sys.executable, ROOT / "fineweb.py", *map(str, options)]
    quiet = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    result = subprocess.run(command, cwd=folder, env=env, **quiet)
    return result.returncode, result.stdout + result.stderr


def documents(n, seed=0):
    return [text(20 + 37 * i % 300, seed + i) for i in range(n)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_parquet(path, texts, row_group_size=7):
    """Writes a column of texts, and another one, to a path or a binary file, which is returned."""
    table = pyarrow.table({"text": texts, "id": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def tokens_in(shard):
    return np.fromfile(shard, dtype=np.uint16, offset=fineweb.HEADER_BYTES)


def tokens_of(folder):
    """All tokens of a folder's shards, in order."""
    paths = sorted(folder.glob("*.bin"), key=lambda path: path.name[-10:])
    return np.concatenate([tokens_in(path) for path in paths])


def straight(texts):
    """The tokens of documents in bytes, without any of the writer's machinery."""
    encoding = fineweb.get_tokenizer("bytes")
    tokens = []
    for document in texts:
        tokens += [encoding.eot_token, *encoding.encode_ordinary(document)]
    return np.array(tokens)


def bytes_of(folder):
    """{name: content} of the files in and below a folder, without the lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def in_process(folder, paths, shard_tokens=5000, last=None, tokenizer="bytes"):
    fineweb.tokenize_files(folder, paths, last, shard_tokens, str(tokenizer), 0)


def refused(fact, action, *arguments, **options):
    """action(…) ends the program with one line that has a fact in it, a regular expression; the line."""
    with pytest.raises(SystemExit, match=fact) as error:
        action(*arguments, **options)
    assert "\n" not in error.value.code
    return error.value.code


def own_tokenizer(path, end="</s>"):
    """A small tokenizer.json like SentencePiece's, with what such files say for other uses; its path."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", *[end][: end != ""]]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    inner.train_from_iterator([*documents(40), "</s>", "<endoftext>|"], trainer)
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    inner.enable_truncation(8)
    inner.enable_padding(length=100)
    inner.save(str(path))
    return path


def with_own_tokenizer(tmp_path):
    """(folder of shards, the texts, the path of the tokenizer.json) of a small dataset."""
    path = own_tokenizer(tmp_path / "tokenizer.json")
    texts = [*documents(30), "", "with </s> letters", "of<|endoftext|>the"]
    in_process(tmp_path / "out", [write_jsonl(tmp_path / "a.jsonl", texts)], 1024, tokenizer=path)
    return tmp_path / "out", texts, path


class Killed(BaseException):
    pass


def killing(number, before):
    """An os.replace, by which each write ends, that kills just before or after its call with this number."""
    replace = os.replace
    numbers = itertools.count(1)

    def counting(source, target):
        is_last = next(numbers) == number
        if is_last and before:
            raise Killed
        replace(source, target)
        if is_last:
            raise Killed

    return counting


def survives_a_kill_at_every_write(tmp_path, action):
    """action(folder) is killed at each of its writes in turn and run again: (writes, the bytes each time)."""
    action(tmp_path / "whole")
    whole = bytes_of(tmp_path / "whole")
    for number in itertools.count(1):
        for before in (True, False):
            folder = tmp_path / f"killed-{number}-{before}"
            folder.mkdir()
            (folder / "notes.tmp").write_text("mine")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "replace", killing(number, before))
                try:
                    action(folder)
                except Killed:
                    pass
                else:
                    return number - 1
            action(folder)
            assert bytes_of(folder) == whole | {"notes.tmp": b"mine"}, (number, before)
            fineweb.verify(folder)


THEIRS = dict.fromkeys([
    "notes.txt", "results.tmp", "raw/sample/10BT/000_00000.parquet", ".cache/huggingface/download/x",
], b"mine")  # fmt: skip


def put_theirs(folder):
    for name, content in THEIRS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def item(ctx, endings, label=0, **fields):
    common = {"activity_label": "", "ctx": ctx, "ctx_a": ctx, "ctx_b": "", "endings": endings, "label": label}
    return common | fields


def random_items(n, seed=0):
    rng = np.random.default_rng(seed)
    items = []
    for i in range(n):
        texts = []
        for j, n_words in enumerate(rng.integers(2, 14, size=5)):
            texts.append(text(int(n_words), 100 * seed + 10 * i + j))
        endings = [f"{ending} {k}" for k, ending in enumerate(texts[1:])]
        items.append(item(texts[0], endings, int(rng.integers(4))))
    return items


def write_items(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path
