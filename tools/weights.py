"""
The scripts' weights under other libraries' names, and back.

    hf_config(name, config)            transformers' configuration for a script's Config
    hf_model(name, config)             transformers' model of that shape, with random weights
    to_hf(name, state_dict, config)    a script's state dict -> that of transformers' class
    from_hf(name, state_dict, config)  and back: the same tensors, bit for bit
    to_official_rwkv(state_dict, config)  train_rwkv.py's state dict -> the authors' .pth

name is a key of HF_CLASSES. transformers' DeepSeek-V3 has no MTP block: to_hf leaves it out, and
from_hf gives the state dict of a Model with mtp_depth "0" at optimizer step 0.
"""
import dataclasses

import torch

HF_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma": "Gemma3ForCausalLM",
    "deepseek": "DeepseekV3ForCausalLM",
}

# ==========================================================================================================
# Names of tensors: transformers' on the left, ours on the right. One of theirs may hold several of ours.

LLAMA_OUTSIDE = {"model.embed_tokens.weight": "wte.weight", "model.norm.weight": "norm.weight"}
OUTSIDE = {
    "gpt2": {
        "transformer.wte.weight": "wte.weight",
        "transformer.wpe.weight": "wpe.weight",
        "transformer.ln_f.weight": "norm.weight",
        "transformer.ln_f.bias": "norm.bias",
    },
    "llama": LLAMA_OUTSIDE,
    "mistral": LLAMA_OUTSIDE,
    "gemma": LLAMA_OUTSIDE,
    "deepseek": LLAMA_OUTSIDE,
}

GPT2_BLOCK = {
    "ln_1.weight": "norm1.weight",
    "ln_1.bias": "norm1.bias",
    "attn.c_attn.weight": "attention.q.weight attention.k.weight attention.v.weight",
    "attn.c_attn.bias": "attention.q.bias attention.k.bias attention.v.bias",
    "attn.c_proj.weight": "attention.proj.weight",
    "attn.c_proj.bias": "attention.proj.bias",
    "ln_2.weight": "norm2.weight",
    "ln_2.bias": "norm2.bias",
    "mlp.c_fc.weight": "mlp.up.weight",
    "mlp.c_fc.bias": "mlp.up.bias",
    "mlp.c_proj.weight": "mlp.proj.weight",
    "mlp.c_proj.bias": "mlp.proj.bias",
}
NORMS = {"input_layernorm.weight": "norm1.weight", "post_attention_layernorm.weight": "norm2.weight"}
MLP = {
    "mlp.gate_proj.weight": "mlp.gate.weight",
    "mlp.up_proj.weight": "mlp.up.weight",
    "mlp.down_proj.weight": "mlp.proj.weight",
}
ATTENTION = {
    "self_attn.q_proj.weight": "attention.q.weight",
    "self_attn.k_proj.weight": "attention.k.weight",
    "self_attn.v_proj.weight": "attention.v.weight",
    "self_attn.o_proj.weight": "attention.proj.weight",
}
LLAMA_BLOCK = NORMS | ATTENTION | MLP
GEMMA_BLOCK = LLAMA_BLOCK | {
    "self_attn.q_norm.weight": "attention.q_norm.weight",
    "self_attn.k_norm.weight": "attention.k_norm.weight",
    # this name's norm stands before the MLP in LLaMA, but after the attention in Gemma
    "post_attention_layernorm.weight": "post_norm1.weight",
    "pre_feedforward_layernorm.weight": "norm2.weight",
    "post_feedforward_layernorm.weight": "post_norm2.weight",
}
LATENT_ATTENTION = {
    "self_attn.q_a_proj.weight": "attention.q_a.weight",
    "self_attn.q_a_layernorm.weight": "attention.q_norm.weight",
    "self_attn.q_b_proj.weight": "attention.q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attention.kv_a.weight",
    "self_attn.kv_a_layernorm.weight": "attention.kv_norm.weight",
    "self_attn.kv_b_proj.weight": "attention.kv_b.weight",
    "self_attn.o_proj.weight": "attention.proj.weight",
}
MIXTURE = {
    "mlp.shared_experts.gate_proj.weight": "mlp.shared.gate.weight",
    "mlp.shared_experts.up_proj.weight": "mlp.shared.up.weight",
    "mlp.shared_experts.down_proj.weight": "mlp.shared.proj.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.e_score_correction_bias": "mlp.router.bias",  # state, but no parameter
    "mlp.experts.gate_up_proj": "mlp.experts.gate mlp.experts.up",
    "mlp.experts.down_proj": "mlp.experts.proj",
}
BLOCKS = {"gpt2": GPT2_BLOCK, "llama": LLAMA_BLOCK, "mistral": LLAMA_BLOCK, "gemma": GEMMA_BLOCK}


def block_names(name, config, layer):
    """{transformers' name: our names} of the tensors of a block."""
    if name != "deepseek":
        return BLOCKS[name]
    return NORMS | LATENT_ATTENTION | (MLP if layer < config.n_dense else MIXTURE)


# ==========================================================================================================
# Tensors


