#!/usr/bin/env bash
# Guess: tiktoken.load.load_tiktoken_bpe(path) of a local file reads that file each time: only what comes from
# the network needs a cache.
# What happens: it copies the local file into tiktoken's cache, under a hash of the path's letters, and from
# then on reads the copy. A file that has changed, or another one of the same relative path, gives the old
# vocabulary. transformers' TikTokenConverter reads vocabulary files by this function.
# Versions: tiktoken 0.14.0.
# Output seen:
#   first: 2 tokens, after the file has changed: 2 tokens, where it holds 3
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tiktoken==0.14.0
cd "$folder"
TIKTOKEN_CACHE_DIR="$folder/cache" venv/bin/python - <<'EOF'
from pathlib import Path
from tiktoken.load import load_tiktoken_bpe

file = Path("vocabulary.tiktoken")
file.write_text("QQ== 0\nQg== 1\n")
first = len(load_tiktoken_bpe(str(file)))
file.write_text("QQ== 0\nQg== 1\nQw== 2\n")
second = len(load_tiktoken_bpe(str(file)))
print(f"first: {first} tokens, after the file has changed: {second} tokens, where it holds 3")
raise SystemExit((first, second) != (2, 2))
EOF
