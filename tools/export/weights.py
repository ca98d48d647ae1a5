"""
The scripts' weights under other libraries' names, and back.

name is a key of HF_CLASSES. transformers' DeepSeek-V3 has no MTP block: to_hf leaves it out, and
from_hf gives the state dict of a Model with mtp_depth "0".
"""
import torch

HF_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma": "Gemma3ForCausalLM",
    "deepseek": "DeepseekV3ForCausalLM",
}

# ==========================================================================
# Names of modules: transformers' on the left, ours on the right. One of theirs may hold several of ours.

LLAMA_OUTSIDE = {"model.embed_tokens": "wte", "model.norm": "norm"}
GPT2_OUTSIDE = {"transformer.wte": "wte", "transformer.wpe": "wpe", "transformer.ln_f": "norm"}
GPT2_BLOCK = {
    "ln_1": "norm1", "attn.c_attn": "attention.q attention.k attention.v", "attn.c_proj": "attention.proj",
    "ln_2": "norm2", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.proj",
}  # fmt: skip
NORMS = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
MLP = {"mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.proj"}
ATTENTION = {
    "self_attn.q_proj": "attention.q", "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v", "self_attn.o_proj": "attention.proj",
}  # fmt: skip
LLAMA_BLOCK = NORMS | ATTENTION | MLP
GEMMA_BLOCK = LLAMA_BLOCK | {
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    # this name's norm stands before the MLP in LLaMA, but after the attention in Gemma
    "post_attention_layernorm": "post_norm1",
    "pre_feedforward_layernorm": "norm2",
    "post_feedforward_layernorm": "post_norm2",
}
LATENT_ATTENTION = {
    "self_attn.q_a_proj": "attention.q_a", "self_attn.q_a_layernorm": "attention.q_norm",
    "self_attn.q_b_proj": "attention.q_b", "self_attn.kv_a_proj_with_mqa": "attention.kv_a",
    "self_attn.kv_a_layernorm": "attention.kv_norm", "self_attn.kv_b_proj": "attention.kv_b",
    "self_attn.o_proj": "attention.proj",
}  # fmt: skip
MIXTURE = {
    "mlp.shared_experts.gate_proj": "mlp.shared.gate", "mlp.shared_experts.up_proj": "mlp.shared.up",
    "mlp.shared_experts.down_proj": "mlp.shared.proj", "mlp.gate": "mlp.router",
}  # fmt: skip
EXPERTS = {  # names of tensors
    "mlp.gate.e_score_correction_bias": "mlp.router.bias",  # state, but no parameter
    "mlp.experts.gate_up_proj": "mlp.experts.gate mlp.experts.up",
    "mlp.experts.down_proj": "mlp.experts.proj",
}


def tensors_of(modules, leaves):
    """{transformers' name: our names} of the tensors of modules."""
    names = {}
    for theirs, ours in modules.items():
        for leaf in leaves:
            names[f"{theirs}.{leaf}"] = [f"{part}.{leaf}" for part in ours.split()]
    return names


def block_names(name, config, layer):
    """{transformers' name: our names} of the tensors of a block."""
    if name == "gpt2":
        return tensors_of(GPT2_BLOCK, ["weight", "bias"])
    if name != "deepseek":
        return tensors_of(GEMMA_BLOCK if name == "gemma" else LLAMA_BLOCK, ["weight"])
    if layer < config.n_dense:
        return tensors_of(NORMS | LATENT_ATTENTION | MLP, ["weight"])
    experts = {theirs: ours.split() for theirs, ours in EXPERTS.items()}
    return tensors_of(NORMS | LATENT_ATTENTION | MIXTURE, ["weight"]) | experts


def tensor_names(name, config):
    """{transformers' name: our names} of all tensors but the head, which is the embedding."""
    if name == "gpt2":
        layers = "transformer.h"
        names = tensors_of(GPT2_OUTSIDE, ["weight"]) | {"transformer.ln_f.bias": ["norm.bias"]}
    else:
        layers = "model.layers"
        names = tensors_of(LLAMA_OUTSIDE, ["weight"])
    for layer in range(config.n_layer):
        for theirs, ours in block_names(name, config, layer).items():
            names[f"{layers}.{layer}.{theirs}"] = [f"blocks.{layer}.{part}" for part in ours]
    return names


