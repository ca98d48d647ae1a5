"""
The slow, obvious versions of what the training scripts compute in another way.

    cross_entropy         the loss, and L2Wrap's gradient    Model.forward in every script
    rotate_neighbours     rotary positions, the other way    rotate
    window_attention      query by query                     attend in train_mistral.py and train_gemma.py
    experts_by_loop       expert by expert                   Experts in train_deepseek.py
    balance_loss          the sums written out               Router.balance_loss in train_deepseek.py
    recurrence_by_token   token by token                     recurrence in train_rwkv.py
    rwkv_logits           the authors' forward pass          Model in train_rwkv.py
    mta_attention         all maps at once                   Attention in train_mta.py
    mta_logits            with a plain LLaMA around it       Model in train_mta.py

Each is a paper's equations, or the steps of the code released with it, without a thought for time or
memory, and without a line of the scripts. They compute in the precision of their inputs, and autograd
gives their gradients. B batch, T tokens, C channels, H heads, D channels of a head, V vocabulary.
"""
import math

import torch
import torch.nn.functional as F


def below(w, prefix):
    """The weights whose names start with prefix, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}


# ==========================================================================
# The loss


def cross_entropy(logits, targets, l2wrap=False):
    """Mean of -log softmax(logits)[target] in nats: logits (..., V), targets (...) -> scalar.

    With l2wrap the gradient has that of RWKV-LM's penalty too, 1e-4 / 2 max(logits)^2 of each
    token (train_temp/src/model.py), but the value lacks it.
    """
    wanted = logits.gather(-1, targets[..., None]).squeeze(-1)
    loss = (logits.logsumexp(-1) - wanted).mean()
    if l2wrap:
        largest, _ = logits.max(-1)
        penalty = (1e-4 / 2 * largest.square()).mean()
        loss = loss + penalty - penalty.detach()
    return loss


# ==========================================================================
# Attention


def rotate_neighbours(x, theta):
    """Rotary positions (Su et al., 2021, eq. 34): x (..., T, D), each head's channels 2i and 2i + 1 a pair.

    A pair is a complex number, turned by position times theta^(-2i / D). So do Meta's LLaMA, DeepSeek
    and MTA; the scripts pair i with i + D / 2, which is the same model with its channels in another order.
    """
    T, D = x.shape[-2:]
    frequencies = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.arange(T)[:, None] * frequencies
    cos = angles.cos().float().to(x.dtype)  # the scripts' tables are fp32
    sin = angles.sin().float().to(x.dtype)
    pairs = torch.view_as_complex(x.unflatten(-1, (D // 2, 2)).contiguous())
    turned = pairs * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2)


def window_attention(q, k, v, window):
    """Attention of each query to itself and the window - 1 tokens before it (Jiang et al., 2023, section 2).

    q (B, H, T, D), k, v (B, K, T, D) -> (B, H, T, D): H / K query heads share a head of keys and values.
    """
    B, H, T, D = q.shape
    share = H // k.shape[1]
    y = []
    for head in range(H):
        for query in range(T):
            first = max(0, query - window + 1)
            keys = k[:, head // share, first : query + 1]  # (B, window, D)
            values = v[:, head // share, first : query + 1]
            scores = (keys * q[:, head, query, None]).sum(-1) / math.sqrt(D)  # (B, window)
            exps = scores.exp()
            weights = exps / exps.sum(-1, keepdim=True)
            y.append((weights[..., None] * values).sum(1))  # (B, D)
    return torch.stack(y, dim=1).view(B, H, T, D)


# ==========================================================================
# DeepSeek-V3: equations of its report


def experts_by_loop(x, gate, up, proj, chosen, weights):
    """The routed experts of eq. 12, each a SwiGLU MLP (Shazeer, 2020, eq. 6), one after the other.

    x (N, C), gate and up (E, W, C), proj (E, C, W), chosen and weights (N, K) -> (N, C).
    """
    y = torch.zeros_like(x)
    for expert in range(len(gate)):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        rows = x[token]
        h = F.silu(rows @ gate[expert].T) * (rows @ up[expert].T)
        out = h @ proj[expert].T
        y = y.index_add(0, token, weights[token, place, None] * out)
    return y


def balance_loss(scores, alpha, n_active):
    """Eq. 17-20 with their sums written out: scores (T, E) of one sequence -> scalar."""
    T, E = scores.shape
    loss = 0.0
    for i in range(E):
        f = 0.0
        p = 0.0
        for t in range(T):
            if i in scores[t].topk(n_active).indices.tolist():
                f = f + E / (n_active * T)
            p = p + scores[t, i] / scores[t].sum() / T
        loss = loss + alpha * f * p
    return loss


# ==========================================================================
# RWKV-7


def recurrence_by_token(r, log_w, k, v, a, b, state):
    """The recurrence of section 4.1; r, log_w, k, v, a, b (B, T, H, D), state (B, H, D, D).

        S_t = diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
        y_t = S_t^T r_t

    S is the paper's matrix transposed: keys are rows, values columns. Returns y (B, T, H, D) and S_T.
    """
    y = []
    # unbind, since the backward pass of indexing by t would take time quadratic in T
    tokens = zip(r.unbind(1), log_w.unbind(1), k.unbind(1), v.unbind(1), a.unbind(1), b.unbind(1))
    for r_t, log_w_t, k_t, v_t, a_t, b_t in tokens:
        read = torch.einsum("bhk,bhkv->bhv", a_t, state)
        state = log_w_t.exp()[..., None] * state
        state = state + torch.einsum("bhk,bhv->bhkv", b_t, read)
        state = state + torch.einsum("bhk,bhv->bhkv", k_t, v_t)
        y.append(torch.einsum("bhk,bhkv->bhv", r_t, state))
    return torch.stack(y, dim=1), state


def shift(x):
    """Each token's x is the one's before it: (B, T, C) -> (B, T, C)."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)