@dataclasses.dataclass
class Pair:
    """A tensor of transformers' model and those of ours that it is made of.

    It is ours joined along dim, transposed if asked for, its rows in the order of rows, if any.
    """

    theirs: str
    ours: list
    dim: int = 0
    transposed: bool = False
    rows: torch.Tensor | None = None

    def join(self, parts):
        """Our tensors -> theirs."""
        tensor = torch.cat(parts, self.dim) if len(parts) > 1 else parts[0]
        if self.transposed:
            tensor = tensor.T.contiguous()
        if self.rows is not None:
            tensor = tensor[self.rows]
        return tensor

    def split(self, tensor):
        """Their tensor -> ours, the inverse of join."""
        if self.rows is not None:
            tensor = tensor[self.rows.argsort()]
        if self.transposed:
            tensor = tensor.T
        return [part.contiguous() for part in tensor.chunk(len(self.ours), self.dim)]


def interleaved(size):
    """Our channels of a rotary head in the order of DeepSeek's released code.

    We rotate channel i with channel i + size / 2, DeepSeek 2i with 2i + 1: 0, size / 2, 1, size / 2 + 1, …
    """
    return torch.arange(size).view(2, -1).T.flatten()


def rope_rows(config):
    """{transformers' name: the order of its rows} of DeepSeek's two matrices that make rotary channels."""
    head = config.nope_dim + config.rope_dim
    channels = interleaved(config.rope_dim)
    in_head = torch.cat((torch.arange(config.nope_dim), config.nope_dim + channels))
    heads = torch.arange(config.n_head)[:, None] * head
    latent = torch.arange(config.kv_rank)
    return {
        "self_attn.q_b_proj.weight": (heads + in_head).flatten(),
        "self_attn.kv_a_proj_with_mqa.weight": torch.cat((latent, config.kv_rank + channels)),
    }


def pairs(name, config):
    """A Pair for each tensor of transformers' model, but for the head, which is the embedding."""
    rows = rope_rows(config) if name == "deepseek" else {}
    layers = "transformer.h" if name == "gpt2" else "model.layers"
    for theirs, ours in OUTSIDE[name].items():
        yield Pair(theirs, [ours])
    for layer in range(config.n_layer):
        for theirs, ours in block_names(name, config, layer).items():
            yield Pair(
                f"{layers}.{layer}.{theirs}",
                [f"blocks.{layer}.{part}" for part in ours.split()],
                dim=1 if theirs.endswith("gate_up_proj") else 0,  # (E, 2W, C): of each expert gate, then up
                transposed=".c_" in theirs and theirs.endswith("weight"),  # GPT-2's layers there are Conv1D
                rows=rows.get(theirs),
            )


def to_hf(name, state_dict, config):
    """A script's state dict -> that of transformers' HF_CLASSES[name]."""
    out = {"lm_head.weight": state_dict["wte.weight"]}
    for pair in pairs(name, config):
        out[pair.theirs] = pair.join([state_dict[ours] for ours in pair.ours])
    return out


def from_hf(name, state_dict, config):
    """The state dict of transformers' HF_CLASSES[name] -> the script's."""
    out = {}
    for pair in pairs(name, config):
        out |= zip(pair.ours, pair.split(state_dict[pair.theirs]))
    if name == "deepseek":
        out["step"] = torch.zeros((), dtype=torch.int64)
    return out


# ==========================================================================================================
# Configurations: transformers' fields on the left