# ==========================================================================
# Tensors


def interleaved(size):
    """Our channels of a rotary head in the order of DeepSeek's released code.

    We rotate channel i with channel i + size / 2, DeepSeek 2i with 2i + 1: 0, size / 2, 1, size / 2 + 1, …
    """
    return torch.arange(size).view(2, -1).T.flatten()


def order_of_rows(name, theirs, config):
    """The order of our rows in their tensor, for DeepSeek's two matrices that make rotary channels."""
    if name != "deepseek":
        return None
    channels = interleaved(config.rope_dim)
    if theirs.endswith("kv_a_proj_with_mqa.weight"):
        return torch.cat((torch.arange(config.kv_rank), config.kv_rank + channels))
    if theirs.endswith("q_b_proj.weight"):
        in_head = torch.cat((torch.arange(config.nope_dim), config.nope_dim + channels))
        heads = torch.arange(config.n_head)[:, None] * len(in_head)
        return (heads + in_head).flatten()
    return None


def is_conv1d(theirs):
    """Whether it is one of GPT-2's matrices, which are the transposed ones of nn.Linear there."""
    return ".c_" in theirs and theirs.endswith("weight")


def to_hf(name, state_dict, config):
    """A script's state dict -> that of transformers' HF_CLASSES[name]."""
    out = {"lm_head.weight": state_dict["wte.weight"]}
    for theirs, ours in tensor_names(name, config).items():
        dim = 1 if theirs.endswith("gate_up_proj") else 0  # (E, 2W, C): of each expert gate, then up
        tensor = torch.cat([state_dict[part] for part in ours], dim)
        if is_conv1d(theirs):
            tensor = tensor.T.contiguous()
        order = order_of_rows(name, theirs, config)
        out[theirs] = tensor if order is None else tensor[order]
    return out


def from_hf(name, state_dict, config):
    """The state dict of transformers' HF_CLASSES[name] -> the script's."""
    out = {}
    for theirs, ours in tensor_names(name, config).items():
        tensor = state_dict[theirs]
        order = order_of_rows(name, theirs, config)
        if order is not None:
            tensor = tensor[order.argsort()]
        if is_conv1d(theirs):
            tensor = tensor.T
        parts = tensor.chunk(len(ours), dim=1 if theirs.endswith("gate_up_proj") else 0)
        out |= {part: tensor.contiguous() for part, tensor in zip(ours, parts)}
    return out


# ==========================================================================
# Configurations: transformers' fields on the left

