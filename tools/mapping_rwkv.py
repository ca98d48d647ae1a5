"""train_rwkv.py's weights under the names of the official RWKV-7 files, which the package rwkv loads."""
import torch

BLOCK = {"norm1": "ln1", "norm2": "ln2", "attention.head_norm": "att.ln_x", "attention": "att", "mlp": "ffn"}


def to_official(state_dict, config):
    """train_rwkv.py's state dict -> that of an official .pth, for RWKV-LM's training code and the package rwkv.

    There head and embedding are two matrices, vectors have shape (1, 1, C), ln0 belongs to the first block, and
    that block has matrices of a value residual that nothing uses: here they are zeros.
    """
    out = {"emb.weight": state_dict["wte.weight"], "head.weight": state_dict["wte.weight"].clone()}
    for kind in ("weight", "bias"):
        out[f"blocks.0.ln0.{kind}"] = state_dict[f"norm0.{kind}"]
        out[f"ln_out.{kind}"] = state_dict[f"norm.{kind}"]
    for name, tensor in state_dict.items():
        if not name.startswith("blocks."):
            continue
        _, layer, part = name.split(".", 2)
        ours = next(prefix for prefix in BLOCK if part.startswith(prefix + "."))
        block, leaf = f"blocks.{layer}.{BLOCK[ours]}.", part.removeprefix(ours + ".")
        if part == "attention.mix":
            out |= {f"{block}x_{letter}": row[None, None] for letter, row in zip("rwkvag", tensor)}
        elif part == "mlp.mix":
            out[f"{block}x_k"] = tensor[None, None]
        elif leaf in ("w0", "a0", "v0", "k_k", "k_a"):
            out[block + leaf] = tensor[None, None]
        else:
            out[block + leaf] = tensor
    for leaf, shape in (("v0", (1, 1, config.n_embd)), ("v1", (config.n_embd, config.rank_v)),
                        ("v2", (config.rank_v, config.n_embd))):  # fmt: skip
        out[f"blocks.0.att.{leaf}"] = torch.zeros(shape, dtype=out["emb.weight"].dtype)
    return {name: tensor.contiguous().clone() for name, tensor in out.items()}  # no two share memory in the file
