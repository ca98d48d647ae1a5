"""
GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask
Learners") at 124M parameters.

The reference that the other scripts are diffed against: learned positions,
LayerNorm before attention and MLP, full multi-head attention, a GELU MLP four
times as wide as the residual stream, biases everywhere, and a head tied to the
embedding. 124,475,904 parameters with the vocabulary padded to 50,304.

    python train_gpt2.py --tiny    # a few minutes on a laptop
    python train_gpt2.py           # on one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py    # on eight
    python train_gpt2.py --resume  # continue it; or --eval, or --sample "Hello"
"""
import dataclasses
import hashlib
import math
import os
import shlex
import time
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro

import fineweb
import hellaswag
from fineweb import append, fail, say

# ==========================================================================
# Config


@dataclasses.dataclass
class Config:
    # ---- this architecture's fields
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels of the residual stream

    # ---- the run: the same in every script
    vocab_size: int = 50_304  # GPT-2's 50,257 tokens, padded to a multiple of 128
    block_size: int = 1024  # tokens of context
    batch_tokens: int = 2**19  # effective batch: tokens per optimizer step, over all GPUs
    seed: int = 1337  # seed of the initial weights, the data's order and the samples

    # AdamW (Loshchilov and Hutter, 2019) and a cosine schedule, both with the
    # settings of GPT-3 (Brown et al., 2020, appendix B and table 2.1)
    max_steps: int = 19_073  # optimizer steps: 10B tokens / 2**19
    warmup_steps: int = 715  # steps of linear warm-up; GPT-3's 375M tokens are 715
    max_lr: float = 6e-4  # learning rate after the warm-up
    min_lr: float = 6e-5  # learning rate at the end of the cosine; GPT-3: a tenth
    weight_decay: float = 0.1  # AdamW: how fast matrices and embeddings decay
    beta1: float = 0.9  # AdamW: decay of the running mean of gradients
    beta2: float = 0.95  # AdamW: decay of the running mean of their squares
    adam_eps: float = 1e-8  # AdamW: keeps a division by a tiny gradient finite
    grad_clip: float = 1.0  # gradients with a larger norm are scaled down to this norm
    recipe: Literal["paper", "shared"] = "paper"  # the paper's own settings, if it has some, as RWKV-7's

    data_dir: str = "data/fineweb10B"  # folder of token shards, made by fineweb.py
    train_shards: int = 100  # training shards to use, of 100M tokens each
    val_tokens: int = 10_485_760  # tokens of the validation shard to use, as in llm.c
    hellaswag: str = hellaswag.DEFAULT_FILE  # HellaSwag's validation set; downloaded if missing
    run_name: str = ""  # the run's folder is log/NAME; empty: the architecture's name
    init_from: str = ""  # a checkpoint whose weights the run starts from
    eval_every: int = 250  # steps between evaluations, checkpoints and samples
    log_every: int = 1  # steps between lines on the screen; log.jsonl has every step
    prompt: str = "Hello, I'm a language model,"  # what the samples continue
    samples: int = 2  # how many samples are drawn at a time
    sample_tokens: int = 32  # tokens that a sample adds at most
    temperature: float = 1.0  # of the samples; 0: always the likeliest token
    top_k: int = 50  # a sample's token is one of the top_k likeliest; 0: of all

    micro_batch: int = 0  # rows at a time on a device; 0: as many as fit
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to run
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # type of the matrix products
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on CUDA, but not on Windows

    # ---- what to do, if not to train a new run: these four are not in the log's `changed`
    tiny: bool = False  # train a small model on a small dataset that is made offline
    resume: bool = False  # continue from the run's last checkpoint
    eval: bool = False  # score the run's last checkpoint
    sample: str | None = None  # continue this text with the run's last checkpoint


MAY_BE_ZERO = ("seed", "warmup_steps", "sample_tokens", "top_k", "micro_batch")
# --tiny: a run that learns English spelling in a few minutes on a laptop
TINY_RUN = dict(
    vocab_size=257, block_size=128, batch_tokens=2048, max_steps=600, warmup_steps=30,
    max_lr=2e-3, min_lr=2e-4, data_dir=fineweb.SAMPLE, val_tokens=65_536,
    log_every=25, prompt="Returns the ", sample_tokens=96,
)  # fmt: skip

