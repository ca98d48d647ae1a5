"""
Mistral (Jiang et al., 2023, "Mistral 7B", https://arxiv.org/abs/2310.06825) at 124M parameters.

Against GPT-2: attention to the last 512 tokens only, rotary positions (base 10,000) in the place of learned ones,
RMSNorm, 3 heads of keys and values for 12 of queries, a SwiGLU MLP, and no biases. The 7B's head is not tied to
its embedding; this one is, as all heads here. 123,587,328 parameters with the vocabulary padded to 50,304.

    python train_mistral.py --tiny                              # two minutes on a laptop, no GPU, no network
    python train_mistral.py                                     # one GPU; the micro-batch is the largest that fits
    torchrun --standalone --nproc_per_node=8 train_mistral.py   # one node of eight: the same run, faster
    python train_mistral.py --resume                            # go on from the newest checkpoint
    python train_mistral.py --eval                              # score it; --sample "A prompt" continues a text
"""
import argparse
import dataclasses
import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import fineweb
import hellaswag
from fineweb import fail, option, say

# ==========================================================================================================
# Config


@dataclasses.dataclass
class Config:
    # ---- this architecture's fields
    n_layer: int = option(12, "blocks")
    n_head: int = option(12, "attention heads, of n_embd / n_head = 64 channels")
    n_kv_head: int = option(3, "heads of keys and values, each for n_head / n_kv_head = 4 of queries, as in the 8B")
    n_embd: int = option(768, "channels of the residual stream")
    n_inner: int = option(2432, "channels inside the MLP, for as many weights in all matrices as in GPT-2's")
    window: int = option(512, "tokens that one attends to, itself included: half the context, as in the 7B")
    rope_theta: float = option(10_000.0, "the slowest rotation takes almost 2 pi rope_theta tokens")
    # ---- the run: the same in every script (fields up to seed can't change on --resume)
    vocab_size: int = option(50_304, "rows of the embedding: GPT-2's 50,257 tokens, padded to a multiple of 128")
    block_size: int = option(1024, "tokens of context")
    batch_tokens: int = option(2**19, "tokens an optimizer step on all GPUs together: 524,288")
    seed: int = option(1337, "of the initial weights, the order of the data and the samples", zero=True)
    max_steps: int = option(19_073, "optimizer steps: 10B tokens / 2**19, one epoch")
    warmup_steps: int = option(715, "steps of linear warm-up: 375M tokens, as GPT-3", zero=True)
    max_lr: float = option(6e-4, "learning rate after the warm-up, as GPT-3's of this size")
    min_lr: float = option(6e-5, "learning rate at the end of the cosine, a tenth", zero=True)
    weight_decay: float = option(0.1, "AdamW's, for the parameters that the model lets decay", zero=True)
    beta1: float = option(0.9, "AdamW's", zero=True)
    beta2: float = option(0.95, "AdamW's: a shorter memory than 0.999, for batches of this size", zero=True)
    adam_eps: float = option(1e-8, "AdamW's")
    grad_clip: float = option(1.0, "largest norm of the whole gradient")
    data_dir: str = option("data/fineweb10B", "folder of token shards, made by fineweb.py")
    train_shards: int = option(100, "training shards to use, the first ones: 10B tokens, the same for everybody")
    val_tokens: int = option(10_485_760, "first tokens of the validation shard, as in llm.c and modded-nanogpt")
    hellaswag: str = option(hellaswag.DEFAULT_FILE, "HellaSwag's validation set, downloaded if it is not there")
    recipe: str = option("paper", "optimizer settings: the paper's, if it has its own, or shared", ("paper", "shared"))
    run_name: str = option("", "the run's folder is log/NAME (default: the architecture's name)")
    eval_every: int = option(250, "steps between evaluations, checkpoints and samples")
    log_every: int = option(1, "steps between lines on the screen; log.jsonl has them all")
    prompt: str = option("Hello, I'm a language model,", "what samples continue")
    sample_tokens: int = option(32, "tokens that a sample adds", zero=True)
    micro_batch: int = option(0, "rows of block_size tokens at a time on a device; 0: the most that fit", zero=True)
    device: str = option("auto", "where to run", ("auto", "cuda", "mps", "cpu"))
    dtype: str = option("auto", "number format; float16 has a loss scaler", ("auto", "bfloat16", "float16", "float32"))
    compile: str = option("auto", "torch.compile; auto: on CUDA, except under Windows", ("auto", "on", "off"))


