#!/usr/bin/env bash
# Guess: a LLaMA that transformers 5 has saved means the same to transformers 4, or is refused there.
# What happens: version 5 writes the base of the rotary positions into rope_parameters only, version 4 reads
# rope_theta only, and takes its default of 10,000 without a word. The tensors fit, so the model runs, with
# other logits. A config.json with both fields is read rightly by both.
# Versions: transformers 5.24.0 and 4.57.6.
# Output seen:
#   saved by 5.24.0: 500000.0
#   read by 4.57.6: 10000.0
#   read by 4.57.6 with rope_theta added: 500000.0
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv new
python3 -m venv old
new/bin/pip install -q transformers==5.24.0
old/bin/pip install -q transformers==4.57.6
new/bin/python - 2>/dev/null <<'EOF'
import transformers
config = transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
config.save_pretrained("model")
read = transformers.AutoConfig.from_pretrained("model")
print(f"saved by {transformers.__version__}: {read.rope_parameters['rope_theta']}")
EOF
old/bin/python - 2>/dev/null <<'EOF'
import json
import transformers
alone = transformers.AutoConfig.from_pretrained("model").rope_theta
print(f"read by {transformers.__version__}: {alone}")
with open("model/config.json") as file:
    fields = json.load(file)
with open("model/config.json", "w") as file:
    json.dump(fields | {"rope_theta": 500_000.0}, file)
both = transformers.AutoConfig.from_pretrained("model").rope_theta
print(f"read by {transformers.__version__} with rope_theta added: {both}")
raise SystemExit((alone, both) != (10_000.0, 500_000.0))
EOF
