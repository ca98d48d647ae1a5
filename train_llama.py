"""
LLaMA 3 (Grattafiori et al., 2024, "The Llama 3 Herd of Models") at 124M
parameters.

Against GPT-2: rotary positions instead of learned ones, RMSNorm instead of
LayerNorm, four query heads to each head of keys and values, a SwiGLU MLP, and
no biases. The head is tied to the embedding, as in Llama 3.2.
123,587,328 parameters with the vocabulary padded to 50,304.

    python train_llama.py --tiny    # a few minutes on a laptop
    python train_llama.py           # on one GPU
    torchrun --standalone --nproc_per_node=8 train_llama.py    # on eight
    python train_llama.py --resume  # continue from the last checkpoint
    python train_llama.py --eval    # score it; or --sample "Hello"
"""
import argparse
import dataclasses
import json
import math
import os
import time
from pathlib import Path

# before torch is loaded: a thread that waits for others must not keep a core busy meanwhile
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import fineweb
import hellaswag
from fineweb import fail, option, say

# ==========================================================================
# Config


@dataclasses.dataclass
class Config:
    # ---- this architecture's fields
    n_layer: int = option(12, "blocks")
    n_head: int = option(12, "attention heads")
    n_kv_head: int = option(3, "heads of keys and values, each for n_head / n_kv_head query heads")
    n_embd: int = option(768, "channels of the residual stream")
    n_inner: int = option(2432, "channels inside the MLP; all matrices together are as large as GPT-2's")
    rope_theta: float = option(500_000.0, "base of the rotary positions")

    # ---- the run: the same in every script
    vocab_size: int = option(50_304, "GPT-2's 50,257 tokens, padded to a multiple of 128")
    block_size: int = option(1024, "tokens of context")
    batch_tokens: int = option(2**19, "effective batch: tokens per optimizer step, over all GPUs")
    seed: int = option(1337, "seed of the initial weights, the data's order and the samples", zero=True)

    # AdamW (Loshchilov and Hutter, 2019) and a cosine schedule, both with the
    # settings of GPT-3 (Brown et al., 2020, appendix B and table 2.1)
    max_steps: int = option(19_073, "optimizer steps: 10B tokens / 2**19")
    warmup_steps: int = option(715, "steps of linear warm-up; GPT-3's 375M tokens are 715", zero=True)
    max_lr: float = option(6e-4, "learning rate after the warm-up")
    min_lr: float = option(6e-5, "learning rate at the end of the cosine; GPT-3: a tenth", zero=True)
    weight_decay: float = option(0.1, "AdamW: how fast matrices and embeddings decay", zero=True)
    beta1: float = option(0.9, "AdamW: decay of the running mean of gradients", zero=True)
    beta2: float = option(0.95, "AdamW: decay of the running mean of their squares", zero=True)
    adam_eps: float = option(1e-8, "AdamW: keeps a division by a tiny gradient finite")
    grad_clip: float = option(1.0, "gradients with a larger norm are scaled down to this norm")
    recipe: str = option("paper", "AdamW and schedule: shared, or the paper's own where it has one for "
                         "this size, as RWKV-7's has", ("paper", "shared"))  # fmt: skip

    data_dir: str = option("data/fineweb10B", "folder of token shards, made by fineweb.py")
    train_shards: int = option(100, "training shards to use, of 100M tokens each")
    val_tokens: int = option(10_485_760, "tokens of the validation shard to use, as in llm.c")
    hellaswag: str = option(hellaswag.DEFAULT_FILE, "HellaSwag's validation set; downloaded if missing")
    run_name: str = option("", "the run's folder is log/NAME (default: the architecture's name)")
    init_from: str = option("", "a checkpoint whose weights the run starts from")
    eval_every: int = option(250, "steps between evaluations, checkpoints and samples")
    log_every: int = option(1, "steps between lines on the screen; log.jsonl has every step")
    prompt: str = option("Hello, I'm a language model,", "what the samples continue")
    samples: int = option(2, "how many samples are drawn at a time")
    sample_tokens: int = option(32, "tokens that a sample adds at most", zero=True)
    temperature: float = option(1.0, "of the samples; 0: always the likeliest token", zero=True)
    top_k: int = option(50, "a sample's token is one of the top_k likeliest; 0: of all", zero=True)

    micro_batch: int = option(0, "rows at a time on a device; 0: as many as fit", zero=True)
    device: str = option("auto", "where to run", ("auto", "cuda", "mps", "cpu"))
    dtype: str = option("auto", "type of the matrix products", ("auto", "bfloat16", "float16", "float32"))
    compile: str = option("auto", "torch.compile; auto: on CUDA, but not on Windows", ("auto", "on", "off"))