LLAMA_SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "block_size",
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "intermediate_size": "n_inner",
}
SIZES = {  # the field of Config that each is
    "gpt2": {
        "vocab_size": "vocab_size",
        "n_positions": "block_size",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
    },
    "llama": LLAMA_SIZES,
    "mistral": LLAMA_SIZES | {"sliding_window": "window"},
    "gemma": LLAMA_SIZES | {
        "sliding_window": "window",
        "head_dim": "head_dim",
        "query_pre_attn_scalar": "head_dim",
    },
    "deepseek": LLAMA_SIZES | {
        "num_key_value_heads": "n_head",
        "q_lora_rank": "q_rank",
        "kv_lora_rank": "kv_rank",
        "qk_nope_head_dim": "nope_dim",
        "qk_rope_head_dim": "rope_dim",
        "v_head_dim": "v_dim",
        "first_k_dense_replace": "n_dense",
        "n_routed_experts": "n_expert",
        "num_experts_per_tok": "n_active",
        "n_shared_experts": "n_shared",
        "n_group": "n_group",
        "topk_group": "topk_group",
        "moe_intermediate_size": "n_inner_expert",
        "routed_scaling_factor": "route_scale",
    },
}  # fmt: skip
LLAMA_FIXED = {"rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
FIXED = {  # what the scripts have no field for
    "gpt2": {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": LLAMA_FIXED,
    "mistral": LLAMA_FIXED,
    "gemma": {
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
    },
    "deepseek": LLAMA_FIXED | {
        "rms_norm_eps": 1e-6,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    },
}  # fmt: skip
CONFIG_CLASSES = {
    "gpt2": "GPT2Config",
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "gemma": "Gemma3TextConfig",
    "deepseek": "DeepseekV3Config",
}

# fields of transformers' configurations that change what a model computes: they must be as hf_config() says
MEANT_BY_CONFIG = {
    "activation_function",
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "layer_norm_epsilon",
    "layer_types",
    "mlp_bias",
    "num_key_value_heads",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rope_parameters",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
    "sliding_window",
    "tie_word_embeddings",
    "use_bidirectional_attention",
}


def rope(theta):
    return {"rope_type": "default", "rope_theta": theta}


def computed_fields(name, config):
    """The fields of transformers' configuration that a table can't say."""
    if name == "gpt2":
        return {}
    if name == "gemma":
        kinds = ["sliding_attention"] * config.n_layer
        for layer in range(config.global_every - 1, config.n_layer, config.global_every):
            kinds[layer] = "full_attention"
        ropes = {
            "full_attention": rope(config.rope_theta),
            "sliding_attention": rope(config.rope_theta_local),
        }
        return {"layer_types": kinds, "rope_parameters": ropes}
    fields = {"rope_parameters": rope(config.rope_theta)}
    if name == "deepseek":
        fields["initializer_range"] = 0.006 * (7168 / config.n_embd) ** 0.5  # as in Model.init_weights
    return fields


def hf_config(name, config):
    """transformers' configuration object of architecture name for a script's Config."""
    import transformers

    # the end of text is the last token of both vocabularies, GPT-2's and that of bytes
    end = min(50_256, config.vocab_size - 1)
    fields = {"tie_word_embeddings": True, "bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    for theirs, ours in SIZES[name].items():
        fields[theirs] = getattr(config, ours)
    fields |= FIXED[name] | computed_fields(name, config)
    return getattr(transformers, CONFIG_CLASSES[name])(**fields)


def hf_model(name, config):
    """transformers' model of architecture name for a script's Config, with weights of its own."""
    import transformers

    return getattr(transformers, HF_CLASSES[name])(hf_config(name, config))


def our_config(name, theirs, Config):
    """The script's Config for transformers' configuration object of architecture name."""
    fields = {ours: getattr(theirs, field) for field, ours in SIZES[name].items()}
    if name == "mistral" and fields["window"] is None:
        fields["window"] = theirs.max_position_embeddings  # no window is one over all positions
    if name == "gemma":
        ropes = theirs.rope_parameters
        fields["rope_theta"] = ropes["full_attention"]["rope_theta"]
        fields["rope_theta_local"] = ropes["sliding_attention"]["rope_theta"]
        kinds = [*theirs.layer_types, "full_attention"]
        fields["global_every"] = kinds.index("full_attention") + 1
    elif name != "gpt2":
        fields["rope_theta"] = theirs.rope_parameters["rope_theta"]
    return Config(**fields)


# ==========================================================================================================
# RWKV-7: the authors' names

RWKV_OUTSIDE = {"norm0": "blocks.0.ln0", "norm": "ln_out", "wte": "emb"}
RWKV_BLOCK = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attention.head_norm": "att.ln_x",
    "attention.proj": "att.output",
    "attention": "att",
    "mlp.up": "ffn.key",
    "mlp.proj": "ffn.value",
}
RWKV_VECTORS = ("w0", "a0", "v0", "k_k", "k_a")  # have shape (1, 1, C) there


def to_official_rwkv(state_dict, config):
    """train_rwkv.py's state dict -> that of an official .pth, as RWKV-LM and the package rwkv read it.

    There head and embedding are two matrices, the first norm belongs to the first block, and that block
    has matrices of a value residual that nothing uses: here they are zeros.
    """
    out = {"head.weight": state_dict["wte.weight"]}
    for name, tensor in state_dict.items():
        if not name.startswith("blocks."):
            module, leaf = name.rsplit(".", 1)
            out[f"{RWKV_OUTSIDE[module]}.{leaf}"] = tensor
            continue
        _, layer, part = name.split(".", 2)
        block = f"blocks.{layer}"
        module, leaf = part.rsplit(".", 1)
        if part == "attention.mix":
            for letter, row in zip("rwkvag", tensor):
                out[f"{block}.att.x_{letter}"] = row[None, None]
        elif part == "mlp.mix":
            out[f"{block}.ffn.x_k"] = tensor[None, None]
        elif leaf in RWKV_VECTORS:
            out[f"{block}.att.{leaf}"] = tensor[None, None]
        elif module in RWKV_BLOCK:
            out[f"{block}.{RWKV_BLOCK[module]}.{leaf}"] = tensor
        else:  # attention.receptance, attention.key and attention.value
            out[f"{block}.att.{module.removeprefix('attention.')}.{leaf}"] = tensor
    unused = {
        "v0": (1, 1, config.n_embd),
        "v1": (config.n_embd, config.rank_v),
        "v2": (config.rank_v, config.n_embd),
    }
    for leaf, shape in unused.items():
        out[f"blocks.0.att.{leaf}"] = state_dict["wte.weight"].new_zeros(shape)
    # clones: tensors that share memory would be written as one
    return {name: tensor.contiguous().clone() for name, tensor in out.items()}
