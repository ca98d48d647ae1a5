"""The scripts' tokenizers as the files that other libraries read."""
import json
from pathlib import Path

import fineweb

END = "<|endoftext|>"


def last_merge(token, ranks):
    """The two parts that byte-pair encoding joins last to make a token of several bytes."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        merged = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        first = merged.index(min(merged))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


def hf_tokenizer(encoding):
    """The tokenizers.Tokenizer with the same ids as a tiktoken.Encoding of GPT-2's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # the letters that stand for bytes there

    tokens = [encoding.decode_single_token_bytes(number) for number in range(encoding.eot_token)]
    ranks = {token: number for number, token in enumerate(tokens)}
    letters = bytes_to_unicode()
    names = {token: "".join(letters[byte] for byte in token) for token in tokens}
    merges = [last_merge(token, ranks) for token in tokens if len(token) > 1]
    merges = [(names[a], names[b]) for a, b in merges]
    vocabulary = {names[token]: number for token, number in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's pattern of words
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def write_tokenizer(encoding, block_size, folder):
    """Writes a tiktoken.Encoding, or a fineweb.OwnTokenizer, as transformers' two files."""
    from tokenizers import Tokenizer

    if isinstance(encoding, fineweb.OwnTokenizer):
        end = encoding.end
        tokenizer = Tokenizer.from_str(encoding.inner.to_str())
        tokenizer.post_processor = None  # which could add tokens that the model has never seen
    else:
        end = END
        tokenizer = hf_tokenizer(encoding)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # by the name that transformers 4 knows, too
        "bos_token": end, "eos_token": end, "unk_token": end,  # which CTranslate2 wants, though none is made
        "model_max_length": block_size, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    path = Path(folder) / "tokenizer_config.json"
    path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
