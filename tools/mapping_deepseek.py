"""
train_deepseek.py's weights under the names of transformers' DeepseekV3ForCausalLM, and back.

transformers' class has no MTP block: to_hf_deepseek leaves it out, and from_hf_deepseek gives what Model holds
without it (mtp_depth "0"), at optimizer step 0. The routing bias, which is state but no parameter, goes along.
"""

ATTENTION = {"q_a": "q_a_proj", "q_norm": "q_a_layernorm", "q_b": "q_b_proj", "kv_a": "kv_a_proj_with_mqa",
             "kv_norm": "kv_a_layernorm", "kv_b": "kv_b_proj", "proj": "o_proj"}  # fmt: skip


def hf_config_deepseek(config):
    """transformers' configuration object for train_deepseek.py's Config."""
    import transformers

    end = min(50_256, config.vocab_size - 1)
    return transformers.DeepseekV3Config(
        vocab_size=config.vocab_size, tie_word_embeddings=True, bos_token_id=end, eos_token_id=end, pad_token_id=None,
        max_position_embeddings=config.block_size, num_hidden_layers=config.n_layer, hidden_size=config.n_embd,
        num_attention_heads=config.n_head, num_key_value_heads=config.n_head, q_lora_rank=config.q_rank,
        kv_lora_rank=config.kv_rank, qk_nope_head_dim=config.nope_dim, qk_rope_head_dim=config.rope_dim,
        v_head_dim=config.v_dim, intermediate_size=config.dense_width, moe_intermediate_size=config.expert_width,
        first_k_dense_replace=config.n_dense, n_routed_experts=config.n_expert, num_experts_per_tok=config.n_active,
        n_shared_experts=config.n_shared, n_group=config.n_group, topk_group=config.topk_group, norm_topk_prob=True,
        routed_scaling_factor=config.route_scale, rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False,
        attention_dropout=0.0, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, rope_interleave=True,
        num_nextn_predict_layers=0, initializer_range=0.006 * (7168 / config.n_embd) ** 0.5,
    )  # fmt: skip


def names(config):
    """(our name, transformers' names) of each tensor; of two names, theirs are the halves of our rows."""
    yield "wte.weight", ["model.embed_tokens.weight"]
    yield "norm.weight", ["model.norm.weight"]
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        yield f"{ours}.norm1.weight", [f"{theirs}.input_layernorm.weight"]
        yield f"{ours}.norm2.weight", [f"{theirs}.post_attention_layernorm.weight"]
        for our_part, their_part in ATTENTION.items():
            yield f"{ours}.attention.{our_part}.weight", [f"{theirs}.self_attn.{their_part}.weight"]
        mlp = f"{theirs}.mlp" if i < config.n_dense else f"{theirs}.mlp.shared_experts"
        yield f"{ours}.mlp.up.weight", [f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"]
        yield f"{ours}.mlp.proj.weight", [f"{mlp}.down_proj.weight"]
        if i >= config.n_dense:
            yield f"{ours}.router.weight", [f"{theirs}.mlp.gate.weight"]
            yield f"{ours}.router.bias", [f"{theirs}.mlp.gate.e_score_correction_bias"]
            yield f"{ours}.experts.up", [f"{theirs}.mlp.experts.gate_up_proj"]
            yield f"{ours}.experts.down", [f"{theirs}.mlp.experts.down_proj"]


def to_hf_deepseek(state_dict, config):
    """train_deepseek.py's state dict -> DeepseekV3ForCausalLM's."""
    out = {"lm_head.weight": state_dict["wte.weight"]}
    for ours, theirs in names(config):
        for name, part in zip(theirs, state_dict[ours].chunk(len(theirs))):
            out[name] = part.contiguous() if len(theirs) > 1 else part
    return out


def from_hf_deepseek(state_dict, config):
    """DeepseekV3ForCausalLM's state dict -> that of train_deepseek.py's Model without MTP."""
    import torch

    out = {"step": torch.zeros((), dtype=torch.int64)}
    for ours, theirs in names(config):
        parts = [state_dict[name] for name in theirs]
        out[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out