# --tiny: other defaults for the run, so that a small model learns English spelling in two minutes on a laptop
TINY_RUN = dict(data_dir="data/sample", vocab_size=257, block_size=128, batch_tokens=2048, max_steps=1000,
                warmup_steps=50, max_lr=2e-3, min_lr=2e-4, val_tokens=65_536, eval_every=250, log_every=25,
                prompt="Returns the ", sample_tokens=96)  # fmt: skip
# dense 16-bit FLOP/s by the makers' data sheets: of known GPUs the model-FLOPs utilisation is printed
PEAK_FLOPS = {"H200": 989e12, "H100 80GB": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "V100": 125e12, "T4": 65e12}

# ---- this architecture's --tiny, and its recipe where its paper prescribes another than the common one
TINY_MODEL = dict(n_layer=4, n_head=4, n_kv_head=1, n_embd=128, n_inner=416, window=64)
RECIPE = {}  # the paper gives none

# ==========================================================================================================
# Model: this architecture's. B batch, T tokens, C channels, H heads, K heads of keys and values, D channels of a head.


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich, 2019, eq. 4): (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_embd))

    def forward(self, x):
        y = x.to(torch.promote_types(x.dtype, torch.float32))  # squares need the range of fp32
        return F.rms_norm(y, self.weight.shape, eps=1e-5).to(x.dtype) * self.weight


def recompute(function, *inputs):
    """function(*inputs), but backward computes again what it needs from inside, so that forward needn't keep it.

    For elementwise work, and one matrix product after it, which isn't done again: a block keeps half as much for
    a hundredth of the time. torch.compile decides by itself what to keep.
    """
    from torch.utils.checkpoint import checkpoint

    if torch.compiler.is_compiling():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def rope_table(theta, block_size, size):
    """Cosines and sines of the angles t theta^(-2i / D) (Su et al., 2021, section 3.2.2): (2, T, D / 2), D = size."""
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2) / size)
    angles = torch.arange(block_size)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()))  # (2, T, D / 2)


def rotate(x, rope):
    """x, (B, H, T, D), with each pair of its channels turned by rope's angles (Su et al., 2021, eq. 34).

    Channel i is paired with i + D / 2, as transformers does, so that weights are exported as they are. Meta's code
    pairs 2i with 2i + 1: the same model, with the rows of the query and key matrices in another order.
    """
    cos, sin = rope.unbind()
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)  # rope is fp32 also under autocast


QUERIES = 256  # that attend takes at a time: with fewer, fewer keys are out of their windows, but calls are more


def can_flex(x):
    """Whether to use flex_attention, which needs torch.compile, and has no backward on a CPU."""
    return x.is_cuda and torch.compiler.is_compiling()


def block_mask(T, window, device):
    """The window as flex_attention wants it: the blocks of keys that it skips, and the rule within the others."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < window), None, None, T, T, device=device)


def attend(q, k, v, window, mask):
    """Attention to the last window tokens, the own one included (Jiang et al., 2023, section 2).

    q (B, H, T, D), k and v (B, K, T, D), mask: (T, T) bools or a block_mask -> (B, T, H, D).
    """
    if not isinstance(mask, torch.Tensor):
        from torch.nn.attention.flex_attention import flex_attention

        # v is a view into qkv: torch 2.13, when it compiles this for a CPU, forgets where in it
        return flex_attention(q, k, v.contiguous(), block_mask=mask, enable_gqa=True).transpose(1, 2)
    # of CUDA's fused kernels those that take a mask want as many heads of keys as of queries
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # (B, H, T, D)
    pieces = []
    for start in range(0, q.shape[2], QUERIES):
        first = max(0, start - window + 1) // 8 * 8  # the kernels want keys in eights; the mask is exact
        queries, keys = slice(start, start + QUERIES), slice(first, start + QUERIES)
        y = F.scaled_dot_product_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], mask[queries, keys])
        pieces.append(y.transpose(1, 2))
    return torch.cat(pieces, dim=1)


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al., 2023, section 2.2) in a window: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.window = config.window
        self.heads = config.n_head, config.n_kv_head, config.n_kv_head
        self.size = config.n_embd // config.n_head
        self.qkv = nn.Linear(config.n_embd, sum(self.heads) * self.size, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, norm, rope, mask):
        B, T, _ = x.shape
        x = recompute(lambda x: self.qkv(norm(x)), x)  # (B, T, (H + 2 K) D)
        q, k, v = x.view(B, T, -1, self.size).transpose(1, 2).split(self.heads, dim=1)  # (B, H or K, T, D)
        y = attend(rotate(q, rope), rotate(k, rope), v, self.window, mask)  # (B, T, H, D)
        return self.proj(y.flatten(2))  # (B, T, C)


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020, eq. 6): (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate(x), self.up(x)
        return recompute(lambda gate, up: self.proj(F.silu(gate) * up), gate, up)


class Block(nn.Module):
    """Pre-norm residual block (Touvron et al., 2023, section 2.2): (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = Norm(config)
        self.attention = Attention(config)
        self.norm2 = Norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask):
        x = x + self.attention(x, self.norm1, rope, mask)
        return x + self.mlp(recompute(self.norm2, x))