LLAMA_SIZES = {
    "vocab_size": "vocab_size", "max_position_embeddings": "block_size", "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd", "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
    "intermediate_size": "n_inner",
}  # fmt: skip
GPT2_SIZES = {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
GEMMA_SIZES = {"sliding_window": "window", "head_dim": "head_dim", "query_pre_attn_scalar": "head_dim"}
DEEPSEEK_SIZES = {
    "num_key_value_heads": "n_head", "q_lora_rank": "q_rank", "kv_lora_rank": "kv_rank",
    "qk_nope_head_dim": "nope_dim", "qk_rope_head_dim": "rope_dim", "v_head_dim": "v_dim",
    "first_k_dense_replace": "n_dense", "n_routed_experts": "n_expert", "num_experts_per_tok": "n_active",
    "n_shared_experts": "n_shared", "n_group": "n_group", "topk_group": "topk_group",
    "moe_intermediate_size": "n_inner_expert", "routed_scaling_factor": "route_scale",
}  # fmt: skip
SIZES = {  # the field of Config that each is
    "gpt2": GPT2_SIZES | {"n_positions": "block_size"},
    "llama": LLAMA_SIZES,
    "mistral": LLAMA_SIZES | {"sliding_window": "window"},
    "gemma": LLAMA_SIZES | GEMMA_SIZES,
    "deepseek": LLAMA_SIZES | DEEPSEEK_SIZES,
}
LLAMA_FIXED = {"rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
FIXED = {  # what the scripts have no field for
    "gpt2": {
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "llama": LLAMA_FIXED,
    "mistral": LLAMA_FIXED,
    "gemma": {
        "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False, "attention_dropout": 0.0,
    },
    "deepseek": LLAMA_FIXED | {
        "rms_norm_eps": 1e-6, "norm_topk_prob": True, "rope_interleave": True, "num_nextn_predict_layers": 0,
    },
}  # fmt: skip


def computed_fields(name, config):
    """The fields of transformers' configuration that a table can't say."""
    if name == "gpt2":
        return {}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if name != "gemma":
        return {"rope_parameters": rope}
    kinds = ["sliding_attention"] * config.n_layer
    for layer in range(config.global_every - 1, config.n_layer, config.global_every):
        kinds[layer] = "full_attention"
    ropes = {"full_attention": rope, "sliding_attention": rope | {"rope_theta": config.rope_theta_local}}
    return {"layer_types": kinds, "rope_parameters": ropes}


def older_fields(name, config):
    """What transformers 4, llama.cpp and CTranslate2 read in config.json and version 5 leaves out."""
    if name == "gpt2":
        return {"n_ctx": config.block_size}
    fields = {"rope_theta": config.rope_theta}
    if name == "gemma":
        fields["rope_local_base_freq"] = config.rope_theta_local
        fields["sliding_window_pattern"] = config.global_every
    if name == "deepseek":
        fields |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    return fields


def hf_config(name, config, end=None):
    """transformers' configuration object of architecture name for a script's Config."""
    import transformers

    if end is None:  # the last token of our vocabularies, GPT-2's and that of bytes
        end = min(50_256, config.vocab_size - 1)
    fields = {"tie_word_embeddings": True, "bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    for theirs, ours in SIZES[name].items():
        fields[theirs] = getattr(config, ours)
    fields |= FIXED[name] | computed_fields(name, config)
    return getattr(transformers, HF_CLASSES[name]).config_class(**fields)


def hf_model(name, config, end=None):
    """transformers' model of architecture name for a script's Config, with weights of its own.

    end: the token that ends a text.
    """
    import transformers

    return getattr(transformers, HF_CLASSES[name])(hf_config(name, config, end))


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


# ==========================================================================
# RWKV-7: the authors' names

RWKV_NAMES = {  # replaced in this order
    "norm0.": "blocks.0.ln0.", "norm1.": "ln1.", "norm2.": "ln2.", "attention.head_norm.": "att.ln_x.",
    "norm.": "ln_out.", "wte.": "emb.", "attention.proj.": "att.output.", "attention.": "att.",
    "mlp.up.": "ffn.key.", "mlp.proj.": "ffn.value.", "mlp.mix": "ffn.x_k",
}  # fmt: skip
RWKV_VECTORS = ("w0", "a0", "v0", "k_k", "k_a", "x_k")  # have shape (1, 1, C) there


def to_official_rwkv(state_dict, config):
    """train_rwkv.py's state dict -> that of an official .pth, as RWKV-LM and the package rwkv read it.

    There head and embedding are two matrices, the first norm belongs to the first block, and that block
    has matrices of a value residual that nothing uses: here they are zeros.
    """
    out = {"head.weight": state_dict["wte.weight"]}
    for name, tensor in state_dict.items():
        for ours, theirs in RWKV_NAMES.items():
            name = name.replace(ours, theirs)
        if name.endswith("att.mix"):
            for letter, row in zip("rwkvag", tensor):
                out[name.replace("mix", f"x_{letter}")] = row[None, None]
        elif name.endswith(RWKV_VECTORS):
            out[name] = tensor[None, None]
        else:
            out[name] = tensor
    C, R = config.n_embd, config.rank_v
    for leaf, shape in (("v0", (1, 1, C)), ("v1", (C, R)), ("v2", (R, C))):
        out[f"blocks.0.att.{leaf}"] = torch.zeros(shape)
    # clones: tensors that share memory would be written as one
    return {name: tensor.contiguous().clone() for name, tensor in out.items()}