# --resume may change these; another value of any other field would be another run
MAY_CHANGE = (
    "max_steps warmup_steps max_lr min_lr weight_decay beta1 beta2 adam_eps grad_clip data_dir "
    "train_shards val_tokens hellaswag run_name eval_every log_every prompt samples sample_tokens "
    "temperature top_k micro_batch device dtype compile"
).split()
# --tiny: a run that learns English spelling in a few minutes on a laptop
TINY_RUN = dict(
    vocab_size=257, block_size=128, batch_tokens=2048, max_steps=1000, warmup_steps=50,
    max_lr=2e-3, min_lr=2e-4, data_dir="data/sample", val_tokens=65_536,
    log_every=25, prompt="Returns the ", sample_tokens=96,
)  # fmt: skip
# FLOP/s of dense 16-bit matrix products, from the data sheets. Other devices
# show no MFU (model-FLOPs utilisation).
PEAK_FLOPS = {
    "NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 4090": 165e12, "Tesla T4": 65e12,
    "Tesla V100-SXM2-16GB": 125e12, "Tesla V100-SXM2-32GB": 125e12,
}  # fmt: skip

# ---- this architecture's --tiny, and its paper's recipe if it has one
TINY_MODEL = dict(n_layer=4, n_head=4, n_kv_head=1, n_embd=128, n_inner=416)
RECIPE = {}  # the shared one

# ==========================================================================
# Model: this architecture's. B batch, T tokens, C channels, H heads, K heads of
# keys and values, D channels of a head, V vocabulary.


# The same in LLaMA, Mistral and MTA.
class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich, 2019, eq. 4): (..., size) -> (..., size)."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x):
        y = x.to(self.weight.dtype)  # fp32 under autocast, too: squares need its range
        return F.rms_norm(y, self.weight.shape, self.weight, eps=1e-5).to(x.dtype)


# The same in LLaMA, Mistral, Gemma, DeepSeek and MTA.
def rope_table(theta, block_size, size):
    """cos and sin of t theta^(-2i / D), with D = size (Su et al., 2021, section 3.2.2): (2, T, D / 2)."""
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(block_size)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin())).float()