def rwkv_attention(x, v_first, w, n_head):
    """RWKV_Tmix_x070: x (B, T, C), the first layer's values (None in it), w {name: tensor} -> y, values."""
    B, T, C = x.shape
    heads = (B, T, n_head, C // n_head)
    xx = shift(x) - x
    xr = x + xx * w["x_r"]
    xw = x + xx * w["x_w"]
    xk = x + xx * w["x_k"]
    xv = x + xx * w["x_v"]
    xa = x + xx * w["x_a"]
    xg = x + xx * w["x_g"]
    r = xr @ w["receptance.weight"].T
    log_log_w = -F.softplus(-(w["w0"] + torch.tanh(xw @ w["w1"]) @ w["w2"])) - 0.5
    k = xk @ w["key.weight"].T
    v = xv @ w["value.weight"].T
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(w["v0"] + xv @ w["v1"] @ w["v2"])
    a = torch.sigmoid(w["a0"] + xa @ w["a1"] @ w["a2"])
    g = torch.sigmoid(xg @ w["g1"]) @ w["g2"]
    kk = F.normalize((k * w["k_k"]).view(heads), dim=-1)
    k = k * (1 + (a - 1) * w["k_a"])
    r = r.view(heads)
    k = k.view(heads)
    v_heads = v.view(heads)
    a = a.view(heads)
    log_w = -log_log_w.exp().view(heads)
    state = x.new_zeros(B, n_head, C // n_head, C // n_head)
    y, _ = recurrence_by_token(r, log_w, k, v_heads, -kk, kk * a, state)
    variance, mean = torch.var_mean(y, dim=-1, keepdim=True, correction=0)
    y = (y - mean) / (variance + 64e-5).sqrt()  # GroupNorm with a group for each head
    y = y.flatten(2) * w["ln_x.weight"] + w["ln_x.bias"]
    bonus = (r * k * w["r_k"]).sum(-1, keepdim=True) * v_heads
    y = y + bonus.flatten(2)
    return (y * g) @ w["output.weight"].T, v_first


def rwkv_logits(w, idx, n_layer, n_head):
    """Logits (B, T, V) of idx (B, T) by RWKV-LM's forward pass; w {name: tensor} in its official names."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)

    x = norm(w["emb.weight"][idx], "blocks.0.ln0")
    v_first = None
    for layer in range(n_layer):
        block = f"blocks.{layer}"
        h = norm(x, f"{block}.ln1")
        y, v_first = rwkv_attention(h, v_first, below(w, f"{block}.att."), n_head)
        x = x + y
        h = norm(x, f"{block}.ln2")
        k = h + (shift(h) - h) * w[f"{block}.ffn.x_k"]
        k = torch.relu(k @ w[f"{block}.ffn.key.weight"].T) ** 2
        x = x + k @ w[f"{block}.ffn.value.weight"].T
    return norm(x, "ln_out") @ w["head.weight"].T


# ==========================================================================
# MTA: one sequence at a time, in fp64; sections of its paper


def rms_norm(x, weight):
    """Zhang and Sennrich, 2019, eq. 4: (..., C) -> (..., C)."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def convolve_maps(maps, kernel):
    """Section 3.1, cell by cell of the kernel: maps (H, R, U), kernel (H, Q, K) -> (H, R, U).

        out[i, j] = sum over a < Q, c < K of kernel[a, c] maps[i - (Q - 1) + a, j - K // 2 + c]

    with zeros outside of the map.
    """
    R, U = maps.shape[1:]
    Q, K = kernel.shape[1:]
    i = torch.arange(R)[:, None]
    j = torch.arange(U)[None, :]
    out = torch.zeros_like(maps)
    for a in range(Q):
        for c in range(K):
            query = i - (Q - 1) + a
            key = j - K // 2 + c
            inside = (query >= 0) & (key >= 0) & (key < U)
            moved = maps[:, query.clamp(0, R - 1), key.clamp(0, U - 1)] * inside
            out = out + kernel[:, a, c, None, None] * moved
    return out


def mta_attention(x, w, n_head, theta):
    """The released code's attention: x (T, C), w {name: tensor} -> (T, C).

    Blocks without convolutions have no conv_before and conv_after. The weights that mix heads are
    (out, in) before the softmax and (in, out) after it.
    """
    T, C = x.shape
    q = (x @ w["q.weight"].T).view(T, n_head, -1).transpose(0, 1)  # (H, T, D)
    k = (x @ w["k.weight"].T).view(T, n_head, -1).transpose(0, 1)
    v = (x @ w["v.weight"].T).view(T, n_head, -1).transpose(0, 1)
    q = rotate_neighbours(q, theta)
    k = rotate_neighbours(k, theta)
    maps = q @ k.transpose(1, 2) / math.sqrt(C // n_head)  # (H, T, T)
    sees = torch.ones(T, T, dtype=torch.bool).tril()
    if "conv_before" in w:
        maps = convolve_maps(maps * sees, w["conv_before"])
    maps = torch.einsum("gh,hij->gij", w["mix_before"], maps)
    maps = maps.exp() * sees
    maps = maps / maps.sum(-1, keepdim=True)
    if "conv_after" in w:
        maps = convolve_maps(maps, w["conv_after"]) * sees
    maps = torch.einsum("hg,hij->gij", w["mix_after"], maps)
    y = rms_norm(maps @ v, w["norm.weight"])  # (H, T, D)
    y = y * torch.sigmoid(y @ w["gate.weight"].T + w["gate.bias"])
    return y.transpose(0, 1).flatten(1) @ w["proj.weight"].T


def mta_logits(w, idx, n_layer, n_head, theta):
    """Logits (B, T, V) of idx (B, T) by weights w {name: tensor}, in train_mta.py's names."""
    logits = []
    for row in idx:
        x = w["wte.weight"][row]  # (T, C)
        for layer in range(n_layer):
            block = below(w, f"blocks.{layer}.")
            y = rms_norm(x, block["norm1.weight"])
            x = x + mta_attention(y, below(block, "attention."), n_head, theta)
            y = rms_norm(x, block["norm2.weight"])
            h = F.silu(y @ block["mlp.gate.weight"].T) * (y @ block["mlp.up.weight"].T)
            x = x + h @ block["mlp.proj.weight"].T
        logits.append(rms_norm(x, w["norm.weight"]) @ w["wte.weight"].T)
    return torch.stack(logits)
