#!/usr/bin/env bash
# Guess: mlx-lm, which has a class for LLaMA with sliding_window among its fields and uses it for Mistral,
# computes a Mistral's logits as transformers does.
# What happens: that class looks at sliding_window only where layer_types says which layers have it. A
# Mistral's config.json has no layer_types, so all layers see all of the context, without a word. From the
# first token that is further than the window from the beginning logits are others. Written into
# config.json, layer_types of windows alone are refused (ValueError: 'full_attention' is not in list).
# Versions: mlx-lm 0.32.2, mlx 0.32.4, transformers 5.24.0, torch 2.13.0.
# Output seen (the largest difference of a logit, by the largest logit):
#   window 32, tokens 1 to 32: 2.0e-06
#   window 32, tokens 33 to 96: 1.4e+00
#   no window, tokens 1 to 96: 3.0e-06
#   with layer_types: ValueError
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q mlx-lm==0.32.2 "mlx[cpu]==0.32.4" transformers==5.24.0 torch==2.13.0
venv/bin/python - 2>/dev/null <<'EOF'
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
import transformers
from mlx_lm.utils import load_model

torch.manual_seed(0)
ids = torch.randint(300, (1, 96))


def save(window):
    """Saves a Mistral of random weights and returns its logits (96, 300)."""
    config = transformers.MistralConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, sliding_window=window,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained("mistral")
    # the base of the rotary positions under the name that mlx-lm reads
    edit(rope_theta=config.rope_parameters["rope_theta"])
    with torch.no_grad():
        return model(ids).logits[0].numpy()


def edit(**fields):
    path = Path("mistral/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def errors(expected):
    """The largest error of each token's logits, by the largest logit (96,)."""
    model, _ = load_model(Path("mistral"))
    logits = np.array(model(mx.array(ids.numpy())).astype(mx.float32))[0]
    return np.abs(logits - expected).max(-1) / np.abs(expected).max()


full = errors(save(window=None)).max()
by_token = errors(save(window=32))
within, beyond = by_token[:32].max(), by_token[32:].max()
print(f"window 32, tokens 1 to 32: {within:.1e}")
print(f"window 32, tokens 33 to 96: {beyond:.1e}")
print(f"no window, tokens 1 to 96: {full:.1e}")
edit(layer_types=["sliding_attention"] * 3)
refused = "loaded"
try:
    load_model(Path("mistral"))
except ValueError:
    refused = "ValueError"
print(f"with layer_types: {refused}")
raise SystemExit(max(within, full) > 1e-4 or beyond < 0.01 or refused != "ValueError")
EOF
