"""
The scripts' weights under transformers' names, and back.

For each architecture NAME: hf_config(NAME, config) is transformers' configuration object for a script's Config,
to_hf_NAME(state_dict, config) a state dict that transformers' class loads strictly, from_hf_NAME its inverse.
The scripts hold the matrices of queries, keys and values in one; all but GPT-2 in transformers hold three.
DeepSeek's and RWKV-7's are long and have files of their own.
"""
from tools.mapping_deepseek import from_hf_deepseek, hf_config_deepseek, to_hf_deepseek  # noqa: F401
from tools.mapping_rwkv import to_official as to_official_rwkv  # noqa: F401


def hf_config(name, config):
    """transformers' configuration object of architecture name, for a script's Config."""
    import transformers

    # the end of text is the last token of both tokenizers, that of GPT-2 and that of the offline sample
    end = min(50_256, config.vocab_size - 1)
    common = dict(vocab_size=config.vocab_size, tie_word_embeddings=True, bos_token_id=end, eos_token_id=end,
                  pad_token_id=None)  # fmt: skip
    if name == "deepseek":
        return hf_config_deepseek(config)
    if name == "gpt2":
        return transformers.GPT2Config(
            **common, n_positions=config.block_size, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
            activation_function="gelu_new", layer_norm_epsilon=1e-5, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    common |= dict(
        max_position_embeddings=config.block_size, num_hidden_layers=config.n_layer, hidden_size=config.n_embd,
        num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head, intermediate_size=config.n_inner,
        attention_bias=False, attention_dropout=0.0, initializer_range=0.02,
    )  # fmt: skip
    if name == "llama":
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        return transformers.LlamaConfig(**common, rms_norm_eps=1e-5, rope_parameters=rope, hidden_act="silu")
    if name == "mistral":
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        return transformers.MistralConfig(
            **common, rms_norm_eps=1e-5, rope_parameters=rope, hidden_act="silu", sliding_window=config.window,
        )  # fmt: skip
    if name == "gemma":
        layers = [(i + 1) % config.global_every == 0 for i in range(config.n_layer)]
        return transformers.Gemma3TextConfig(
            **common, rms_norm_eps=1e-6, hidden_activation="gelu_pytorch_tanh", head_dim=config.head_dim,
            query_pre_attn_scalar=config.head_dim, sliding_window=config.window,
            layer_types=["full_attention" if is_global else "sliding_attention" for is_global in layers],
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": config.rope_theta},
                "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_theta_local},
            },
        )  # fmt: skip
    raise NotImplementedError(f"no transformers configuration for {name}")


# ==========================================================================================================
# GPT-2: transformers' layers hold the transposed matrices

GPT2_BLOCK = {"norm1": "ln_1", "attention.qkv": "attn.c_attn", "attention.proj": "attn.c_proj", "norm2": "ln_2",
              "mlp.up": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}  # fmt: skip


def gpt2_names(config):
    """(our name, transformers' name, whether it is transposed there) of each parameter."""
    for ours, theirs in (("wte.weight", "wte.weight"), ("wpe.weight", "wpe.weight"),
                         ("norm.weight", "ln_f.weight"), ("norm.bias", "ln_f.bias")):  # fmt: skip
        yield ours, f"transformer.{theirs}", False
    for i in range(config.n_layer):
        for ours, theirs in GPT2_BLOCK.items():
            for kind in ("weight", "bias"):
                transposed = kind == "weight" and "norm" not in ours
                yield f"blocks.{i}.{ours}.{kind}", f"transformer.h.{i}.{theirs}.{kind}", transposed


def to_hf_gpt2(state_dict, config):
    """train_gpt2.py's state dict -> GPT2LMHeadModel's."""
    out = {"lm_head.weight": state_dict["wte.weight"]}
    for ours, theirs, transposed in gpt2_names(config):
        out[theirs] = state_dict[ours].T.contiguous() if transposed else state_dict[ours]
    return out


def from_hf_gpt2(state_dict, config):
    """GPT2LMHeadModel's state dict -> train_gpt2.py's."""
    return {ours: state_dict[theirs].T.contiguous() if transposed else state_dict[theirs]
            for ours, theirs, transposed in gpt2_names(config)}  # fmt: skip


# ==========================================================================================================
# LLaMA, Mistral, Gemma: the same names, but for the norms