class Model(nn.Module):
    """The language model. What the loop asks of it: forward, decode, after_step, flops_per_token, optimizer_groups."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % (2 * config.n_head):
            fail(f"--n_embd {config.n_embd} is not a multiple of 2 x --n_head {config.n_head}: RoPE turns pairs")
        if config.n_head % config.n_kv_head:
            fail(f"--n_head {config.n_head} is not a multiple of --n_kv_head {config.n_kv_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.norm = Norm(config)
        rope = rope_table(config.rope_theta, config.block_size, config.n_embd // config.n_head)
        self.register_buffer("rope", rope, persistent=False)
        ones = torch.ones(config.block_size, config.block_size, dtype=torch.bool)
        self.register_buffer("mask", ones.tril() & ones.triu(1 - config.window), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's, as the paper gives none: N(0, 0.02), less by sqrt(2 n_layer) where a block adds to the residual."""
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith("proj.weight"):
                parameter.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer))
            elif name.endswith(("wte.weight", "qkv.weight", "gate.weight", "up.weight")):
                parameter.normal_(0.0, 0.02)
            else:
                raise NotImplementedError(f"no initialisation for {name}")

    def forward(self, idx, targets=None, reduction="mean"):
        """Next-token logits or losses of idx, (B, T) token ids.

        Without targets: ((B, T, V) logits, None). With (B, T) targets: (None, loss), the cross-entropy in nats,
        its mean, or with reduction="none" each token's, (B, T), and 0 where the target is negative. The mean's
        gradient may hold auxiliary terms; its value never does.
        """
        T = idx.shape[1]
        x = self.wte(idx)  # (B, T, C)
        mask = block_mask(T, self.config.window, x.device) if can_flex(x) else self.mask[:T, :T]
        for block in self.blocks:
            x = block(x, self.rope[:, :T], mask)
        x = self.norm(x)
        if targets is None:
            return F.linear(x, self.wte.weight), None  # (B, T, V)
        return None, head_loss(x, self.wte.weight, targets, reduction)

    def decode(self, idx, state=None):
        """((B, V) logits of the token after idx, state for the next call): state is what a model keeps of the past."""
        logits, _ = self(idx[:, -self.config.block_size :])
        return logits[:, -1], None

    def after_step(self):
        """Called once after each optimizer step, on every rank; returns figures to log, {name: number}."""
        return {}

    def flops_per_token(self):
        """Floating-point operations of a forward pass per token, at full context: matrix products and attention."""
        config = self.config
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear)) + self.wte.weight.numel()
        window = min(config.window, config.block_size)
        keys = window * (1 - window / (2 * config.block_size))  # the mean over queries: the first ones have fewer
        attention = config.n_layer * 2 * config.n_embd * keys
        return 2 * matrices + 2 * attention

    # ------------------------------------------------------------------------------------------------------
    # Optimizer groups

    def optimizer_groups(self):
        """[{params, weight_decay, lr_scale}]: matrices and the embedding decay, norms don't."""
        parameters = list(self.parameters())
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.config.weight_decay, "lr_scale": 1.0},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "lr_scale": 1.0},
        ]


