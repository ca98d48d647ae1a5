#!/usr/bin/env bash
# Guess: torchinfo's summary of a language model gives its parameters, a head that is tied to the embedding once,
# and the multiply-adds of a forward pass over the input that it was given.
# What happens: it goes by modules, so a tied head counts twice, and a linear layer's multiply-adds are its
# parameters times the batch, whatever the number of tokens. At the size of GPT-2 that makes 163M parameters of
# 124M, and for a window of 1,024 tokens the multiply-adds of one.
# Versions: torchinfo 1.8.0, torch 2.13.0.
# Output seen:
#   parameters: 68,096, torchinfo 132,096
#   multiply-adds of 128 tokens: 8,716,288, torchinfo 132,096
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy torchinfo==1.8.0
venv/bin/python - <<'PYTHON'
import torch
from torch import nn
from torchinfo import summary

VOCABULARY, C, T = 1000, 64, 128


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, C)
        self.layer = nn.Linear(C, C, bias=False)
        self.head = nn.Linear(C, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens):
        return self.head(self.layer(self.wte(tokens)))


model = Model()
found = summary(model, input_data=torch.randint(0, VOCABULARY, (1, T)), verbose=0)
parameters = sum(parameter.numel() for parameter in model.parameters())
products = T * (C * C + C * VOCABULARY)  # an embedding multiplies nothing
print(f"parameters: {parameters:,}, torchinfo {found.total_params:,}")
print(f"multiply-adds of {T} tokens: {products:,}, torchinfo {found.total_mult_adds:,}")
tied_twice = found.total_params == parameters + C * VOCABULARY
raise SystemExit(not tied_twice or found.total_mult_adds != 2 * C * VOCABULARY + C * C)
PYTHON