LLAMA_BLOCK = {"norm1": "input_layernorm", "attention.proj": "self_attn.o_proj", "norm2": "post_attention_layernorm",
               "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}  # fmt: skip
# transformers' post_attention_layernorm stands before the MLP in LLaMA, and after the attention in Gemma
GEMMA_BLOCK = LLAMA_BLOCK | {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
                             "post_norm1": "post_attention_layernorm", "norm2": "pre_feedforward_layernorm",
                             "post_norm2": "post_feedforward_layernorm"}  # fmt: skip


def to_hf(state_dict, config, block, head_dim):
    """Our state dict -> transformers', the names of a block's parts being those of the dict block."""
    out = {"model.embed_tokens.weight": state_dict["wte.weight"], "model.norm.weight": state_dict["norm.weight"],
           "lm_head.weight": state_dict["wte.weight"]}  # fmt: skip
    rows = [heads * head_dim for heads in (config.n_head, config.n_kv_head, config.n_kv_head)]
    for i in range(config.n_layer):
        for ours, theirs in block.items():
            out[f"model.layers.{i}.{theirs}.weight"] = state_dict[f"blocks.{i}.{ours}.weight"]
        for kind, matrix in zip("qkv", state_dict[f"blocks.{i}.attention.qkv.weight"].split(rows)):
            out[f"model.layers.{i}.self_attn.{kind}_proj.weight"] = matrix.contiguous()
    return out


def from_hf(state_dict, config, block):
    """transformers' state dict -> ours."""
    import torch

    out = {"wte.weight": state_dict["model.embed_tokens.weight"], "norm.weight": state_dict["model.norm.weight"]}
    for i in range(config.n_layer):
        for ours, theirs in block.items():
            out[f"blocks.{i}.{ours}.weight"] = state_dict[f"model.layers.{i}.{theirs}.weight"]
        matrices = [state_dict[f"model.layers.{i}.self_attn.{kind}_proj.weight"] for kind in "qkv"]
        out[f"blocks.{i}.attention.qkv.weight"] = torch.cat(matrices)
    return out


def to_hf_llama(state_dict, config):
    """train_llama.py's state dict -> LlamaForCausalLM's."""
    return to_hf(state_dict, config, LLAMA_BLOCK, config.n_embd // config.n_head)


def from_hf_llama(state_dict, config):
    """LlamaForCausalLM's state dict -> train_llama.py's."""
    return from_hf(state_dict, config, LLAMA_BLOCK)


def to_hf_mistral(state_dict, config):
    """train_mistral.py's state dict -> MistralForCausalLM's."""
    return to_hf(state_dict, config, LLAMA_BLOCK, config.n_embd // config.n_head)


def from_hf_mistral(state_dict, config):
    """MistralForCausalLM's state dict -> train_mistral.py's."""
    return from_hf(state_dict, config, LLAMA_BLOCK)


def to_hf_gemma(state_dict, config):
    """train_gemma.py's state dict -> Gemma3ForCausalLM's."""
    return to_hf(state_dict, config, GEMMA_BLOCK, config.head_dim)


def from_hf_gemma(state_dict, config):
    """Gemma3ForCausalLM's state dict -> train_gemma.py's."""
    return from_hf(state_dict, config, GEMMA_BLOCK)


# ==========================================================================================================
# Back into a script's Config

# the fields of transformers' configurations that change what a model computes: they must be as hf_config() says
MEANT_BY_CONFIG = {
    "activation_function", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "hidden_act",
    "hidden_activation", "rms_norm_eps", "attention_bias", "mlp_bias", "tie_word_embeddings", "rope_parameters", "head_dim",
    "num_key_value_heads", "sliding_window", "layer_types", "query_pre_attn_scalar", "final_logit_softcapping",
    "attn_logit_softcapping", "use_bidirectional_attention",
}  # fmt: skip


def our_config(name, theirs, Config):
    """The script's Config for transformers' configuration object of architecture name."""
    if name == "gpt2":
        return Config(vocab_size=theirs.vocab_size, block_size=theirs.n_positions, n_layer=theirs.n_layer,
                      n_head=theirs.n_head, n_embd=theirs.n_embd)  # fmt: skip
    fields = dict(
        vocab_size=theirs.vocab_size, block_size=theirs.max_position_embeddings, n_layer=theirs.num_hidden_layers,
        n_embd=theirs.hidden_size, n_head=theirs.num_attention_heads, n_kv_head=theirs.num_key_value_heads,
        n_inner=theirs.intermediate_size,
    )  # fmt: skip
    rope = theirs.rope_parameters
    if name == "gemma":
        is_global = [kind == "full_attention" for kind in theirs.layer_types]
        every = is_global.index(True) + 1 if True in is_global else len(is_global) + 1
        return Config(**fields, head_dim=theirs.head_dim, window=theirs.sliding_window, global_every=every,
                      rope_theta=rope["full_attention"]["rope_theta"],
                      rope_theta_local=rope["sliding_attention"]["rope_theta"])  # fmt: skip
    if name == "mistral":
        fields["window"] = theirs.sliding_window or theirs.max_position_embeddings
    return Config(**fields, rope_theta=rope["rope_theta"])
