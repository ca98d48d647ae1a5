#!/usr/bin/env bash
# Guess: int8 weights by torchao make a small language model's file smaller, by up to four, and a head that
# is tied to the embedding stays tied, since quantize_ changes the model in place.
# What happens: quantize_ changes linear layers, so the head gets int8 weights of its own, the embedding
# stays in fp32, and where the vocabulary is most of the model the file grows. Heads and embeddings that are
# trained on from there are two. At the size of GPT-2 (124M parameters, of which 39M are the embedding) the
# file is, by count, 1.8 times smaller, not four times.
# Versions: torchao 0.18.0, torch 2.13.0, transformers 5.24.0.
# Output seen:
#   before: tied, 5.01 MB
#   after: head Int8Tensor, embedding Parameter, 5.58 MB
#   the logits differ by 1.0% of the largest
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torchao==0.18.0 torch==2.13.0 transformers==5.24.0
venv/bin/python - 2>/dev/null <<'EOF'
import io

import torch
import transformers
from torchao.quantization import Int8WeightOnlyConfig, quantize_

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=16_384, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=64, tie_word_embeddings=True,
)  # fmt: skip
model = transformers.LlamaForCausalLM(config).eval()
ids = torch.randint(config.vocab_size, (1, 64))
embedding = model.get_input_embeddings()


def megabytes():
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 1e6


with torch.no_grad():
    expected = model(ids).logits
    before = megabytes()
    print(f"before: {'tied' if model.lm_head.weight is embedding.weight else 'untied'}, {before:.2f} MB")
    quantize_(model, Int8WeightOnlyConfig())
    kinds = type(model.lm_head.weight).__name__, type(embedding.weight).__name__
    after = megabytes()
    print(f"after: head {kinds[0]}, embedding {kinds[1]}, {after:.2f} MB")
    error = ((model(ids).logits - expected).abs().max() / expected.abs().max()).item()
print(f"the logits differ by {100 * error:.1f}% of the largest")
raise SystemExit(kinds != ("Int8Tensor", "Parameter") or after < before or error > 0.1)
EOF