# The same in LLaMA, Mistral, Gemma, DeepSeek and MTA.
def rotate(x, rope):
    """x (B, H, T, D) with its channels i and i + D / 2 turned by rope's angle (Su et al., 2021, eq. 34)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al., 2023, section 2.2): (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        kv_size = config.n_kv_head * config.n_embd // config.n_head
        self.q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k = nn.Linear(config.n_embd, kv_size, bias=False)
        self.v = nn.Linear(config.n_embd, kv_size, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope):
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = self.k(x).view(B, T, self.n_kv_head, -1).transpose(1, 2)  # (B, K, T, D)
        v = self.v(x).view(B, T, self.n_kv_head, -1).transpose(1, 2)
        q = rotate(q, rope)
        k = rotate(k, rope)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


# The same in LLaMA, Mistral, DeepSeek and MTA.
class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020, eq. 6): (B, T, C) -> (B, T, C)."""

    def __init__(self, n_embd, n_inner):
        super().__init__()
        self.gate = nn.Linear(n_embd, n_inner, bias=False)
        self.up = nn.Linear(n_embd, n_inner, bias=False)
        self.proj = nn.Linear(n_inner, n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Residual block with norms first (Touvron et al., 2023, section 2.2): (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = Norm(config.n_embd)
        self.attention = Attention(config)
        self.norm2 = Norm(config.n_embd)
        self.mlp = MLP(config.n_embd, config.n_inner)

    def forward(self, x, rope):
        x = x + self.attention(self.norm1(x), rope)
        x = x + self.mlp(self.norm2(x))
        return x


class Model(nn.Module):
    """The language model: token ids in, logits or losses out."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % (2 * config.n_head):
            fail(f"--n_embd {config.n_embd} can't be split into --n_head {config.n_head} heads of pairs")
        if config.n_head % config.n_kv_head:
            fail(f"--n_head {config.n_head} is not a multiple of --n_kv_head {config.n_kv_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the head
        rope = rope_table(config.rope_theta, config.block_size, config.n_embd // config.n_head)
        self.register_buffer("rope", rope, persistent=False)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.norm = Norm(config.n_embd)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """As GPT-2's, since the paper gives none."""
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith("proj.weight"):
                parameter.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer))
            elif name.split(".")[-2] in ("wte", "q", "k", "v", "gate", "up"):
                parameter.normal_(0.0, 0.02)
            else:
                raise NotImplementedError(f"no initialisation for {name}")

    def forward(self, idx, targets=None, reduction="mean"):
        """Token ids idx (B, T) -> (logits (B, T, V), None), or with targets (B, T) -> (None, loss).

        The loss is the cross-entropy in nats: its mean, or with reduction "none" each
        token's, (B, T), and 0 where the target is negative.
        """
        x = self.wte(idx)  # (B, T, C)
        rope = self.rope[:, : idx.shape[1]]
        for block in self.blocks:
            x = block(x, rope)
        x = self.norm(x)
        if targets is None:
            return F.linear(x, self.wte.weight), None  # (B, T, V)
        return None, head_loss(x, self.wte.weight, targets, reduction)

    def decode(self, idx, state=None):
        """Logits (B, V) of the token after idx (B, T), and a state for the next call (none here)."""
        logits, _ = self(idx[:, -self.config.block_size :])
        return logits[:, -1], None

    def after_step(self, skipped=False):
        """Called after each optimizer step. Returns figures for the log."""
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

    # ----------------------------------------------------------------------
    # Optimizer groups

    def optimizer_groups(self):
        """Matrices and embeddings decay, norms and biases don't."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        return [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]


# ==========================================================================
# Loss: the same in every script


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of logits = x @ weight.T: x (N, C), weight (V, C), targets (N,) -> scalar.

        loss = mean(logsumexp(logits) - logits[target])
        d loss / d logits = (softmax(logits) - one_hot(target)) / N

    All logits at once, (N, V), would be by far the largest tensor of the run. So they are
    computed for some rows at a time, and the gradients of x and weight along with them, while
    softmax(logits) is at hand. The obvious version is in tests/reference.py.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, needs_grad):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x = x.to(dtype)
        w = weight.to(dtype)
        dx = torch.empty_like(x) if needs_grad else None
        dweight = torch.zeros_like(weight) if needs_grad else None
        N = len(x)
        rows = min(N, max(512, math.ceil(N / 16)))
        buffer = x.new_empty(rows, len(w))  # reused: new memory for each chunk's logits is slow on a CPU
        loss = 0.0
        for start in range(0, N, rows):
            chunk = x[start : start + rows]
            target = targets[start : start + rows, None]
            logits = torch.mm(chunk, w.T, out=buffer[: len(chunk)])  # (rows, V)
            logits = logits.to(torch.promote_types(dtype, torch.float32))  # exp and sum need fp32
            largest = logits.amax(-1, keepdim=True)
            wanted = logits.gather(-1, target)
            exps = logits.sub_(largest).exp_()
            sums = exps.sum(-1, keepdim=True)
            loss = loss + (sums.log() + largest - wanted).sum()
            if needs_grad:
                dlogits = exps.div_(sums)  # softmax(logits)
                dlogits.scatter_add_(-1, target, -torch.ones_like(wanted))  # - one_hot(target)
                dlogits = dlogits.to(dtype)
                dx[start : start + rows] = dlogits @ w
                if dtype == dweight.dtype:
                    dweight.addmm_(dlogits.T, chunk)
                else:
                    dweight += dlogits.T @ chunk
        ctx.save_for_backward(dx, dweight)
        return loss / N

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        scale = grad / len(dx)  # divided here, not in forward: fp16 would round the small ones to zero
        return (dx * scale).to(dx.dtype), dweight.mul_(scale), None, None


def head_loss(x, weight, targets, reduction):
    """Cross-entropy in nats of the logits x @ weight.T: x (B, T, C), weight (V, C), targets (B, T).

    reduction "mean": a scalar. "none": (B, T), without a gradient, and 0 where a target is negative.
    """
    x = x.flatten(0, 1)
    flat = targets.flatten()
    if reduction == "mean":
        return HeadLoss.apply(x, weight, flat, torch.is_grad_enabled())
    losses = torch.zeros(flat.shape, device=x.device)
    scored = (flat >= 0).nonzero().flatten()
    for rows in scored.split(2048):
        logits = F.linear(x[rows], weight).float()
        losses[rows] = F.cross_entropy(logits, flat[rows], reduction="none")
    return losses.view(targets.shape)


# ==========================================================================
# Set-up: the same in every script


def parse_command_line():
    """(Config, the options given as a dict, what else was asked for) of the command line.

    Later ones override earlier ones: Config's default, the paper's recipe, --tiny, an option.
    """
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--tiny", action="store_true", help="a small model on a small dataset made offline")
    parser.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint")
    parser.add_argument("--eval", action="store_true", help="score the run's last checkpoint")
    parser.add_argument("--sample", metavar="PROMPT", help="continue a text; --seed may be another one")
    given, asked = fineweb.parse_options(parser, Config, RECIPE, TINY_MODEL | TINY_RUN)
    values = {}
    if given.get("recipe", "paper") == "paper":
        values |= RECIPE
    if asked.tiny:
        values |= TINY_MODEL | TINY_RUN
    return Config(**(values | given)), given, asked


@dataclasses.dataclass
class Machine:
    """Where this process runs."""

    rank: int  # this process's number among all
    world: int  # how many processes there are
    device: torch.device
    name: str  # of the device
    dtype: torch.dtype  # of the matrix products
    why: str  # this dtype was chosen

    @property
    def autocast(self):
        """A context that runs matrix products in dtype, and in fp32 whatever needs it."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def start(config, world):
    """Finds the device, joins the other processes if there are any, and returns the Machine."""
    found = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    found["cpu"] = world
    kind = config.device
    if kind == "auto":
        kind = next(name for name in found if found[name])
    if found[kind] < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        fail(f"torch {torch.__version__} finds {found[kind]} {kind} device(s) here: "
             "start fewer processes or change --device")  # fmt: skip
    name = kind
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        name = torch.cuda.get_device_name(device)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves fp32
    dtype, why = choose_dtype(config, kind)
    if world > 1:
        # DDP must not cut the graph into buckets, since gradients are sent only once a step.
        # The line also imports _dynamo now: imported later, it would keep the group alive at exit.
        torch._dynamo.config.optimize_ddp = False
        fineweb.end_with_parent()  # torchrun
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank = int(os.environ.get("RANK", 0))
    return Machine(rank, world, device, name, dtype, why)


