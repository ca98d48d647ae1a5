#!/usr/bin/env bash
# Guess: CTranslate2 computes a Mistral's logits as transformers does, since its converter reads sliding_window.
# What happens: they are equal for prompts within the window, and others for longer ones, of which
# forward_batch() returns the logits of the last tokens alone.
# Versions: CTranslate2 4.8.5, transformers 5.24.0, torch 2.13.0.
# Output seen (the largest difference of a logit of the last token, by the largest logit):
#   window 32, prompt 32: 6.7e-07
#   window 128, prompt 96: 2.0e-06
#   window 32, prompt 48: 3.3e-01
#   window 32, prompt 96: 6.8e-01
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q ctranslate2==4.8.5 transformers==5.24.0 torch==2.13.0
venv/bin/python - 2>/dev/null <<'EOF'
import ctranslate2
import numpy as np
import tokenizers
import torch
import transformers
from ctranslate2.converters import TransformersConverter

names = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 300)}
inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="<unk>"))
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)


def difference(window, length):
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=window, bos_token_id=0, eos_token_id=1,
    )
    model = transformers.MistralForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    TransformersConverter("model").convert("converted", force=True)
    generator = ctranslate2.Generator("converted", compute_type="float32")
    ids = torch.randint(3, 300, (1, length))
    with torch.no_grad():
        expected = model(ids).logits[0, -1].numpy()
    prompt = [f"w{i}" for i in ids[0].tolist()]
    (result,) = generator.generate_batch([prompt], max_length=1, return_logits_vocab=True,
                                         include_prompt_in_result=False)
    found = np.array(result.logits[0])[0]
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"window {window}, prompt {length}: {error:.1e}", flush=True)
    return error


equal = [difference(32, 32), difference(128, 96)]
other = [difference(32, 48), difference(32, 96)]
raise SystemExit(not (max(equal) < 1e-4 and min(other) > 1e-2))
EOF
