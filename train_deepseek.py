"""
DeepSeek-V3 (DeepSeek-AI, 2024, "DeepSeek-V3 Technical Report", arXiv 2412.19437) at 124M parameters.

What differs from GPT-2: attention whose queries, keys and values pass through narrow latents (MLA), rotary
positions on a part of each head, RMSNorm, no biases, gated SiLU MLPs. After one dense block, each token uses
one shared and 4 of 16 routed experts, kept evenly loaded by a bias on the choice instead of a large auxiliary
loss. While training, a further block also predicts the token after the next (MTP).

124,317,312 parameters with the vocabulary padded to 50,304: 116,131,968 of the model that is evaluated and
8,185,344 of the MTP block. A token uses 71.2M of them in training and 67.5M after it, so that a step costs
0.86 times the operations of GPT-2's. Unlike the original, the head is tied to the embedding, as in all of
these scripts; and as in the released code, nothing is multiplied at the width bottlenecks (section 4.2).

    python train_deepseek.py --tiny                               # a few minutes on a laptop, no GPU, no network
    python train_deepseek.py                                      # one GPU; the micro-batch is the largest that fits
    torchrun --standalone --nproc_per_node=8 train_deepseek.py    # one node of eight: the same run, faster
    python train_deepseek.py --resume                             # go on from the newest checkpoint
    python train_deepseek.py --eval                               # score it; --sample "A prompt" continues a text
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
    n_layer: int = option(12, "blocks, not counting MTP's")
    n_dense: int = option(1, "first blocks that have a plain MLP instead of experts", zero=True)
    n_head: int = option(10, "attention heads")
    n_embd: int = option(640, "channels of the residual stream")
    q_rank: int = option(256, "channels of the latent that the queries are made from")
    kv_rank: int = option(128, "channels of the latent that keys and values are made from")
    nope_dim: int = option(64, "channels of a head's query and key without position")
    rope_dim: int = option(32, "channels of a head's query and key with rotary position; the key's are shared by all")
    v_dim: int = option(64, "channels of a head's value")
    n_expert: int = option(16, "routed experts of a block")
    n_active: int = option(4, "routed experts that a token uses")
    n_shared: int = option(1, "experts that every token uses")
    n_group: int = option(4, "groups that the routed experts form")
    topk_group: int = option(2, "groups that a token may choose its experts from")
    expert_width: int = option(192, "hidden channels of an expert")
    dense_width: int = option(960, "hidden channels of a dense block's MLP: as many as a token's experts have together")
    route_scale: float = option(2.0, "sum of a token's routing weights: sqrt(n_active), see Router")
    bias_speed: float = option(1e-3, "change of the routing bias a step", zero=True)
    balance_alpha: float = option(1e-4, "weight of the sequence-wise balance loss", zero=True)
    mtp_depth: str = option("1", "further tokens predicted in training", ("0", "1"))
    experts: str = option("auto", "how they are computed; auto: grouped where it works", ("auto", "grouped", "dense"))
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
TINY_MODEL = dict(n_layer=4, n_head=4, n_embd=128, q_rank=64, kv_rank=32, nope_dim=32, rope_dim=16, v_dim=32,
                  n_expert=8, n_active=2, expert_width=40, dense_width=120, route_scale=1.414)  # fmt: skip
RECIPE = {}  # AdamW is the common one; section 4.2's schedule, at 2.2e-4, was made for 671B parameters on 14.8T tokens

# ==========================================================================================================
# Model: this architecture's. B batch, T tokens, C channels, H heads, D channels of a head, N = B T tokens of a
# batch, E experts, G groups of them, K experts a token uses, W hidden channels of an expert. Sections and
# equations are those of the DeepSeek-V3 report.


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich, 2019, eq. 4) over the last dimension, of any width: (..., C) -> (..., C)."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x):
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, eps=1e-6)


def rotate(x, cos, sin):
    """Rotary positions (Su et al., 2021, eq. 34) on neighbouring channels: x (B, T, H, D), cos and sin (T, D / 2)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, D / 2)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)  # (B, T, H, D)


