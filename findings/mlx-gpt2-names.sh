#!/usr/bin/env bash
# Guess: mlx-lm, which loads OpenAI's GPT-2 from the hub, loads a GPT-2 that transformers has saved, too.
# What happens: it doesn't. First it misses n_ctx in config.json, which transformers 5 leaves out. Then
# transformers saves transformer.h.0.ln_1.weight, OpenAI's file has h.0.ln_1.weight, and mlx-lm knows the
# latter alone, so that it takes all tensors for strangers. With n_ctx and the names of OpenAI's file, which
# transformers reads as well, it has the same logits.
# Versions: mlx-lm 0.32.2, mlx 0.32.4, transformers 5.24.0, torch 2.13.0.
# Output seen:
#   as transformers saves it: TypeError ModelArgs.__init__() missing 1 required positional argument
#   with n_ctx: ValueError Received 28 parameters not in model
#   without "transformer.", too: mlx-lm's logits differ by 3.1e-07 of the largest, transformers' by 0.0e+00
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
from safetensors.torch import load_file, save_file

torch.manual_seed(0)
ids = torch.randint(300, (1, 48))
config = transformers.GPT2Config(
    vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
)
model = transformers.GPT2LMHeadModel(config).eval()
with torch.no_grad():
    expected = model(ids).logits.numpy()
model.save_pretrained("gpt2")


def error(logits):
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def outcome():
    try:
        load_model(Path("gpt2"))
    except (TypeError, ValueError) as raised:
        return f"{type(raised).__name__} {str(raised).split(':')[0].strip()}"
    return "loaded"


saved = outcome()
print(f"as transformers saves it: {saved}")
path = Path("gpt2/config.json")
path.write_text(json.dumps(json.loads(path.read_text()) | {"n_ctx": 64}))
with_context = outcome()
print(f"with n_ctx: {with_context}")

tensors = load_file("gpt2/model.safetensors")
tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
save_file(tensors, "gpt2/model.safetensors", metadata={"format": "pt"})
theirs, _ = load_model(Path("gpt2"))
by_mlx = error(np.array(theirs(mx.array(ids.numpy())).astype(mx.float32)))
again = transformers.GPT2LMHeadModel.from_pretrained("gpt2").eval()
with torch.no_grad():
    by_transformers = error(again(ids).logits.numpy())
print(f'without "transformer.", too: mlx-lm\'s logits differ by {by_mlx:.1e} of the largest, '
      f"transformers' by {by_transformers:.1e}")  # fmt: skip
refused = saved.startswith("TypeError") and with_context.startswith("ValueError Received")
raise SystemExit(not refused or by_mlx > 1e-4 or by_transformers > 0)
EOF