def choose_dtype(config, kind):
    """(torch dtype of the matrix products, why) on a kind of device."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype), "as asked for"
    if kind != "cuda":
        return torch.float32, f"the safe choice on {kind}"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU has it"
    return torch.float16, "the GPU has no bfloat16; with a loss scaler"


def over_ranks(values, machine, op=dist.ReduceOp.SUM):
    """A list of numbers, summed over all processes, or reduced by another op."""
    if machine.world == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64, device=machine.device)
    dist.all_reduce(values, op)
    return values.tolist()


def find_micro_batch(config, rows, machine):
    """The largest divisor of rows that fits into the device's memory, the same on every process."""
    if config.micro_batch:
        return config.micro_batch
    on_cpu = machine.device.type == "cpu"
    most = (4096 if on_cpu else 65_536) // config.block_size  # more would hardly be faster
    sizes = [n for n in range(rows, 0, -1) if rows % n == 0 and n <= max(1, most)]
    if on_cpu:  # the system kills a process that runs out of memory, so there is nothing to try
        return sizes[0]
    for n in sizes:
        error = try_micro_batch(config, n, machine)
        fits = over_ranks([float(error is None)], machine, dist.ReduceOp.MIN)[0]
        if fits:
            return n
    fail(f"not even one row of {config.block_size} tokens fits: "
         f"use a smaller --block_size or model. {error or ''}")  # fmt: skip


def try_micro_batch(config, n, machine):
    """Takes two training steps with n rows. Returns None, or the error message if memory ran out."""
    error = None
    try:
        model = Model(config).to(machine.device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=machine.device.type != "mps")
        idx = torch.zeros(n, config.block_size, dtype=torch.int64, device=machine.device)
        for _ in range(2):  # the second has gradients and AdamW's moments in memory, too
            with machine.autocast:
                _, loss = model(idx, idx)
            loss.backward()
            optimizer.step()
    except RuntimeError as caught:
        error = str(caught).splitlines()[0]
        words = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")  # torch's, cuBLAS's, cuDNN's
        if not any(word in error for word in words):
            raise
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(machine.device)  # the run shows its own peak
    return error


# ==========================================================================
# Checkpoints: the same in every script

CHECKPOINT_FORMAT = 3
SCRIPT = Path(__file__).name.split(".")[0]  # a changed script's copy in a run's folder is train_x.2.py