# ==========================================================================================================
# Loss: the same in every script


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of logits x @ weight.T, of which only a sixteenth, or 512 rows, exist at a time.

    x (N, C), weight (V, C), targets (N,) -> scalar. The gradient of the logits, softmax minus one-hot, is
    formed and used up while a chunk's logits are there, so that backward only scales what forward left.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, with_grad):
        device, n = x.device.type, len(x)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x, w, size, total = x.to(dtype), weight.to(dtype), min(n, max(512, -(-n // 16))), 0.0
        dx, dw = (torch.empty_like(x), torch.zeros_like(weight)) if with_grad else (None, None)
        room = x.new_empty(size, len(w))  # for all chunks: a CPU pays for the first touch of new memory
        for at in range(0, n, size):
            chunk, target = x[at : at + size], targets[at : at + size, None]
            logits = torch.mm(chunk, w.T, out=room[: len(chunk)]).to(torch.promote_types(dtype, torch.float32))
            top, wanted = logits.amax(-1, keepdim=True), logits.gather(-1, target)
            sums = logits.sub_(top).exp_().sum(-1, keepdim=True)  # in place: logsumexp would copy the logits
            losses = sums.log() + top - wanted
            total = total + losses.sum()
            if with_grad:  # softmax, and at the target softmax - 1 = expm1(-loss)
                dlogits = logits.div_(sums).to(dtype).scatter_(-1, target, torch.expm1(-losses).to(dtype))
                dx[at : at + size] = dlogits @ w
                if dtype == dw.dtype:
                    dw.addmm_(dlogits.T, chunk)
                else:
                    dw += dlogits.T @ chunk
        ctx.save_for_backward(dx, dw)
        return total / n

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        scale = grad / len(dx)  # here, not in forward: fp16 would lose the small ones
        return (dx * scale).to(dx.dtype), dw.mul_(scale), None, None


def head_loss(x, weight, targets, reduction):
    """Cross-entropy in nats of logits x @ weight.T; x (B, T, C), weight (V, C), targets (B, T).

    "mean": a scalar. "none": (B, T), without gradient, computed only where the target is not negative, else 0.
    """
    x, flat = x.flatten(0, 1), targets.flatten()
    if reduction == "mean":
        return HeadLoss.apply(x, weight, flat, torch.is_grad_enabled())
    losses = torch.zeros(flat.shape, device=x.device)
    for rows in (flat >= 0).nonzero().flatten().split(2048):
        losses[rows] = F.cross_entropy(F.linear(x[rows], weight).float(), flat[rows], reduction="none")
    return losses.view(targets.shape)


# ==========================================================================================================
# Set-up: the same in every script


def check_config(config, world):
    """Raises SystemExit with a line that says which values can't be, or can't go together."""
    for field in dataclasses.fields(config):
        name, value, zero = field.name, getattr(config, field.name), field.metadata["zero"]
        if not isinstance(value, str) and not (0 < value < math.inf or zero and value == 0):
            fail(f"--{name} {value}: must be {'at least' if zero else 'more than'} 0")
    if config.batch_tokens % (world * max(1, config.micro_batch) * config.block_size):
        fail(f"--batch_tokens {config.batch_tokens} can't be split into {world} process(es) x micro-batches of "
             f"{max(1, config.micro_batch)} row(s) x --block_size {config.block_size}: choose numbers that divide it")


def start(config, world):
    """Joins the other processes, if any; returns (device, its name, dtype, why that dtype)."""
    devices = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": world}
    kind = next(k for k in devices if devices[k]) if config.device == "auto" else config.device
    if devices[kind] < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        fail(f"torch {torch.__version__} finds {devices[kind]} {kind} device(s) here: start fewer processes or change --device")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves fp32
    if config.dtype != "auto":
        dtype, why = config.dtype, "as asked for"
    elif kind != "cuda":
        dtype, why = "float32", f"the safe choice on {kind}"
    elif torch.cuda.is_bf16_supported(including_emulation=False):
        dtype, why = "bfloat16", "the GPU has it"
    else:
        dtype, why = "float16", "the GPU has no bfloat16; with a loss scaler"
    if world > 1:  # first the import of _dynamo: what it imports would hold the group, and its threads, to the very end
        torch._dynamo.config.optimize_ddp = False  # True cuts the graph into buckets; gradients are sent once a step only
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return device, torch.cuda.get_device_name(device) if kind == "cuda" else kind, getattr(torch, dtype), why


def over_ranks(values, device, op=dist.ReduceOp.SUM):
    """A list of numbers summed over the processes, or reduced by another op."""
    if not dist.is_initialized():
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values, op)
    return values.tolist()


def find_micro_batch(config, rows, device, autocast):
    """The largest divisor of rows that trains within the memory, the same on every process."""
    most = 4096 if device.type == "cpu" else 65_536  # tokens; no device gets faster from more
    for n in [n for n in range(rows, 0, -1) if rows % n == 0 and (n == 1 or n * config.block_size <= most)]:
        if config.micro_batch or device.type == "cpu":  # a CPU out of memory can't be caught
            return config.micro_batch or n
        try:
            trial, error = Model(config).to(device), None
            optimizer = torch.optim.AdamW(trial.parameters(), fused=device.type != "mps")
            for _ in range(2):  # the second time beside gradients and AdamW's moments, as in the run
                with autocast:
                    _, loss = trial(*torch.zeros(2, n, config.block_size, dtype=torch.int64, device=device))
                loss.backward()
                optimizer.step()
        except RuntimeError as caught:  # out of memory has many names: the last is shown if nothing fits
            error = str(caught).splitlines()[0]
        trial = loss = optimizer = None  # before the next trial
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if over_ranks([float(error is None)], device, dist.ReduceOp.MIN)[0]:
            return n
    fail(f"not even one row of {config.block_size} tokens fits: use a smaller --block_size or model. {error or ''}")


def load_checkpoint(folder):
    """The newest checkpoint that can be read, or None; says which can't."""
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a broken file raises anything
            say(f"{path} is damaged ({type(error).__name__}): using the one before it")


def resumed_config(checkpoint, given):
    """The checkpoint's Config with the options given now. Raises SystemExit for one that can't change any more."""
    old, names = checkpoint["config"], [field.name for field in dataclasses.fields(Config)]
    if checkpoint["script"] != Path(__file__).stem or sorted(old) != sorted(names):
        fail(f"the checkpoint is of {checkpoint['script']}.py, or of another version of it: use that one")
    for name in names[: names.index("seed") + 1]:
        if given.get(name, old[name]) != old[name]:
            fail(f"--{name} {given[name]}: the checkpoint has {old[name]}; leave it out, or start another run")
    return Config(**{**old, **given})


# ==========================================================================================================
# Training: the same in every script


def get_lr(config, step):
    """Linear warm-up to max_lr, then a cosine to min_lr at max_steps (Brown et al., 2020, appendix B)."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps))
    return config.min_lr + 0.5 * (config.max_lr - config.min_lr) * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def validate(model, windows, micro_batch, rank, world, device, autocast):
    """Mean next-token loss over the windows, in nats, the same on every process."""
    mine, total = range(rank, len(windows), world), 0.0
    for at in range(0, len(mine), micro_batch):
        rows = torch.from_numpy(windows.rows(mine[at : at + micro_batch])).to(device)
        with autocast:
            total += model(rows[:, :-1], rows[:, 1:])[1].item() * len(rows)
    return over_ranks([total], device)[0] / len(windows)


@torch.no_grad()
def generate(model, tokenizer, prompt, n_samples, config, device, autocast):
    """n_samples texts that continue the prompt by sample_tokens tokens, each drawn from the 50 likeliest."""
    idx = torch.tensor([tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]] * n_samples, device=device)
    generator, state = torch.Generator(device).manual_seed(config.seed), None
    for _ in range(config.sample_tokens):
        with autocast:
            logits, state = model.decode(idx, state)
        top = logits[:, : tokenizer.n_vocab].float().topk(50)  # the ids beyond n_vocab are padding
        choice = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
        idx = torch.cat((idx, top.indices.gather(-1, choice)), dim=1)
    return [tokenizer.decode(row) for row in idx.tolist()]


def main():
    # ---- what to do, and with what
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small model, small offline data: other defaults for all")
    parser.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")
    parser.add_argument("--eval", action="store_true", help="score the run's newest checkpoint")
    parser.add_argument("--sample", metavar="PROMPT", help="continue a text with the run's newest checkpoint")
    given, todo = fineweb.parse_options(parser, Config)
    recipe = RECIPE if given.get("recipe", "paper") == "paper" else {}
    config = Config(**{**recipe, **(TINY_MODEL | TINY_RUN if todo.tiny else {}), **given})
    script = Path(__file__).stem
    folder = Path("log") / (config.run_name or script.removeprefix("train_") + ("-tiny" if todo.tiny else ""))
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # torchrun starts a crashed run anew
    wanted = todo.resume or todo.eval or todo.sample is not None
    checkpoint = load_checkpoint(folder) if wanted or restarted else None
    if checkpoint:
        config = resumed_config(checkpoint, given)
    elif wanted:
        fail(f"{folder} holds no checkpoint: train it first, or name another run by --run_name")
    elif folder.exists() and not restarted:
        fail(f"{folder} already holds a run: go on with it by --resume, or choose another by --run_name")
    check_config(config, world)
    first_step = checkpoint["step"] if checkpoint else 0
    last_step = first_step if todo.eval else config.max_steps
    if todo.resume and first_step >= last_step:
        fail(f"{folder} is finished at step {first_step}: score it by --eval, or train on with a larger --max_steps")
    device, device_name, dtype, why = start(config, world)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    # ---- the model, made on the CPU: the same weights on every device and process
    torch.manual_seed(config.seed)
    model = Model(config)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    model.to(device)
    if todo.sample is not None:
        tokenizer = fineweb.get_tokenizer(checkpoint["data"]["tokenizer"])
        return say("\n".join(generate(model.eval(), tokenizer, todo.sample, 4, config, device, autocast)))
    batch_rows = config.batch_tokens // config.block_size
    micro_batch = find_micro_batch(config, batch_rows // world, device, autocast)
    micro_steps = batch_rows // world // micro_batch
    groups = model.optimizer_groups()
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if checkpoint:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": checkpoint["optimizer"]})  # settings as of now
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())  # empty if it was off
        torch.set_rng_state(checkpoint["rng"])
    compiles = config.compile == "on" or config.compile == "auto" and device.type == "cuda" and os.name == "posix"
    net = compiled = torch.compile(model, dynamic=False) if compiles else model
    if world > 1:
        net = nn.parallel.DistributedDataParallel(compiled, gradient_as_bucket_view=True)
        net.broadcast_buffers = False  # they are each process's own; as an argument it is deprecated from torch 2.13 on

    # ---- the data
    if todo.tiny and config.data_dir == TINY_RUN["data_dir"] and rank == 0:
        fineweb.write_sample(config.data_dir)
    over_ranks([0], device)  # the others wait for it
    data = fineweb.open_dataset(config.data_dir, config.vocab_size, config.train_shards, checkpoint and checkpoint["data"])
    train = fineweb.Windows(config.data_dir, "train", config.block_size, config.train_shards)
    val = fineweb.Windows(config.data_dir, "val", config.block_size, max_tokens=config.val_tokens)
    loader = fineweb.Loader(train, batch_rows, config.seed, rank, world, device, config.vocab_size, config.max_steps)
    tokenizer = fineweb.try_tokenizer(data["tokenizer"]) if rank == 0 else None
    scorer = hellaswag.open_scorer(config.hellaswag, config.data_dir, tokenizer, config.block_size, device, rank, world)
    checkpoint = None

    # ---- the run's folder
    git = subprocess.run("git describe --always --dirty --exclude=*", shell=True, cwd=Path(__file__).parent,
                         capture_output=True, text=True).stdout.strip()  # fmt: skip
    facts = {"script": script, "git": git or "unknown", "torch": torch.__version__, "device": device_name,
             "processes": world, "dtype": f"{dtype} ({why})", "micro_batch": micro_batch, "micro_steps": micro_steps,
             "parameters": sum(p.numel() for p in model.parameters()), "flops_per_token": model.flops_per_token(),
             "data": data, "config": dataclasses.asdict(config)}  # fmt: skip
    log_file = fineweb.open_log(folder / "log.jsonl" if rank == 0 else None, math.inf if todo.eval else first_step)
    if rank == 0 and not todo.eval:
        (folder / f"{script}.py").write_text(Path(__file__).read_text())

    def log(event, **fields):
        log_file.write(json.dumps({"event": event, **fields}) + "\n")

    log("run", first_step=first_step, time=time.time(), **facts)
    say("\n".join(f"{name}: {value}" for name, value in facts.items()))
    stop, stopping = [], False  # a first signal asks for an end after the step, a second one kills
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: (stop.append(number), signal.signal(number, signal.SIG_DFL)))
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in device_name and dtype != torch.float32), None)

    for step in range(first_step, last_step + 1):
        # ---- evaluate, save, sample
        due = not stopping and (step % config.eval_every == 0 or step == last_step)
        if due:
            model.eval()
            loss = validate(compiled, val, micro_batch, rank, world, device, autocast)
            log("val", step=step, loss=loss)
            say(f"step {step:05d} | validation loss {loss:.4f}")
            for convention in (scorer.batches if step == last_step else ["nanogpt"]) if scorer else []:
                with autocast:  # by the raw model: compile would start over for each of the scorer's shapes
                    result = scorer.score(lambda x, y: model(x, y, "none")[1], convention, step, folder)
                log("score", step=step, **result)
                say(f"step {step:05d} | {hellaswag.one_line(result)}")
        if (due or stopping) and step > first_step and rank == 0:
            checkpoint = {"format": 1, "script": script, "step": step, "config": facts["config"], "data": data,
                          "model": model.state_dict(), "optimizer": optimizer.state_dict()["state"],
                          "scaler": scaler.state_dict(), "rng": torch.get_rng_state()}  # fmt: skip
            fineweb.write_atomic(folder / f"step_{step:06d}.pt", lambda f: torch.save(checkpoint, f))
            for old in sorted(folder.glob("step_*.pt"))[:-2]:
                old.unlink()
            say(f"step {step:05d} | saved {folder}/step_{step:06d}.pt")
        for text in generate(model, tokenizer, config.prompt, 2, config, device, autocast) if due and tokenizer else []:
            log("sample", step=step, text=text)
            say(f"step {step:05d} > {text!r}")
        if stopping or step == last_step:
            say(f"{folder} is at step {step} of {config.max_steps}. Next: python {script}.py --run_name {folder.name} "
                + ("--resume" if step < config.max_steps else f"--sample {json.dumps(config.prompt)}"))  # fmt: skip
            break

        # ---- step
        model.train()
        began, loss = time.perf_counter(), torch.zeros((), device=device)
        for micro_step, part in enumerate(loader.batch(step).split(micro_batch)):  # (micro_batch, T + 1)
            if world > 1:  # gradients are averaged over the processes once a step, in the last backward
                net.require_backward_grad_sync = micro_step == micro_steps - 1
            with autocast:
                _, micro_loss = net(part[:, :-1], part[:, 1:])
            scaler.scale(micro_loss / micro_steps).backward()
            loss += micro_loss.detach() / micro_steps
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        lr = get_lr(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        scaler.step(optimizer)  # a scaler skips an infinite gradient, on all processes alike: it is their mean
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        figures = model.after_step()
        loss, stopping = over_ranks([loss.item() / world, len(stop)], device)
        norm, seconds = norm.item(), time.perf_counter() - began
        if not math.isfinite(loss) or not math.isfinite(norm) and (not scaler.is_enabled() or scaler.get_scale() < 1):
            fail(f"stopped at step {step}: loss {loss}, gradient norm {norm}; the last good checkpoint, if any, is in {folder}")
        pace = seconds if step <= first_step + 1 else 0.9 * pace + 0.1 * seconds  # the first step compiles
        log("train", step=step, loss=loss, lr=lr, norm=norm if math.isfinite(norm) else None, ms=1000 * seconds, **figures)
        line = f"step {step:05d}/{config.max_steps} | loss {loss:.4f} | lr {lr:.1e} | norm {norm:.2f} | {1000 * seconds:.0f} ms"
        line += f" | {config.batch_tokens / seconds:,.0f} tok/s | eta {pace * (config.max_steps - step - 1) / 60:.0f} min"
        line += f" | {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB" if device.type == "cuda" else ""
        line += f" | MFU {3 * facts['flops_per_token'] * config.batch_tokens / seconds / (peak * world):.1%}" if peak else ""
        if step % config.log_every == 0:
            say(line)


if __name__ == "__main__":
    main()
    if dist.is_initialized():  # not in main, where DDP holds the group: its threads must end before Python does
        dist.destroy_process_group()
