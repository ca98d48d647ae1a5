"""
RWKV-7 (Peng et al., 2025, "RWKV-7 'Goose' with Expressive Dynamic State
Evolution") at 124M parameters.

Against GPT-2: a recurrent network instead of attention. Each head keeps a D x
D matrix, its state, which every token decays, corrects by a generalised delta
rule and adds to, so that memory and time per token are the same at any length.
Training runs the same recurrence in chunks of matrix products. There are no
positions: a token is mixed with the one before it. The MLP squares a ReLU and
is 3.67 C wide instead of 4 C, to stay within the budget. The head is tied to
the embedding, which the authors' is not.
124,286,208 parameters with the vocabulary padded to 50,304.

    python train_rwkv.py --tiny    # a few minutes on a laptop
    torchrun --standalone --nproc_per_node=8 train_rwkv.py    # on eight GPUs
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
    n_head: int = 12  # heads of the time mixing
    n_embd: int = 768  # channels of the residual stream
    n_inner: int = 2816  # channels inside the MLP: what the parameter budget leaves
    rank_w: int = 64  # rank of the decay's matrices; all four are the authors' at 768 channels
    rank_a: int = 64  # rank of the in-context learning rate's matrices
    rank_v: int = 32  # rank of the value residual's matrices
    rank_g: int = 128  # rank of the gate's matrices
    kernel: Literal["auto", "torch"] = "auto"  # of the recurrence; auto: fla's on CUDA, if it is installed

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
TINY_MODEL = dict(n_layer=3, n_head=2, n_embd=128, n_inner=640, rank_w=32, rank_a=32, rank_v=32, rank_g=64)
# The authors' for 12 layers of 768 channels: RWKV-LM, RWKV-v7/train_temp/demo-training-run-v7-pile.sh
RECIPE = dict(max_lr=8e-4, min_lr=3e-5, warmup_steps=10, beta2=0.99, adam_eps=1e-18, weight_decay=0.1)

# ==========================================================================
# Model: this architecture's. B batch, T tokens, C channels, H heads, D channels of
# a head, V vocabulary; N chunks of L tokens. Sections are the RWKV-7 paper's.

CHUNK = 32  # tokens: on a CPU 16 takes a quarter longer and 64 an eighth, with twice the rounding error


# The same in GPT-2 and RWKV-7.
class Norm(nn.Module):
    """LayerNorm (Ba et al., 2016, eq. 4): (..., size) -> (..., size)."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