def checkpoint_paths(folder):
    """The run's checkpoints, oldest first."""
    paths = [path for path in folder.glob("step_*.pt") if path.stem[5:].isdigit()]
    return sorted(paths, key=lambda path: int(path.stem[5:]))


def save_checkpoint(folder, step, config, data, model, optimizer, scaler):
    """Writes folder/step_N.pt with all that --resume needs, whole or not at all; keeps the last two."""
    checkpoint = {
        "format": CHECKPOINT_FORMAT, "script": SCRIPT, "script_hash": fineweb.hash_at_start(__file__),
        "step": step,  # also the position in the data: a batch is a function of seed and step
        "config": dataclasses.asdict(config), "data": data,
        "model": model.state_dict(), "optimizer": optimizer.state_dict()["state"],
        "scaler": scaler.state_dict(), "rng": torch.get_rng_state(),
    }  # fmt: skip
    path = folder / f"step_{step:06d}.pt"
    advice = "continue with --resume" if step else "run the same command again"
    fineweb.write_atomic(path, lambda file: torch.save(checkpoint, file), advice)
    for old in checkpoint_paths(folder)[:-2]:
        old.unlink()
    say(f"step {step:05d} | saved {path}")


def load_checkpoint(folder):
    """The newest checkpoint that can be read, or None. A damaged one is skipped with a line."""
    for path in reversed(checkpoint_paths(folder)):
        try:
            return fineweb.load_whole(path, __file__, lambda config: Model(Config(**config)))
        except ValueError as reason:
            say(f"{path} is damaged ({reason}): using the one before it")
    return None


def open_run(folder, asked):
    """The checkpoint to continue from, or None for a new run. Who trains takes the folder's lock.

    Raises SystemExit if one is needed and there is none, or if a new run would overwrite an old one.
    """
    reads = asked.eval or asked.sample is not None
    if folder.exists() and not reads:
        fineweb.lock_run(folder)
    paths = checkpoint_paths(folder)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, after a crash
    if paths and (asked.resume or restarted or reads):
        checkpoint = load_checkpoint(folder)
        if checkpoint is None:
            fail(f"{folder} holds no checkpoint that can be read: choose another --run_name")
        return checkpoint
    if reads or (asked.resume and not folder.exists()):
        fail(f"{folder} holds no checkpoint: train it first, or name another run with --run_name")
    if asked.resume:  # a start saves a checkpoint before it opens the log
        say(f"{folder} holds no checkpoint yet: starting at step 0")
    refuse_old_run(folder)
    return None


def open_weights(path):
    """The checkpoint of another run that --init_from names. Raises SystemExit if there is none."""
    try:
        return fineweb.load_whole(path, __file__, lambda config: Model(Config(**config)))
    except ValueError as reason:
        fail(f"--init_from {path} is not a whole checkpoint: {reason}")


def initial_config(config, initial, given):
    """The Config of a run that starts from the checkpoint initial: its model, but for what is given."""
    names = [field.name for field in dataclasses.fields(Config)]
    of_model = names[: names.index("block_size") + 1]  # the architecture's fields come first
    old = initial["config"]
    taken = {name: old[name] for name in of_model if name in old and name not in given}
    return dataclasses.replace(config, **taken)


def refuse_old_run(folder):
    """Raises SystemExit if a new run would overwrite what is in the folder."""
    if checkpoint_paths(folder):
        fail(f"{folder} already holds a run: continue it with --resume, or choose another --run_name")
    if (folder / "log.jsonl").exists():
        fail(f"{folder} holds the log of a run without checkpoints: choose another --run_name")


def resumed_config(checkpoint, given, folder, asked):
    """The checkpoint's Config with the options given now. Raises SystemExit for one that can't change."""
    old = checkpoint["config"]
    if checkpoint["script"] != SCRIPT:
        fail(f"the checkpoint was made by {checkpoint['script']}.py: use that script")
    trained_by = fineweb.find_copy(folder, SCRIPT, checkpoint.get("script_hash"))
    its_copy = f"PYTHONPATH=. python {trained_by}"
    names = {field.name for field in dataclasses.fields(Config)}
    if checkpoint["format"] != CHECKPOINT_FORMAT or old.keys() != names:
        fail(f"the checkpoint is of another version of this script: run its copy, {its_copy}")
    if checkpoint["script_hash"] != fineweb.hash_at_start(__file__):
        say(f"note: {SCRIPT}.py has changed since this checkpoint; its copy runs by {its_copy}")
    for name, value in given.items():
        can_change = name in MAY_CHANGE or (name == "seed" and asked.sample is not None)
        if value != old[name] and not can_change:
            fail(f"--{name} {value}: the checkpoint has {old[name]}; leave it out, or start another run")
    config = Config(**(old | given))
    if config.max_steps != old["max_steps"]:
        say(f"--max_steps {config.max_steps}, no longer {old['max_steps']}: this changes the learning rate")
    return config