SCRIPT = Path(__file__).stem
CHECKPOINTS = "step_????????.pt"  # in the order of their names

# ---- this architecture's --tiny, and its paper's recipe if it has one
TINY_MODEL = dict(n_layer=4, n_head=4, n_embd=128)
RECIPE = {}  # the shared one

# ==========================================================================
# Model: this architecture's. B batch, T tokens, C channels, H heads,
# D channels of a head, V vocabulary.


# The same in GPT-2 and RWKV-7.
class Norm(nn.Module):
    """LayerNorm (Ba et al., 2016, eq. 4): (..., size) -> (..., size)."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


class Attention(nn.Module):
    """Causal multi-head attention (Vaswani et al., 2017, section 3.2): (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.q = nn.Linear(config.n_embd, config.n_embd)
        self.k = nn.Linear(config.n_embd, config.n_embd)
        self.v = nn.Linear(config.n_embd, config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = self.k(x).view(B, T, self.n_head, -1).transpose(1, 2)
        v = self.v(x).view(B, T, self.n_head, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class MLP(nn.Module):
    """Two layers with GELU (Hendrycks and Gimpel, 2016, section 2): (B, T, C) -> (B, T, C)."""

    def __init__(self, n_embd, n_inner):
        super().__init__()
        self.up = nn.Linear(n_embd, n_inner)
        self.proj = nn.Linear(n_inner, n_embd)

    def forward(self, x):
        return self.proj(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Residual block with norms first (Radford et al., 2019, section 2.3): (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = Norm(config.n_embd)
        self.attention = Attention(config)
        self.norm2 = Norm(config.n_embd)
        self.mlp = MLP(config.n_embd, 4 * config.n_embd)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class Model(nn.Module):
    """The language model: token ids in, logits or losses out."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            fail(f"--n_embd {config.n_embd} is not a multiple of --n_head {config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the head
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.norm = Norm(config.n_embd)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)  # set by the loop
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """N(0, 0.02) as in GPT-1, less where a block adds to the residual stream (section 2.3)."""
        # 0.02 is meant for 768 channels: with 0.02 sqrt(768 / C) sums over other numbers are as large
        std = 0.02 * math.sqrt(768 / self.config.n_embd)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith("proj.weight"):
                parameter.normal_(0.0, std / math.sqrt(2 * self.config.n_layer))
            elif name.split(".")[-2] in ("wte", "wpe", "q", "k", "v", "up"):
                parameter.normal_(0.0, std)
            else:
                raise NotImplementedError(f"no initialisation for {name}")

    def forward(self, idx, targets=None):
        """Ids idx (B, T) -> (logits (B, T, V), None), or with targets (B, T) -> (None, mean loss in nats)."""
        x = self.wte(idx) + self.wpe.weight[: idx.shape[1]]  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.wte.weight)  # (B, T, V)
        if targets is None:
            return logits, None
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def decode(self, idx, state=None):
        """Logits (B, V) of the token after idx (B, T), and a state for the next call (none here)."""
        logits, _ = self(idx[:, -self.config.block_size :])
        return logits[:, -1], None

    def after_step(self, skipped=False):
        """Called after each optimizer step; returns figures for the log (none here)."""
        return {}

    def active_parameters(self):
        """Parameters that one token uses."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """FLOPs of a forward pass per token at full context: matrix products and attention."""
        config = self.config
        weights = self.wte.weight.numel()  # as the head; looking up an embedding costs nothing
        weights += sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        keys = config.block_size / 2  # that a token sees on average
        return 2 * weights + config.n_layer * 4 * config.n_embd * keys  # QK^T and AV

    def optimizer_groups(self):
        """Matrices and embeddings decay, norms and biases don't."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        return [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]


# ==========================================================================
# Set-up: the same in every script


def parse(default):
    """The Config on the command line; what isn't given there is as in default, a Config."""
    config = tyro.cli(Config, default=default, description=__doc__, use_underscores=True,
                      config=(tyro.conf.FlagCreatePairsOff,),
                      console_outputs=os.environ.get("RANK", "0") == "0")  # fmt: skip
    for name, value in vars(config).items():
        least = 1 if type(value) is int and name not in MAY_BE_ZERO else 0
        if type(value) in (int, float) and not least <= value < (1 if name.startswith("beta") else 2**63):
            fail(f"--{name} {value}: must be at least {least}, and finite; beta1 and beta2 below 1")
    return config


def start(config, world):
    """(device, dtype of matrix products) of this process, which joins the others if torchrun started some."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    found = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": world}
    kind = config.device if config.device != "auto" else next(name for name in found if found[name])
    if found[kind] <= local_rank:
        fail(f"torch finds {found[kind]} {kind} device(s) here: start fewer processes or change --device")
    device = torch.device(kind)
    dtype = torch.float32  # the safe choice on a CPU and on Apple's GPUs
    if kind == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves fp32
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if world > 1:
        # DDP must not cut the graph into buckets, since gradients are sent only once a step.
        # The line also imports _dynamo now: imported later, it would keep the group alive at exit.
        torch._dynamo.config.optimize_ddp = False
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return device, dtype if config.dtype == "auto" else getattr(torch, config.dtype)


def sum_over_ranks(values, device):
    """A list of numbers, each summed over all processes."""
    if dist.is_initialized():
        values = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(values)
        values = values.tolist()
    return values


def find_micro_batch(config, rows, world, device, autocast):
    """The largest divisor of rows that fits into the device's memory, the same on every process."""
    most = (4096 if device.type == "cpu" else 65_536) // config.block_size  # more would hardly be faster
    sizes = [n for n in range(rows, 0, -1) if rows % n == 0 and n <= max(1, most)]
    if config.micro_batch or device.type == "cpu":  # there the system kills what is too large
        return config.micro_batch or sizes[0]
    for n in sizes:
        fits = 1.0
        try:
            model = Model(config).to(device)  # not compiled, which takes a little more memory
            optimizer = torch.optim.AdamW(model.parameters())
            idx = torch.zeros(n, config.block_size, dtype=torch.int64, device=device)
            for _ in range(2):  # the second has gradients and AdamW's moments in memory, too
                with autocast:
                    _, loss = model(idx, idx)
                loss.backward()
                optimizer.step()
        except RuntimeError as error:
            if "out of memory" not in str(error) and "ALLOC" not in str(error):  # cuBLAS's and cuDNN's
                raise
            fits = 0.0
        model = optimizer = loss = None
        if sum_over_ranks([fits], device)[0] == world:  # it fits on all
            return n
    fail(f"not even one row of {config.block_size} tokens fits: use a smaller --block_size or model")


# ==========================================================================
# Checkpoints: the same in every script


def save_checkpoint(folder, step, best, data, model, optimizer, scaler):
    """Writes step_N.pt, which --resume needs, and best.pt if this is best's step; keeps the last two."""
    checkpoint = {
        "script": SCRIPT, "config": vars(model.config), "data": data,
        "step": step,  # also the position in the data: a batch is a function of seed and step
        "model": model.state_dict(), "optimizer": optimizer.state_dict()["state"],
        "scaler": scaler.state_dict(), "best": best,
    }  # fmt: skip
    path = folder / f"step_{step:08d}.pt"
    for each in (folder / "best.pt", path) if step == best[1] else (path,):
        fineweb.write_atomic(each, lambda file: torch.save(checkpoint, file), "continue with --resume")
    for old in (*sorted(folder.glob(CHECKPOINTS))[:-2], *folder.glob("*.pt.*.tmp")):  # a killed run's
        old.unlink()
    say(f"step {step:05d} | saved {path}")


def open_run(folder, asked):
    """A run's newest whole checkpoint, {} if it is to begin. Who trains takes the folder's lock.

    Raises SystemExit if there is none where one is needed, or one where a run is to begin.
    """
    reads = asked.eval or asked.sample is not None
    if not reads and (folder.exists() or not asked.resume):
        fineweb.lock(folder, "wait for it, or choose another --run_name")
    paths = sorted(folder.glob(CHECKPOINTS), reverse=True)  # the newest one first
    if paths and not (reads or asked.resume):
        fail(f"{folder} already holds a run: continue it with --resume, or choose another --run_name")
    if not paths and (reads or (asked.resume and not folder.exists())):
        fail(f"{folder} holds no checkpoint: train it first, or name another run with --run_name")
    return fineweb.load_checkpoint(paths, SCRIPT, vars(asked)) if paths else {}


# ==========================================================================
# Training: the same in every script


def get_lr(config, step):
    """Linear warm-up to max_lr, then a cosine down to min_lr (Brown et al., 2020, appendix B)."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))  # from 1 to 0
    return config.min_lr + (config.max_lr - config.min_lr) * cosine


def train_step(net, model, optimizer, scaler, step, batch, micro_batch, autocast):
    """One optimizer step on this process's rows, batch (B, T + 1), with micro_batch of them at a time.

    net is the model as it is called: compiled, or in DDP. Returns floats, the mean loss over the rows
    and the gradient's norm before clipping, and a dict of the model's own figures.
    """
    model.train()
    model.step.fill_(step)
    loss = torch.zeros((), device=batch.device)
    micro_batches = batch.split(micro_batch)
    for number, rows in enumerate(micro_batches, start=1):
        if dist.is_initialized():
            # gradients add up in .grad, so averaging them over the processes can wait for the last
            net.require_backward_grad_sync = number == len(micro_batches)
        with autocast:
            _, micro_loss = net(rows[:, :-1], rows[:, 1:])
        # .grad adds up the gradients of the micro-batches, but the loss is a mean over them
        micro_loss = micro_loss / len(micro_batches)
        scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    scaler.unscale_(optimizer)  # from fp16's scaled gradients to the real ones, for clipping
    norm = nn.utils.clip_grad_norm_(model.parameters(), model.config.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = get_lr(model.config, step) * group.get("lr_scale", 1.0)
    scaler.step(optimizer)  # which skips the step if a gradient of fp16 is infinite
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    figures = model.after_step(skipped=scaler.is_enabled() and not norm.isfinite())
    return loss.item(), norm.item(), figures


@torch.no_grad()
def validate(net, windows, micro_batch, rank, world, device, autocast):
    """Mean next-token loss over the windows in nats, the same on every process."""
    mine = range(rank, len(windows), world)
    total = 0.0
    for first in range(0, len(mine), micro_batch):
        rows = torch.from_numpy(windows.rows(mine[first : first + micro_batch])).to(device)
        with autocast:
            _, loss = net(rows[:, :-1], rows[:, 1:])
        total += loss.item() * len(rows)
    return sum_over_ranks([total], device)[0] / len(windows)


@torch.no_grad()
def generate(model, tokenizer, prompt, device, autocast):
    """config.samples texts that continue the prompt, each as far as <|endoftext|> or sample_tokens."""
    config = model.config
    tokens = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
    idx = torch.tensor([tokens] * config.samples, device=device)
    generator = torch.Generator(device).manual_seed(config.seed)
    k = min(config.top_k or tokenizer.n_vocab, tokenizer.n_vocab) if config.temperature else 1
    state = None
    for _ in range(config.sample_tokens):
        with autocast:
            logits, state = model.decode(idx, state)
        top = logits[:, : tokenizer.n_vocab].float().topk(k)  # ids beyond n_vocab are padding
        probabilities = (top.values / (config.temperature or 1.0)).softmax(-1)
        choice = torch.multinomial(probabilities, 1, generator=generator)
        idx = torch.cat((idx, top.indices.gather(-1, choice)), dim=1)
    texts = []
    for row in idx[:, len(tokens) :].tolist():
        end = row.index(tokenizer.eot_token) if tokenizer.eot_token in row else len(row)
        texts.append(prompt + tokenizer.decode(row[:end]))
    return texts


def main():
    # ---- what to do: an option, else what the checkpoint, --tiny, the paper's recipe or Config says
    asked = parse(Config(**RECIPE))
    name = asked.run_name or SCRIPT.removeprefix("train_") + "-tiny" * asked.tiny
    folder = Path("log") / name
    checkpoint = open_run(folder, asked)
    values = RECIPE if asked.recipe == "paper" else {}
    if asked.tiny:
        values = values | TINY_MODEL | TINY_RUN
    if checkpoint:
        values = checkpoint["config"] | dict(tiny=False, resume=False, eval=False, sample=None)
    elif asked.init_from:  # of which only the model is taken: its weights and its shape, the first fields
        checkpoint = fineweb.load_checkpoint([asked.init_from], SCRIPT, vars(asked))
        shape = list(vars(asked))[: list(vars(asked)).index("batch_tokens")]
        values = values | {field: checkpoint["config"][field] for field in shape}
        checkpoint |= {"step": 0, "best": (math.inf, 0), "optimizer": {}, "scaler": {}}
        checkpoint["data"]["fingerprint"] = ""  # other data than before are fine
    config = parse(Config(**(values | {"run_name": name})))
    first_step = checkpoint.get("step", 0)
    best = checkpoint.get("best", (math.inf, 0))  # the lowest validation loss, and its step
    changed = {key: v for key, v in [*vars(config).items()][:-4] if first_step and v != values[key]}
    last_step = first_step if config.eval else max(first_step, config.max_steps)
    rank = int(os.environ.get("RANK", 0))  # torchrun tells each process its number
    world = int(os.environ.get("WORLD_SIZE", 1))  # and how many there are
    if config.batch_tokens % (world * config.block_size * max(1, config.micro_batch)):
        fail(f"--batch_tokens {config.batch_tokens} can't be split into {world} process(es) x "
             f"--micro_batch {config.micro_batch} rows x --block_size {config.block_size}")  # fmt: skip
    device, dtype = start(config, world)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    # ---- the model
    torch.manual_seed(config.seed)
    model = Model(config)  # on the CPU: the same weights on every device
    if checkpoint:
        try:
            model.load_state_dict(checkpoint["model"])
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            fail(f"the checkpoint's weights don't fit this model's shape or script: {reason[:80]}")
    model.to(device)
    if config.sample is not None:
        tokenizer = fineweb.get_tokenizer(checkpoint["data"]["tokenizer"], config.data_dir)
        say("\n".join(generate(model.eval(), tokenizer, config.sample, device, autocast)))
        return

    # ---- the data
    if config.data_dir == fineweb.SAMPLE:
        fineweb.write_sample()
    known = checkpoint.get("data")
    data = fineweb.open_dataset(config.data_dir, config.vocab_size, config.train_shards, known)
    train = fineweb.Windows(config.data_dir, "train", config.block_size, config.train_shards)
    val = fineweb.Windows(config.data_dir, "val", config.block_size, max_tokens=config.val_tokens)
    batch_rows = config.batch_tokens // config.block_size
    loader = fineweb.Loader(train, batch_rows, config.seed, rank, world, device,
                            config.vocab_size, config.max_steps)  # fmt: skip
    tokenizer = fineweb.try_tokenizer(data["tokenizer"], config.data_dir) if rank == 0 else None
    scorer = hellaswag.open_scorer(config.hellaswag, config.data_dir, tokenizer, config.block_size,
                                   device, rank, world)  # fmt: skip

    # ---- the optimizer; every process takes an equal share of a batch, in micro-batches
    micro_batch = find_micro_batch(config, batch_rows // world, world, device, autocast)
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(model.optimizer_groups(), betas=betas, eps=config.adam_eps, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if checkpoint:  # the settings are as given now, the moments the checkpoint's
        optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]})
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())
    checkpoint = {}  # gives its memory back

    # ---- three names for the same weights: model for checkpoints, samples and HellaSwag, whose many
    # shapes would each be compiled anew; compiled for speed; net to train, on all processes
    compiled = model
    on_linux_gpu = device.type == "cuda" and os.name == "posix"
    if config.compile == "on" or (config.compile == "auto" and on_linux_gpu):
        # As in eager mode, backward runs outside of autocast. Under it, as is torch's default here, it
        # would be in 16 bits even where forward leaves autocast for fp32.
        torch._functorch.config.backward_pass_autocast = "off"
        compiled = torch.compile(model, dynamic=False)
    net = compiled
    if world > 1:
        net = nn.parallel.DistributedDataParallel(compiled, gradient_as_bucket_view=True)
        net.broadcast_buffers = False  # as an argument it is deprecated since torch 2.13

    # ---- the run's folder: a copy of the script, and the log, which is only ever appended to
    source = Path(__file__).read_bytes()
    flops = model.flops_per_token()
    facts = {
        "script": SCRIPT, "script_hash": hashlib.sha256(source).hexdigest()[:16], "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": world, "dtype": str(dtype), "micro_batch": micro_batch, "first_step": first_step,
        "parameters": sum(p.numel() for p in model.parameters()), "flops_per_token": flops,
        "active_parameters": model.active_parameters(), "data": data, "changed": changed,
    }  # fmt: skip
    if rank == 0 and not config.eval:
        fineweb.write_atomic(folder / f"{SCRIPT}.py", lambda file: file.write(source))
    log = folder / "log.jsonl" if rank == 0 else os.devnull

    def evaluate(step):
        """Logs and prints the validation loss, the accuracy on HellaSwag or the cloze, and samples."""
        model.eval()
        loss = validate(compiled, val, micro_batch, rank, world, device, autocast)
        append(log, "val", step=step, loss=loss)
        say(f"step {step:05d} | validation loss {loss:.4f}")
        for convention in scorer.batches if scorer else ():
            if convention == "nanogpt" or step == last_step:
                with autocast:
                    result = scorer.score(lambda idx: model(idx)[0], convention, step, folder)
                append(log, "score", step=step, **result)
                say(f"step {step:05d} | {hellaswag.one_line(result)}")
        for text in generate(model, tokenizer, config.prompt, device, autocast) if tokenizer else ():
            append(log, "sample", step=step, text=text)
            say(f"step {step:05d} > {text!r}")
        return loss, step

    append(log, "run", time=time.time(), config=vars(config), **facts)
    for key, value in (vars(config) | facts).items():
        say(f"{key:18} {value}")

    # ---- the loop
    with fineweb.noted_signals() as signals:
        stopping = False
        for step in range(first_step, last_step + 1):
            # ---- once in a while, and at the end: evaluate, save
            is_last = step == last_step
            is_due = (step % config.eval_every == 0 or is_last) and not stopping
            if is_due:
                best = min(best, evaluate(step))
            if (is_due or stopping) and step > 0 and not config.eval and rank == 0:
                save_checkpoint(folder, step, best, data, model, optimizer, scaler)
            if is_last or stopping:
                break

            # ---- one optimizer step
            start_time = time.perf_counter()
            began = start_time if step == first_step else began  # after the first evaluation
            batch = loader.batch(step)  # (rows of this process, T + 1)
            loss, norm, extra = train_step(net, model, optimizer, scaler, step, batch, micro_batch, autocast)
            loss, stopping = sum_over_ranks([loss / world, len(signals)], device)
            seconds = time.perf_counter() - start_time

            # ---- the log and the screen; fp16's scaler may skip a step, but without one the scale is 1
            if not math.isfinite(loss) or (not math.isfinite(norm) and scaler.get_scale() <= 1):
                fail(f"stopped at step {step}: loss {loss}, gradient norm {norm}; "
                     f"the last good checkpoint, if any, is in {folder}")  # fmt: skip
            append(log, "train", step=step, loss=loss, norm=norm if math.isfinite(norm) else None,
                   lr=get_lr(config, step), ms=1000 * seconds, **extra)  # fmt: skip
            if step % config.log_every == 0:
                rate = config.batch_tokens / seconds
                tflops = 3 * flops * rate / world / 1e12  # backward is two forward passes' work
                left = (time.perf_counter() - began) / (step + 1 - first_step) * (last_step - step - 1)
                say(f"{step:5d}/{last_step}  loss {loss:.3f}  norm {norm:.2f}  {rate / 1000:.1f}k tok/s  "
                    f"{tflops:.3g} TFLOP/s  {left / 60:.1f} min left")  # fmt: skip
    is_finished = step >= config.max_steps and not stopping  # stopped in the last step it lacks its scores
    action = f"--sample {shlex.quote(config.prompt)}" if is_finished else "--resume"
    say(f"{folder} is at step {step} of {config.max_steps}.")
    say(f"Next: python {SCRIPT}.py --run_name {shlex.quote(name)} {action}")


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()  # not in main(), where DDP still holds the group and its threads