class Solve(torch.autograd.Function):
    """x of (I - a) x = y: a (..., L, L) strictly lower triangular, y (..., L, M) -> (..., L, M).

    The inverse of I - a grows from blocks of 2 rows to blocks of L. Two neighbours P and R,
    with Q below P, become [[P, 0], [R Q P, R]]. The product (I + a)(I + a^2)(I + a^4)...
    is shorter, but overflows on repeated tokens.
    """

    @staticmethod
    def forward(ctx, a, y):
        L = a.shape[-1]
        row = torch.arange(L, device=a.device)
        column = row[None]
        row = row[:, None]
        inverse = torch.eye(L, dtype=a.dtype, device=a.device)
        inverse = inverse + a * (row // 2 == column // 2)
        size = 2
        while size < L:
            in_pair = row // (2 * size) == column // (2 * size)
            below = in_pair & (row // size > column // size)
            inverse = inverse + inverse @ (a * below) @ inverse
            size *= 2
        x = inverse @ y
        ctx.save_for_backward(inverse, x)
        return x

    @staticmethod
    def backward(ctx, dx):
        inverse, x = ctx.saved_tensors
        dy = inverse.mT @ dx
        return dy @ x.mT, dy


def recurrence(r, log_w, k, v, a, b, state):
    """The recurrence of section 4.1, in chunks; r, log_w, k, v, a, b (B, T, H, D), state (B, H, D, D).

        S_t = diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
        y_t = S_t^T r_t

    S is the paper's matrix transposed: keys are rows, values columns. As in the authors' kernel, a is
    minus the removed key, and b that key times the in-context learning rate, which Attention calls a.
    Returns y (B, T, H, D) and S_T.

    Token by token it is in tests/reference.py; here a chunk of L tokens is done by matrix products.
    In a chunk, u_t = a_t^T S_{t-1} obeys a triangular system, as S_{t-1} is S_0 decayed plus the
    chunk's b_s u_s and k_s v_s decayed. Its solution is linear in S_0: u = u_0 + W S_0. So u_0 and W
    are made for all chunks at once, and only S_0, u and the next chunk's S_0 one after another.
    """
    B, T, H, D = r.shape
    L = min(CHUNK, T)
    N = math.ceil(T / L)

    def chunks(x):  # (N, B, H, L, D), a view
        if N * L > T:  # zeros after the last token change no state: no decay, no key
            x = F.pad(x, (0, 0, 0, 0, 0, N * L - T))
        return x.view(B, N, L, H, D).permute(1, 0, 3, 2, 4)

    log_w = chunks(log_w).contiguous()
    decay = log_w.cumsum(-2)  # from the chunk's start to after each token
    # A write at s is decayed by exp(decay_t - decay_s) when t reads it. Split into a factor of t and one
    # of s, either could overflow; measured from the chunk's middle both stay small.
    middle = decay[..., L // 2, None, :].detach()
    fall = decay - middle
    rise = (-fall).exp()
    r = (fall.exp() * chunks(r)).flatten(1, 2)  # (N, B H, L, D); r reads after its own token
    a = ((fall - log_w).exp() * chunks(a)).flatten(1, 2)  # a reads before it
    k = (rise * chunks(k)).flatten(1, 2)
    b = (rise * chunks(b)).flatten(1, 2)
    v = chunks(v).flatten(1, 2)
    own = torch.ones(L, L, dtype=r.dtype, device=r.device).tril()
    before = own.tril(-1)
    r_k = (r @ k.mT) * own  # (N, B H, L, L)
    r_b = (r @ b.mT) * own
    a_k = (a @ k.mT) * before
    a_b = (a @ b.mT) * before
    u, W = Solve.apply(a_b, torch.cat((a_k @ v, a), -1)).split(D, -1)  # u_0 and W

    # The state before a chunk is kept as if decayed to its middle, too, so that r and a read it as they are.
    middle = middle.flatten(1, 2).mT  # (N, B H, D, 1)
    end = decay[..., -1:, :].flatten(1, 2).mT  # over the whole chunk
    next_middle = torch.cat((middle[1:], torch.zeros_like(middle[:1])))  # after the last chunk just S_T
    steps = (u, W, b.mT, k.mT @ v, (end - middle + next_middle).exp())
    state = state.reshape(B * H, D, D) * middle[0].exp()
    states = []
    us = []
    for u_n, W_n, b_n, write, keep in zip(*(x.unbind() for x in steps)):  # indexing: backward quadratic
        states.append(state)
        u_n = torch.baddbmm(u_n, W_n, state)
        us.append(u_n)
        state = keep * (state + torch.baddbmm(write, b_n, u_n))
    y = r_k @ v + r_b @ torch.stack(us) + r @ torch.stack(states)
    y = y.view(N, B, H, L, D).permute(1, 0, 3, 2, 4).reshape(B, N * L, H, D)
    return y[:, :T], state.view(B, H, D, D)


def can_fla():
    """Whether flash-linear-attention (fla-core) and a CUDA device for its kernels are here; says so once."""
    import importlib.util
    import sys

    if not torch.cuda.is_available() or importlib.util.find_spec("fla") is None:
        return False
    if "fla.ops.rwkv7" not in sys.modules:
        try:
            import fla.ops.rwkv7
        except ImportError as error:
            fail(f"flash-linear-attention can't be imported ({error}): mend it, or take --kernel torch")
        say("recurrence by flash-linear-attention's kernel; without it: --kernel torch")
    return True


def fla_recurrence(r, log_w, k, v, a, b, state, dtype):
    """recurrence in Triton, of inputs that are rounded to a dtype of 16 bits; log_w and the state are not.

    Not with chunk_rwkv7's lower_bound: there I - a is inverted by the product that Solve avoids, in fp16,
    and on repeated tokens the error is as large as the result.
    """
    from fla.ops.rwkv7 import chunk_rwkv7

    r, k, v, a, b = (x.to(dtype) for x in (r, k, v, a, b))
    y, state = chunk_rwkv7(r, log_w, k, v, a, b, initial_state=state, output_final_state=True)
    return y.to(log_w.dtype), state


class Attention(nn.Module):
    """Time mixing, in attention's place (section 4.1): (B, T, C) -> (B, T, C).

    With the authors' names (RWKV-LM, RWKV_Tmix_x070): r receptance, w decay, k key, v value,
    a in-context learning rate, g gate; x0 is the bias of x, x1 and x2 its low-rank matrices.
    """

    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        H = config.n_head
        self.mix = nn.Parameter(torch.empty(6, C))  # of r, w, k, v, a, g
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)
        self.w0 = nn.Parameter(torch.empty(C))
        self.w1 = nn.Parameter(torch.empty(C, config.rank_w))
        self.w2 = nn.Parameter(torch.empty(config.rank_w, C))
        self.a0 = nn.Parameter(torch.empty(C))
        self.a1 = nn.Parameter(torch.empty(C, config.rank_a))
        self.a2 = nn.Parameter(torch.empty(config.rank_a, C))
        if layer > 0:  # the first layer's values are what the others mix in
            self.v0 = nn.Parameter(torch.empty(C))
            self.v1 = nn.Parameter(torch.empty(C, config.rank_v))
            self.v2 = nn.Parameter(torch.empty(config.rank_v, C))
        self.g1 = nn.Parameter(torch.empty(C, config.rank_g))
        self.g2 = nn.Parameter(torch.empty(config.rank_g, C))
        self.k_k = nn.Parameter(torch.empty(C))
        self.k_a = nn.Parameter(torch.empty(C))
        self.r_k = nn.Parameter(torch.empty(H, C // H))
        self.head_norm = nn.GroupNorm(H, C, eps=64e-5)
        self.may_fla = config.kernel == "auto" and can_fla()

    def forward(self, x, v_first, last, state):
        """x, the first layer's values (None in it), the x before these, the state -> y, values, state."""
        shifted = torch.cat((last, x[:, :-1]), dim=1)
        mixed = x + (shifted - x) * self.mix[:, None, None]  # (6, B, T, C)
        xr, xw, xk, xv, xa, xg = mixed.unbind()
        r = self.receptance(xr)
        w = torch.tanh(xw @ self.w1) @ self.w2
        k = self.key(xk)
        v = self.value(xv)
        a = xa @ self.a1 @ self.a2
        g = torch.sigmoid(xg @ self.g1) @ self.g2
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + xv @ self.v1 @ self.v2)
        y, state = self.mix_time(r, w, k, v, a, state)
        return self.proj(y * g), v_first, state

    def mix_time(self, r, w, k, v, a, state):
        """The projections (B, T, C) and the state before them -> y (B, T, C) and the state after them.

        In fp32 under autocast, too: exponentials of sums over a chunk and the inverse need it. fla's
        kernel rounds its inputs to 16 bits and has these in fp32 by itself.
        TF32 on CUDA is enough, an error of 2e-3, as large as that of bf16 inputs.
        """
        B, T, C = r.shape
        with torch.autocast(r.device.type, enabled=False):
            dtype = self.w0.dtype
            given = r.dtype  # of 16 bits under autocast
            r = r.to(dtype)
            k = k.to(dtype)
            v = v.to(dtype)
            state = state.to(dtype)
            log_w = -math.exp(-0.5) * torch.sigmoid(self.w0 + w.to(dtype))  # w is between 0.545 and 1
            a = torch.sigmoid(self.a0 + a.to(dtype))
            heads = (B, T, *self.r_k.shape)
            removed = F.normalize((k * self.k_k).view(heads), dim=-1)  # (B, T, H, D): the key to overwrite
            k = (k * (1 + (a - 1) * self.k_a)).view(heads)  # the key to write
            r = r.view(heads)
            v = v.view(heads)
            inputs = (r, log_w.view(heads), k, v, -removed, removed * a.view(heads), state)
            if self.may_fla and r.is_cuda and given.itemsize == 2:
                y, state = fla_recurrence(*inputs, given)
            else:
                y, state = recurrence(*inputs)
            y = self.head_norm(y.reshape(B * T, C)).view(heads)
            y = y + (r * k * self.r_k).sum(-1, keepdim=True) * v  # plus the token's own value, past the state
            return y.view(B, T, C), state


class MLP(nn.Module):
    """Channel mixing: two layers with ReLU squared (section 4.2): (B, T, C) -> (B, T, C)."""

    def __init__(self, n_embd, n_inner):
        super().__init__()
        self.mix = nn.Parameter(torch.empty(n_embd))
        self.up = nn.Linear(n_embd, n_inner, bias=False)
        self.proj = nn.Linear(n_inner, n_embd, bias=False)

    def forward(self, x, last):
        shifted = torch.cat((last, x[:, :-1]), dim=1)
        x = x + (shifted - x) * self.mix
        return self.proj(F.relu(self.up(x)).square())


class Block(nn.Module):
    """Residual block with norms first (section 4): (B, T, C) -> (B, T, C).

    state: what is kept of the past, the attention's last input (B, 1, C), its state
    (B, H, D, D) and the MLP's last input (B, 1, C).
    """

    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = Norm(config.n_embd)
        self.attention = Attention(config, layer)
        self.norm2 = Norm(config.n_embd)
        self.mlp = MLP(config.n_embd, config.n_inner)

    def forward(self, x, v_first, state):
        last1, matrices, last2 = state
        x1 = self.norm1(x)
        y, v_first, matrices = self.attention(x1, v_first, last1, matrices)
        x = x + y
        x2 = self.norm2(x)
        x = x + self.mlp(x2, last2)
        return x, v_first, (x1[:, -1:], matrices, x2[:, -1:])


class Model(nn.Module):
    """The language model: token ids in, logits or losses out."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            fail(f"--n_embd {config.n_embd} is not a multiple of --n_head {config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the head
        self.norm0 = Norm(config.n_embd)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.norm = Norm(config.n_embd)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)  # set by the loop
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """The formulas of RWKV-LM (train_temp/src/model.py: RWKV_Tmix_x070 and generate_init_weight).

        Channels differ from the start in their memory span (w0) and in how much of the token
        before they see (mix), and every block is an identity.
        """
        config = self.config
        C = config.n_embd
        D = config.n_embd // config.n_head
        n = torch.arange(C, dtype=torch.float64)
        ramp = n / (C - 1)  # from 0 to 1 over all channels
        zigzag = (n % D) / (D - 1) * 2 - 1  # from -1 to 1 over the channels of each head
        zigzag = zigzag * zigzag.abs()
        for name, parameter in self.named_parameters():
            layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
            to_0 = 1 - layer / config.n_layer  # from 1 to almost 0 over the layers
            to_1 = layer / max(1, config.n_layer - 1)  # from 0 to 1
            if name.endswith("attention.mix"):
                powers = torch.tensor([[0.2], [0.9], [0.7], [0.7], [0.9], [0.2]], dtype=torch.float64)
                parameter.copy_(1 - (n / C) ** (powers * to_0))
            elif name.endswith("mlp.mix"):
                parameter.copy_(1 - (n / C) ** to_0**4)
            elif name.endswith("w0"):
                parameter.copy_(6 * ramp ** (1 + to_1**0.3) - 5.5 + 2.5 * zigzag)
            elif name.endswith("a0"):
                parameter.copy_(0.4 * ramp - 0.39 + 0.3 * zigzag)
            elif name.endswith("v0"):
                parameter.copy_(0.93 - 0.4 * ramp)
            elif name.endswith("k_k"):
                parameter.copy_(0.76 - 0.1 * ramp)
            elif name.endswith("k_a"):
                parameter.fill_(1.02)
            elif name.endswith("r_k"):
                parameter.fill_(-0.04)
            elif name.endswith(("w2", "a2", "v2", "g2")):
                nn.init.orthogonal_(parameter, 0.1 * max(1, len(parameter) / C) ** 0.5)
            elif name.endswith(("receptance.weight", "value.weight", "up.weight")):
                nn.init.orthogonal_(parameter)
            elif name.endswith("key.weight"):
                nn.init.orthogonal_(parameter, 0.1)
            elif name.endswith(("w1", "a1", "v1", "g1", "proj.weight", "bias")):
                parameter.zero_()
            elif name.endswith("head_norm.weight"):
                parameter.fill_(((1 + layer) / config.n_layer) ** 0.7)
            elif "norm" in name:
                parameter.fill_(1.0)
            elif name == "wte.weight":  # as a head: as an embedding, U(+-1e-4), it learns more slowly
                nn.init.orthogonal_(parameter, 0.5 * max(1, len(parameter) / C) ** 0.5)
            else:
                raise NotImplementedError(f"no initialisation for {name}")

    def trunk(self, idx, state=None):
        """idx (B, T), the blocks' states before it or None -> (input (B, T, C) of the head, states after)."""
        x = self.norm0(self.wte(idx))  # (B, T, C)
        if state is None:
            H = self.config.n_head
            D = self.config.n_embd // H
            last = torch.zeros_like(x[:, :1])
            state = [(last, last.new_zeros(len(x), H, D, D), last)] * len(self.blocks)
        v_first = None
        after = []
        for block, before in zip(self.blocks, state):
            x, v_first, block_state = block(x, v_first, before)
            after.append(block_state)
        return self.norm(x), after

    def forward(self, idx, targets=None):
        """Ids idx (B, T) -> (logits (B, T, V), None), or with targets (B, T) -> (None, mean loss in nats)."""
        x, _ = self.trunk(idx)
        logits = F.linear(x, self.wte.weight)  # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        # RWKV-LM's L2Wrap (train_temp/src/model.py): its gradient keeps logits from drifting upwards
        penalty = 0.5e-4 * logits.amax(-1).to(loss.dtype).square().mean()
        return None, loss + (penalty - penalty.detach())

    def decode(self, idx, state=None):
        """Logits (B, V) of the token after idx (B, T), and a state: with it the next call reads one token."""
        x, state = self.trunk(idx if state is None else idx[:, -1:], state)
        return F.linear(x[:, -1], self.wte.weight), state

    def after_step(self, skipped=False):
        """Called after each optimizer step; returns figures for the log (none here)."""
        return {}

    def active_parameters(self):
        """Parameters that one token uses."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """FLOPs of a forward pass per token: matrix products, and the recurrence in chunks."""
        config = self.config
        D = config.n_embd // config.n_head
        L = CHUNK
        weights = self.wte.weight.numel()  # as the head; looking up an embedding costs nothing
        weights += sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        low_rank = ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")
        weights += sum(p.numel() for name, p in self.named_parameters() if name.endswith(low_rank))
        # of a head: products of L x L maps, half of them masked; the inverse; with the state
        head = 9 * L * D / 2 + L**2 / 3 + 4 * D**2
        return 2 * weights + 2 * config.n_layer * config.n_head * head

    def optimizer_groups(self):
        """Matrices decay, except the low-rank ones; w0, the decay's bias, has twice the learning rate.

        As configure_optimizers in RWKV-LM: with more that decays "the performance will be much worse".
        """
        decayed = []
        fast = []
        rest = []
        for name, parameter in self.named_parameters():
            if name.endswith("w0"):
                fast.append(parameter)
            elif name.endswith(".weight") and parameter.dim() >= 2:
                decayed.append(parameter)
            else:
                rest.append(parameter)
        return [
            {"params": decayed, "weight_decay": self.config.weight_decay},
            {"params": fast, "weight_decay": 0.0, "lr_scale": 2.0},
            {"params": rest, "weight_decay": 0.0},
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