def make_model(config, checkpoint, machine):
    """The Model with its initial weights or the checkpoint's. Raises SystemExit if these don't fit."""
    torch.manual_seed(config.seed)
    model = Model(config)  # on the CPU: the same weights on every device
    if checkpoint:
        try:
            model.load_state_dict(checkpoint["model"])
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            fail(f"the checkpoint's weights don't fit this script's Model ({reason[:80]}): leave out "
                 "options for its shape, or run the copy of the script in the run's folder")  # fmt: skip
    return model.to(machine.device)


# ==========================================================================
# Training: the same in every script


def get_lr(config, step):
    """Linear warm-up to max_lr, then a cosine down to min_lr (Brown et al., 2020, appendix B)."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))  # from 1 to 0
    return config.min_lr + (config.max_lr - config.min_lr) * cosine


@torch.no_grad()
def validate(model, windows, micro_batch, machine):
    """Mean next-token loss over the windows in nats, the same on every process."""
    mine = range(machine.rank, len(windows), machine.world)
    starts = range(0, len(mine), micro_batch)
    total = 0.0
    for start in fineweb.with_estimate(starts, "validation", "--val_tokens makes it shorter"):
        rows = windows.rows(mine[start : start + micro_batch])
        rows = torch.from_numpy(rows).to(machine.device)
        with machine.autocast:
            _, loss = model(rows[:, :-1], rows[:, 1:])
        total += loss.item() * len(rows)
    return over_ranks([total], machine)[0] / len(windows)


@torch.no_grad()
def generate(model, tokenizer, prompt, config, machine):
    """config.samples texts that continue the prompt, each as far as <|endoftext|> or sample_tokens."""
    tokens = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
    idx = torch.tensor([tokens] * config.samples, device=machine.device)
    generator = torch.Generator(machine.device).manual_seed(config.seed)
    k = min(config.top_k or tokenizer.n_vocab, tokenizer.n_vocab)
    if config.temperature == 0:
        k = 1
    state = None
    for _ in range(config.sample_tokens):
        with machine.autocast:
            logits, state = model.decode(idx, state)
        logits = logits[:, : tokenizer.n_vocab].float()  # ids beyond n_vocab are padding
        top = logits.topk(k)
        below = top.values - top.values[:, :1]
        probabilities = (below / (config.temperature or 1.0)).softmax(-1)
        choice = torch.multinomial(probabilities, 1, generator=generator)
        idx = torch.cat((idx, top.indices.gather(-1, choice)), dim=1)
    texts = []
    for row in idx.tolist():
        added = row[len(tokens) :] + [tokenizer.eot_token]
        added = added[: added.index(tokenizer.eot_token)]
        texts.append(prompt + tokenizer.decode(added))
    return texts


def step_line(step, loss, lr, norm, seconds, eta, flops_per_token, config, machine):
    """A training step in words, 80 columns at most, for the screen."""
    rate = config.batch_tokens / seconds
    line = f"{step:5d}/{config.max_steps}  loss {loss:.3f}  lr {lr:.1e}  norm {norm:.2f}"
    line += f"  {fineweb.short(rate)} tok/s"
    peak = PEAK_FLOPS.get(machine.name)
    if peak and machine.dtype != torch.float32:
        flops = 3 * flops_per_token * rate  # a backward pass is two forward passes' work
        line += f"  MFU {flops / (peak * machine.world):.0%}"
    return line + f"  eta {fineweb.duration(eta)}"


def main():
    # ---- what to do
    config, given, asked = parse_command_line()
    script = Path(__file__)
    default_name = SCRIPT.removeprefix("train_") + ("-tiny" if asked.tiny else "")
    folder = fineweb.run_folder(config.run_name or default_name)
    checkpoint = open_run(folder, asked)
    initial = None  # another run's checkpoint, whose weights this one starts from
    if checkpoint:
        config = resumed_config(checkpoint, given, folder, asked)
    elif config.init_from:
        initial = open_weights(config.init_from)
        config = initial_config(config, initial, given)
    world = int(os.environ.get("WORLD_SIZE", 1))  # torchrun says how many processes it started
    fineweb.check_run(config, world)
    first_step = checkpoint["step"] if checkpoint else 0
    last_step = first_step if asked.eval else config.max_steps
    if asked.resume and checkpoint and first_step >= last_step:
        fail(f"{folder} is finished at step {first_step}: "
             "score it with --eval, or train on with a larger --max_steps")  # fmt: skip
    machine = start(config, world)
    device = machine.device
    if asked.sample is not None:
        model = make_model(config, checkpoint, machine).eval()
        tokenizer = fineweb.get_tokenizer(checkpoint["data"]["tokenizer"])
        for text in generate(model, tokenizer, asked.sample, config, machine):
            say(text)
        return

    # ---- the data
    if asked.tiny and config.data_dir == TINY_RUN["data_dir"] and machine.rank == 0:
        fineweb.write_sample(config.data_dir)
    over_ranks([0], machine)  # the others wait for it
    batch_rows = config.batch_tokens // config.block_size
    trained_on = checkpoint["data"] if checkpoint else None
    data = fineweb.open_dataset(config.data_dir, config.vocab_size, config.train_shards, trained_on)
    if initial and initial["data"]["tokenizer"] != data["tokenizer"]:
        fail(f"--init_from {config.init_from} was trained on tokens of {initial['data']['tokenizer']}, "
             f"but {config.data_dir} has those of {data['tokenizer']}")  # fmt: skip
    train = fineweb.Windows(config.data_dir, "train", config.block_size, config.train_shards)
    val = fineweb.Windows(config.data_dir, "val", config.block_size, max_tokens=config.val_tokens)
    loader = fineweb.Loader(train, batch_rows, config.seed, machine.rank, world, device,
                            config.vocab_size, config.max_steps)  # fmt: skip
    tokenizer = fineweb.try_tokenizer(data["tokenizer"]) if machine.rank == 0 else None
    scorer = hellaswag.open_scorer(config.hellaswag, config.data_dir, tokenizer, config.block_size,
                                   device, machine.rank, world)  # fmt: skip

    # ---- the model
    fineweb.check_size(lambda: Model(config), device)
    model = make_model(config, checkpoint or initial, machine)
    fineweb.warn_if_slow(config, model.flops_per_token(), world, device)

    # ---- the batch: every process takes an equal share of its rows, in micro-batches
    micro_batch = find_micro_batch(config, batch_rows // world, machine)
    micro_steps = batch_rows // world // micro_batch

    # ---- the optimizer
    groups = model.optimizer_groups()
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=config.adam_eps, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=machine.dtype == torch.float16)
    if checkpoint:
        settings = optimizer.state_dict()  # as given now; the checkpoint adds AdamW's moments
        optimizer.load_state_dict(settings | {"state": checkpoint["optimizer"]})
        if checkpoint["scaler"]:  # it is empty where no scaler was used
            scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["rng"])
    is_new = checkpoint is None
    checkpoint = initial = None  # gives their memory back

    # ---- three names for the same weights: model for checkpoints, samples and HellaSwag, whose many
    # shapes would each be compiled anew; compiled for speed; net to train, on all processes
    compiled = model
    on_linux_gpu = device.type == "cuda" and os.name == "posix"
    if config.compile == "on" or (config.compile == "auto" and on_linux_gpu):
        compiled = torch.compile(model, dynamic=False)
    net = compiled
    if world > 1:
        net = nn.parallel.DistributedDataParallel(compiled, gradient_as_bucket_view=True)
        net.broadcast_buffers = False  # as an argument it is deprecated since torch 2.13

    # ---- the run's folder and log
    facts = {
        "script": SCRIPT, "script_hash": fineweb.hash_at_start(__file__),
        "git": fineweb.git_version(script.parent), "torch": torch.__version__, "device": machine.name,
        "processes": world, "dtype": f"{machine.dtype} ({machine.why})",
        "micro_batch": micro_batch, "micro_steps": micro_steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "active_parameters": model.active_parameters(), "flops_per_token": model.flops_per_token(),
        "data": data, "config": dataclasses.asdict(config),
    }  # fmt: skip
    if machine.rank == 0 and not asked.eval:
        fineweb.lock_run(folder)
        fineweb.keep_copy(script, folder)
        if is_new:
            refuse_old_run(folder)  # another process may have begun and ended meanwhile
            save_checkpoint(folder, 0, config, data, model, optimizer, scaler)
    log_path = folder / "log.jsonl" if machine.rank == 0 else None
    log_file = fineweb.open_log(log_path, math.inf if asked.eval else first_step)

    def log(event, **fields):
        with fineweb.one_line(f"{log_path} can't be written: make room, then continue with --resume"):
            log_file.write(json.dumps({"event": event, **fields}) + "\n")

    def evaluate(step):
        """Logs and prints the validation loss and the accuracy on HellaSwag or the cloze."""
        model.eval()
        loss = validate(compiled, val, micro_batch, machine)
        log("val", step=step, loss=loss)
        memory = ""
        if device.type == "cuda":
            memory = f" | peak memory {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
        say(f"step {step:05d} | validation loss {loss:.4f}{memory}")
        if scorer is None:
            return
        conventions = scorer.batches if step == last_step else ["nanogpt"]
        for convention in conventions:
            with machine.autocast:
                result = scorer.score(lambda x, y: model(x, y, "none")[1], convention, step, folder)
            log("score", step=step, **result)
            say(f"step {step:05d} | {hellaswag.one_line(result)}")

    def sample(step):
        """Logs and prints texts that continue the prompt."""
        for text in generate(model, tokenizer, config.prompt, config, machine):
            log("sample", step=step, text=text)
            say(f"step {step:05d} > {text!r}")

    log("run", first_step=first_step, time=time.time(), **facts)
    fineweb.show(facts)
    signals = fineweb.catch_signals()
    stopping = False
    for step in range(first_step, last_step + 1):
        # ---- once in a while, and at the end: evaluate, sample, save
        is_last = step == last_step
        is_due = (step % config.eval_every == 0 or is_last) and not stopping
        if is_due:
            evaluate(step)
        if is_due and tokenizer:
            sample(step)
        if (is_due or stopping) and step > first_step and machine.rank == 0:  # with all of it logged
            save_checkpoint(folder, step, config, data, model, optimizer, scaler)
        if is_last or stopping:
            finished = step >= config.max_steps
            command = f"--sample {json.dumps(config.prompt)}" if finished else "--resume"
            say(f"{folder} is at step {step} of {config.max_steps}.")
            say(f"Next: python {SCRIPT}.py --run_name {folder.name} {command}")
            break

        # ---- one optimizer step
        model.train()
        began = time.perf_counter()
        loss = torch.zeros((), device=device)
        batch = loader.batch(step)  # (rows of this process, T + 1)
        for micro_step, rows in enumerate(batch.split(micro_batch)):
            if world > 1:
                # gradients add up in .grad, so averaging them over the processes can wait for the last
                net.require_backward_grad_sync = micro_step == micro_steps - 1
            with machine.autocast:
                _, micro_loss = net(rows[:, :-1], rows[:, 1:])
            # .grad adds up the gradients of the micro-batches, but the loss is a mean over them
            micro_loss = micro_loss / micro_steps
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        scaler.unscale_(optimizer)  # from fp16's scaled gradients to the real ones, for clipping
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        lr = get_lr(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        scaler.step(optimizer)  # which skips the step if a gradient of fp16 is infinite
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        norm = norm.item()
        skipped = scaler.is_enabled() and not math.isfinite(norm)
        figures = model.after_step(skipped)
        loss, stopping = over_ranks([loss.item() / world, len(signals)], machine)
        seconds = time.perf_counter() - began

        # ---- the log and the screen
        # fp16 may skip a step now and then, but not with a scale below 1: the gradient itself is infinite
        lost = not math.isfinite(norm) and (not skipped or scaler.get_scale() < 1)
        if lost or not math.isfinite(loss):
            fail(f"stopped at step {step}: loss {loss}, gradient norm {norm}; "
                 f"the last good checkpoint, if any, is in {folder}")  # fmt: skip
        figures |= {"lr": lr, "norm": None if skipped else norm, "ms": 1000 * seconds}
        log("train", step=step, loss=loss, **figures)
        if step <= first_step + 1:  # the first step compiles
            pace = seconds
        pace = 0.9 * pace + 0.1 * seconds
        if step % config.log_every == 0:
            eta = pace * (config.max_steps - step - 1)
            say(step_line(step, loss, lr, norm, seconds, eta, facts["flops_per_token"], config, machine))


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()  # not in main(), where DDP still holds the group and its threads