class Attention(nn.Module):
    """Multi-head latent attention (section 2.1.1, eq. 1-11): (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.kv_rank = config.n_head, config.kv_rank
        self.nope_dim, self.rope_dim, self.v_dim = config.nope_dim, config.rope_dim, config.v_dim
        self.q_a = nn.Linear(config.n_embd, config.q_rank, bias=False)
        self.q_norm = Norm(config.q_rank)
        self.q_b = nn.Linear(config.q_rank, config.n_head * (config.nope_dim + config.rope_dim), bias=False)
        self.kv_a = nn.Linear(config.n_embd, config.kv_rank + config.rope_dim, bias=False)
        self.kv_norm = Norm(config.kv_rank)
        self.kv_b = nn.Linear(config.kv_rank, config.n_head * (config.nope_dim + config.v_dim), bias=False)
        self.proj = nn.Linear(config.n_head * config.v_dim, config.n_embd, bias=False)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        q = self.q_b(self.q_norm(self.q_a(x))).view(B, T, self.n_head, -1)  # (B, T, H, D)
        q_nope, q_rope = q.split((self.nope_dim, self.rope_dim), dim=-1)
        latent, k_rope = self.kv_a(x).split((self.kv_rank, self.rope_dim), dim=-1)
        kv = self.kv_b(self.kv_norm(latent)).view(B, T, self.n_head, -1)
        k_nope, v = kv.split((self.nope_dim, self.v_dim), dim=-1)
        k_rope = rotate(k_rope[:, :, None], cos, sin).expand(-1, -1, self.n_head, -1)
        q = torch.cat((q_nope, rotate(q_rope, cos, sin)), dim=-1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        v = F.pad(v, (0, self.nope_dim + self.rope_dim - self.v_dim))  # the flash kernels want one width for q, k and v
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., : self.v_dim]
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class MLP(nn.Module):
    """Gated SiLU (Shazeer, 2020, eq. 6) with width hidden channels: (B, T, C) -> (B, T, C)."""

    def __init__(self, config, width):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 2 * width, bias=False)
        self.proj = nn.Linear(width, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * up)


class Router(nn.Module):
    """The K experts of each token and their weights (eq. 13-16 and section 2.1.2): (B, T, C) -> 2 x (B, T, K).

    Also the sequence-wise balance loss (eq. 17-20), 0 unless training. The bias takes part in the choice only;
    Model.after_step() moves it by the load, which counts the tokens of a whole step for each expert.

    route_scale: the weights of a token sum to it. The report has 2.5 for 8 experts. For unrelated experts
    sqrt(K) keeps the scale of one expert, and is what Moonlight (2.446 for 6) and Kimi K2 (2.827 for 8) use.
    """

    def __init__(self, config):
        super().__init__()
        self.n_active, self.n_group, self.topk_group = config.n_active, config.n_group, config.topk_group
        self.route_scale, self.balance_alpha = config.route_scale, config.balance_alpha
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))
        self.register_buffer("bias", torch.zeros(config.n_expert))
        self.register_buffer("load", torch.zeros(config.n_expert, dtype=torch.int64), persistent=False)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # in bf16 near scores would be equal
            scores = F.linear(x.to(self.weight.dtype), self.weight).sigmoid()  # (B, T, E)
        with torch.no_grad():
            groups = (scores + self.bias).unflatten(-1, (self.n_group, -1))  # (B, T, G, E / G)
            best = groups.topk(2).values.sum(-1).topk(self.topk_group).indices
            banned = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)  # (B, T, G)
            chosen = groups.masked_fill(banned[..., None], -math.inf).flatten(-2).topk(self.n_active).indices
        weights = scores.gather(-1, chosen)  # (B, T, K)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.route_scale
        if not self.training:
            return chosen, weights, 0.0
        with torch.no_grad():
            zeros = torch.zeros_like(scores)
            self.load += zeros.scatter(-1, chosen, 1.0).sum((0, 1)).to(torch.int64)
            best = scores.topk(self.n_active).indices  # eq. 18 has neither bias nor groups
            f = zeros.scatter(-1, best, 1.0).mean(1) * (scores.shape[-1] / self.n_active)  # (B, E)
        p = (scores / scores.sum(-1, keepdim=True)).mean(1)  # (B, E)
        return chosen, weights, self.balance_alpha * (f * p).sum(-1).mean()


def add_rows(x, index):
    """Rows of x (R, C): index (M,) -> (M, C), index (N, K) -> (N, C), each the sum of K rows."""
    # embedding_bag adds while it reads and never holds the N K rows
    return x.index_select(0, index) if index.dim() == 1 else F.embedding_bag(index, x, mode="sum")


class Move(torch.autograd.Function):
    """From tokens to rows of experts or back, each the other's gradient; without atomics, so always the same sum.

    forth and back are token (N K,), a row's token, and places (N, K), a token's rows: x is copied by token, or
    added up by places.
    """

    @staticmethod
    def forward(ctx, x, forth, back):
        ctx.save_for_backward(back)
        return add_rows(x, forth)

    @staticmethod
    def backward(ctx, grad):
        return add_rows(grad, *ctx.saved_tensors), None, None


class Experts(nn.Module):
    """The routed part of eq. 12, without dropping any: x (N, C), chosen and weights (N, K) -> (N, C).

    "grouped" sorts the rows by expert and multiplies each expert's with its matrix in one F.grouped_mm: a fused
    kernel for bf16 on Hopper and data-centre Blackwell, a loop over the experts inside of torch on a CPU and on
    Ampere and Ada. "dense" is two plain matrix products of all experts on all tokens, with weight 0 where
    not chosen: E / K times the work, for what F.grouped_mm can't: fp64, fp16 and fp32 if compiled, other devices.
    """

    def __init__(self, config):
        super().__init__()
        self.method = config.experts
        self.up = nn.Parameter(torch.empty(config.n_expert, 2 * config.expert_width, config.n_embd))  # gate, then up
        self.down = nn.Parameter(torch.empty(config.n_expert, config.n_embd, config.expert_width))

    def forward(self, x, chosen, weights):
        device = x.device.type  # F.grouped_mm ignores autocast
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x, up, down = x.to(dtype), self.up.to(dtype), self.down.to(dtype)
        eager = device == "cpu" and dtype != torch.float64 and not torch.compiler.is_compiling()
        works = eager or dtype == torch.bfloat16 and device != "mps"
        compute = self.grouped if self.method == "grouped" or self.method == "auto" and works else self.dense
        return compute(x, up, down, chosen, weights)

    def dense(self, x, up, down, chosen, weights):
        gates = weights.new_zeros(len(x), len(up)).scatter(-1, chosen, weights)  # (N, E)
        gate, h = F.linear(x, up.flatten(0, 1)).view(len(x), *up.shape[:2]).chunk(2, dim=-1)  # (N, E, W)
        h = (F.silu(gate) * h * gates[..., None]).to(x.dtype)
        return h.flatten(1) @ down.transpose(1, 2).flatten(0, 1)

    def grouped(self, x, up, down, chosen, weights):
        expert, order = chosen.flatten().sort(stable=True)  # (N K,), order: row -> place in chosen
        ends = torch.searchsorted(expert, torch.arange(len(up), device=x.device), right=True).to(torch.int32)  # (E,)
        places = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device)).view_as(chosen)
        token = order // chosen.shape[-1]
        gate, h = F.grouped_mm(Move.apply(x, token, places), up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        # weighed before the second matrix, which comes to the same, so that backward keeps W channels, not C
        h = (F.silu(gate) * h * weights.flatten().gather(0, order)[:, None]).to(x.dtype)  # (N K, W)
        return Move.apply(F.grouped_mm(h, down.transpose(1, 2), offs=ends), places, token)


class Block(nn.Module):
    """Pre-norm residual block, dense or with experts (eq. 12): (B, T, C) -> (B, T, C) and the balance loss."""

    def __init__(self, config, dense=False):
        super().__init__()
        self.norm1 = Norm(config.n_embd)
        self.attention = Attention(config)
        self.norm2 = Norm(config.n_embd)
        self.mlp = MLP(config, config.dense_width if dense else config.n_shared * config.expert_width)
        self.router = None if dense else Router(config)
        self.experts = None if dense else Experts(config)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        h, balance = self.norm2(x), 0.0
        x = x + self.mlp(h)
        if self.router:
            chosen, weights, balance = self.router(h)
            x = x + self.experts(h.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1)).view_as(x)
        return x, balance


class MTP(nn.Module):
    """Multi-token prediction (section 2.2, eq. 21-23): 2 x (B, T, C) -> (B, T, C) and the balance loss.

    Of token i it takes the main model's last hidden state, before the final norm, and the embedding of token
    i + 1, concatenated as in the released weights; its output predicts token i + 2 by the shared head.
    """

    def __init__(self, config):
        super().__init__()
        self.norm_embd = Norm(config.n_embd)
        self.norm_hidden = Norm(config.n_embd)
        self.merge = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)
        self.block = Block(config)
        self.norm = Norm(config.n_embd)

    def forward(self, hidden, embd, cos, sin):
        x = self.merge(torch.cat((self.norm_embd(embd), self.norm_hidden(hidden)), dim=-1))
        x, balance = self.block(x, cos, sin)
        return self.norm(x), balance


class Model(nn.Module):
    """The language model. What the loop asks of it: forward, decode, after_step, flops_per_token, optimizer_groups."""

    def __init__(self, config):
        super().__init__()
        available = config.topk_group * (config.n_expert // config.n_group)
        if (config.n_expert % config.n_group or config.n_expert < 2 * config.n_group
                or config.topk_group > config.n_group or config.n_active > available):  # fmt: skip
            fail(f"--n_expert {config.n_expert} in --n_group {config.n_group} equal groups of at least 2, --n_active "
                 f"{config.n_active} of them from --topk_group {config.topk_group} groups: that does not go")
        if config.n_embd % 8 or config.expert_width % 8:
            fail(f"--n_embd {config.n_embd} and --expert_width {config.expert_width} must be multiples of 8")
        if config.rope_dim % 2 or config.v_dim > config.nope_dim + config.rope_dim:
            fail(f"--rope_dim {config.rope_dim} must be even, and --v_dim {config.v_dim} at most nope_dim + rope_dim")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList([Block(config, dense=i < config.n_dense) for i in range(config.n_layer)])
        self.norm = Norm(config.n_embd)
        self.mtp = MTP(config) if int(config.mtp_depth) else None
        frequency = 10_000.0 ** -(torch.arange(0, config.rope_dim, 2, dtype=torch.float64) / config.rope_dim)
        angle = torch.arange(config.block_size)[:, None] * frequency  # (T, D / 2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))  # optimizer steps done
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Section 4.2: N(0, 0.006) at 7168 channels, all alike. Scaled by 1 / sqrt(C), that is 0.020 at 640."""
        std = 0.006 * math.sqrt(7168 / self.config.n_embd)
        matrices = ("wte", "q_a", "q_b", "kv_a", "kv_b", "proj", "up", "router", "merge")
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith(tuple(f"{matrix}.weight" for matrix in matrices) + ("experts.up", "experts.down")):
                parameter.normal_(0.0, std)
            else:
                raise NotImplementedError(f"no initialisation for {name}")

    def forward(self, idx, targets=None, reduction="mean"):
        """Next-token logits or losses of idx, (B, T) token ids.

        Without targets: ((B, T, V) logits, None). With (B, T) targets: (None, loss), the cross-entropy in nats,
        its mean, or with reduction="none" each token's, (B, T), and 0 where the target is negative. The mean's
        gradient may hold auxiliary terms; its value never does.
        """
        cos, sin = self.cos[: idx.shape[1]], self.sin[: idx.shape[1]]
        x = embd = self.wte(idx)  # (B, T, C)
        balance = x.new_zeros(())
        for block in self.blocks:
            x, block_balance = block(x, cos, sin)
            balance = balance + block_balance
        if targets is None:
            return F.linear(self.norm(x), self.wte.weight), None  # (B, T, V)
        loss = head_loss(self.norm(x), self.wte.weight, targets, reduction)
        if self.training and reduction == "mean":
            auxiliary = balance + self.mtp_loss(x, embd, targets, cos, sin)
            loss = loss + (auxiliary - auxiliary.detach())
        return None, loss

    def mtp_loss(self, x, embd, targets, cos, sin):
        """Eq. 24-25, with the balance loss of its block: x before the final norm and embd, both (B, T, C) -> scalar."""
        T = x.shape[1]
        if not self.mtp or T == 1:
            return 0.0
        x, balance = self.mtp(x[:, :-1], embd[:, 1:], cos[:-1], sin[:-1])  # (B, T - 1, C)
        loss = head_loss(x, self.wte.weight, targets[:, 1:], "mean") * ((T - 1) / T)  # the last token has no target
        return balance + loss * torch.where(self.step < self.config.max_steps * 10 / 14.8, 0.3, 0.1)  # section 4.2

    def decode(self, idx, state=None):
        """((B, V) logits of the token after idx, state for the next call): state is what a model keeps of the past."""
        logits, _ = self(idx[:, -self.config.block_size :])
        return logits[:, -1], None

    @torch.no_grad()
    def after_step(self):
        """Called once after each optimizer step, on every rank; returns figures to log, {name: number}.

        Moves the routing biases against the load of the whole step (section 2.1.2); for the last 3.4% of the steps
        they stay (section 4.2). Figures: the busiest expert's load over the mean, averaged over the blocks and of
        the worst one, and the entropy of the load, averaged, 1 if all are alike.
        """
        routers = [module for module in self.modules() if isinstance(module, Router)]
        if not routers:
            return {}
        load = torch.stack([router.load for router in routers])  # (blocks, E)
        if dist.is_initialized():
            dist.all_reduce(load)
        mean = load.sum(-1, keepdim=True) / load.shape[-1]
        speed = self.config.bias_speed * (self.step < self.config.max_steps * 14.3 / 14.8)
        for router, direction in zip(routers, (mean - load).sign()):
            router.bias += speed * direction
            router.load.zero_()
        self.step += 1
        ratio = load / mean.clamp(min=1e-9)
        entropy = 1 - torch.special.xlogy(ratio, ratio).mean(-1) / math.log(load.shape[-1])
        busiest = ratio.amax(-1)
        figures = torch.stack((busiest.mean(), busiest.max(), entropy.mean())).tolist()
        return dict(zip(("load_max", "load_worst", "load_entropy"), figures))

    def flops_per_token(self):
        """Floating-point operations of a forward pass per token, at full context: matrix products and attention.

        A training pass's, with MTP; of the experts those that a token uses.
        """
        config, mtp = self.config, int(self.config.mtp_depth)
        matrices = sum(p.numel() for p in self.parameters() if p.dim() == 2) + mtp * self.wte.weight.numel()  # the head
        matrices += sum(p.numel() for p in self.parameters() if p.dim() == 3) * config.n_active / config.n_expert
        channels = config.n_head * (config.nope_dim + config.rope_dim + config.v_dim)
        attention = (config.n_layer + mtp) * channels * config.block_size / 2  # half of QK^T and AV is masked
        return 2 * matrices + 2 * attention

    # ------------------------------------------------------------------------------------------------------
    # Optimizer groups

    def optimizer_groups(self):
        """[{params, weight_decay, lr_scale}]: matrices and embeddings decay, norms and biases don't."""
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
