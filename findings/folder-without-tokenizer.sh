#!/usr/bin/env bash
# Guess: AutoTokenizer.from_pretrained() of a model's folder that holds no tokenizer is an error.
# What happens: for a GPT-2 it returns a GPT2Tokenizer with a single token, and any text is encoded to no token
# at all, without a warning.
# Versions: transformers 5.24.0.
# Output seen:
#   GPT2Tokenizer, 1 token, Hello -> []
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q transformers==5.24.0
venv/bin/python - 2>/dev/null <<'EOF'
import transformers
transformers.GPT2Config().save_pretrained("model")
tokenizer = transformers.AutoTokenizer.from_pretrained("model")
ids = tokenizer.encode("Hello")
print(f"{type(tokenizer).__name__}, {len(tokenizer)} token, Hello -> {ids}")
raise SystemExit((len(tokenizer), ids) != (1, []))
EOF
