"""
A finished run for use elsewhere, and others' weights for use here.

    python -m tools.export log/llama --out hf/llama     # to share: weights,
                                     # config, tokenizer and model card
    python -m tools.export --from gpt2 --out log/mine   # weights for
                                     # train_gpt2.py's --sample and --eval

GPT-2, LLaMA, Mistral, Gemma and DeepSeek become transformers' own classes, which
llama.cpp's converter, CTranslate2 and MLX read as well, where they know the class;
RWKV-7 becomes the .pth of the package rwkv, MTA a file with our names.
--from takes GPT-2, LLaMA, Mistral and Gemma of transformers, by folder or name,
and GPT-2 of nanoGPT (ckpt.pt) and llm.c (.bin), with GPT-2's vocabulary.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

import fineweb
from tools.common import parse
from tools.export.read import import_weights
from tools.export.write import export


@dataclass(kw_only=True)
class Args:
    run: Positional[Path | None] = None  # a run to export, as log/llama, or its best.pt
    source: Annotated[str | None, arg(name="from")] = None  # a model to import: folder, name or file
    out: Path  # folder to write; for --from log/NAME


def main():
    args = parse(Args, "tools.export", __doc__)
    if (args.run is None) == (args.source is None):
        fineweb.fail("give the folder of a run to export, or --from and a model to import")
    try:
        if args.run:
            export(args.run, args.out)
        else:
            import_weights(args.source, args.out)
    except ImportError as missing:
        fineweb.fail(f"this needs a package that is missing: pip install {missing.name}")
    except OSError as error:
        fineweb.fail(f"{error.filename or args.out}: {error.strerror or error}")


if __name__ == "__main__":
    main()
