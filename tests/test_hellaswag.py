"""The four-way scorer."""
import argparse
import json
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import text
from helpers import item, random_items, refused, write_items

import fineweb
import hellaswag

ENCODE = fineweb.get_tokenizer("bytes").encode_ordinary


def losses_by_byte(losses):
    """A model with these losses in nats, {byte: loss}, whatever came before.

    All other bytes share what is left of the probability; four logits of padding have none.
    """
    rest = 1 - sum(np.exp(-loss) for loss in losses.values())
    assert rest > 0
    table = torch.full((257 + 4,), float(np.log(rest / (257 - len(losses)))))
    table[257:] = -1e4
    for byte, loss in losses.items():
        table[ord(byte)] = -loss
    return lambda inputs: table.expand(*inputs.shape, -1)


def labels_of(items):
    return np.array([item["label"] for item in items])


def score(logits_of, items, convention):
    batches = hellaswag.make_batches(items, convention, ENCODE, 64)
    return hellaswag.score(logits_of, batches, labels_of(items), convention)


def test_by_hand():
    logits_of = losses_by_byte({b" ": 1, b"a": 1, b"b": 2, b"c": 3})
    items = [
        item("c", ["aaaa", "b", "cc", "bb"], 1),  # with the space: sums 5 3 7 5: 1; means 1 3/2 7/3 5/3: 0
        item("a", ["cc", "bb", "a", "bbb"], 2),  # sums 7 5 2 7: 2; means 7/3 5/3 1 7/4: 2
        item("b", ["ccc", "aaaaaa", "b", "bb"], 0),  # sums 10 7 3 5: 2; means 10/4 1 3/2 5/3: 1
    ]
    result = score(logits_of, items, "nanogpt")
    assert result["predictions"] == "122" and result["predictions_norm"] == "021"
    assert result["acc"] == pytest.approx(2 / 3) and result["acc_norm"] == pytest.approx(1 / 3)
    assert result["acc_se"] == pytest.approx((2 / 9 / 3) ** 0.5) and result["n"] == 3
    # by characters: 5/4 3/1 7/2 5/2: 0; 7/2 5/2 2/1 7/3: 2; 10/3 7/6 3/1 5/2: 1
    result = score(logits_of, items, "harness")
    assert result["predictions"] == "122" and result["predictions_norm"] == "021"


def test_by_hand_where_tokens_and_characters_differ():
    # nanogpt counts the space before an ending, and é is two bytes
    items = [item("a", ["é", "ab", "ccccccc", "ccccccc"], 0)]
    losses = {b" ": 2, b"a": 2, b"\xc3": 1.2, b"\xa9": 1.2}
    # é: 2 + 1.2 + 1.2 = 4.4, by tokens 4.4/3, by characters 4.4; ab: 2 + 2 + 5 = 9, 9/3, 9/2
    logits_of = losses_by_byte(losses | {b"b": 5})
    for convention in hellaswag.CONVENTIONS:
        assert score(logits_of, items, convention)["predictions_norm"] == "0"
    # ab: 2 + 2 + 3 = 7, 7/3, 7/2
    logits_of = losses_by_byte(losses | {b"b": 3})
    assert score(logits_of, items, "nanogpt")["predictions_norm"] == "0"
    assert score(logits_of, items, "harness")["predictions_norm"] == "1"


def test_conventions_word_the_prompt_as_published():
    beginning = "How to cook rice [header] Wash it. [title] Use cold water."
    endings = ["[substeps] Rinse  it.", "b", "c", "d"]
    wikihow = item(beginning, endings, activity_label="Food", ctx_b="then you")
    wikihow["ctx"] = beginning + " then you"
    context, endings = hellaswag.prompt_and_endings(wikihow, "nanogpt")
    assert context == wikihow["ctx"] and endings[0] == "[substeps] Rinse  it."
    context, endings = hellaswag.prompt_and_endings(wikihow, "harness")
    assert context == "Food: How to cook rice Wash it.. Use cold water. Then you"
    assert endings[0] == " Rinse it."


def test_harness_preprocessing_equals_lm_evaluation_harness():
    # worked out by hand from lm_eval/tasks/hellaswag/utils.py:
    # strip, " [title]" -> ". ", drop [...], "  " -> " "
    assert hellaswag.clean("  a [title] b ") == "a. b"
    assert hellaswag.clean("a [step] b") == "a b"
    assert hellaswag.clean("[header] How to x [title] Do y. [step] Then z.") == " How to x. Do y. Then z."
    assert hellaswag.clean("x [a] [b] y") == "x  y"  # one pass, as theirs


def encode_pair(encode, context, continuation):
    """lm-evaluation-harness' TemplateLM._encode_pair, in our words."""
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    whole = encode(context + continuation)
    prefix = encode(context)
    return prefix, whole[len(prefix) :]


def check_rows(batches, items, convention, encode):
    """Each ending is in the batches once: its row holds it and its context, its targets are itself alone."""
    seen = []
    for numbers, inputs, targets, characters in batches:
        assert inputs.shape == targets.shape
        assert (targets[4 * len(numbers) :] == -1).all()
        for place, number in enumerate(numbers):
            context, endings = hellaswag.prompt_and_endings(items[number], convention)
            for k, ending in enumerate(endings):
                prefix, tokens = encode_pair(encode, context, " " + ending)
                length = len(prefix + tokens) - 1
                target = targets[4 * place + k]
                assert inputs[4 * place + k, :length].tolist() == (prefix + tokens)[:-1]
                assert target[len(prefix) - 1 : length].tolist() == tokens
                assert target[target >= 0].tolist() == tokens
                assert characters[place, k] == len(ending)
            seen.append(number)
    assert sorted(seen) == list(range(len(items)))


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_harness_splits_the_tokens_as_lm_evaluation_harness(tokenizer):
    """Contexts with trailing spaces, as a bracket at the end leaves them, and everything else that is odd."""
    try:
        encode = fineweb.get_tokenizer(tokenizer).encode_ordinary
    except SystemExit:
        pytest.skip("GPT-2's vocabulary is not on this machine and there is no network")
    pieces = ["He", " ran", "[header]", " [title] Go", " ", "  ", ".", ", it's", "\n", "\t"]
    pieces += [" 12", "é", " -- "]
    generator = np.random.default_rng(0)
    items = []
    for _ in range(300):
        ctx_a, ctx_b, *endings = ["A" + "".join(generator.choice(pieces, 6)) for _ in range(6)]
        fields = {"activity_label": "Run", "ctx_b": generator.choice([ctx_b, ""])}
        items.append(item(ctx_a, endings, **fields))
    contexts = [hellaswag.prompt_and_endings(entry, "harness")[0] for entry in items]
    assert sum(context != context.rstrip() for context in contexts) >= 20
    check_rows(hellaswag.make_batches(items, "harness", encode, 1024), items, "harness", encode)


def test_targets_are_the_endings_and_nothing_else():
    items = random_items(20)
    batches = hellaswag.make_batches(items, "nanogpt", ENCODE, 512, 3)
    check_rows(batches, items, "nanogpt", ENCODE)
    assert all(inputs.shape[0] == 12 and inputs.shape[1] % 8 == 0 for _, inputs, _, _ in batches)
    batches = hellaswag.make_batches(items, "nanogpt", ENCODE, 512)
    assert len({inputs.shape for _, inputs, _, _ in batches}) <= 4


def test_a_long_context_loses_its_beginning():
    items = [item("x" * 100 + "yz", ["one", "two two", "three", "four"])]
    ((_, inputs, targets, _),) = hellaswag.make_batches(items, "nanogpt", ENCODE, 16, 1)
    assert inputs.shape == (4, 16)
    assert bytes(inputs[1].tolist()) == b"xxxxxxxyz two two"[:-1]
    assert bytes(targets[1][targets[1] >= 0].tolist()) == b" two two"


class Model(nn.Module):
    """A small causal model of bytes, far from indifferent between the endings."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(257, 32)
        self.rnn = nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, 257 + 7)

    def forward(self, inputs):
        return self.head(self.rnn(self.wte(inputs))[0])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Model()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def padded(array, width, fill):
    more = width - array.shape[1]
    return np.pad(array, ((0, 0), (0, more)), constant_values=fill)


@pytest.mark.parametrize("convention", hellaswag.CONVENTIONS)
def test_same_answers_for_any_batch_size_padding_and_rank(model, convention):
    items = random_items(32)

    def answers(batches):
        return hellaswag.score(model, batches, labels_of(items), convention)

    one_by_one = answers(hellaswag.make_batches(items, convention, ENCODE, 256, 1))
    assert len(set(one_by_one["predictions"])) == 4
    for size in (2, 7, 16, 32):
        batches = hellaswag.make_batches(items, convention, ENCODE, 256, size)
        assert answers(batches) == one_by_one
        wider = []
        for numbers, inputs, targets, characters in batches:
            inputs = padded(inputs, 256, 7)  # any token will do where nothing is scored
            targets = padded(targets, 256, -1)
            wider.append((numbers, inputs, targets, characters))
        assert answers(wider) == one_by_one


def test_ranks_share_the_batches(model, monkeypatch):
    items = random_items(32)
    batches = hellaswag.make_batches(items, "nanogpt", ENCODE, 256, 4)
    whole = hellaswag.score(model, batches, labels_of(items), "nanogpt")
    parts = []
    monkeypatch.setattr(hellaswag.dist, "all_reduce", lambda chosen: parts.append(chosen.clone()))
    for rank in range(3):
        hellaswag.score(model, batches, labels_of(items), "nanogpt", "cpu", rank, 3)
    chosen = sum(parts).tolist()
    assert whole["predictions"] == "".join(map(str, chosen[0]))
    assert whole["predictions_norm"] == "".join(map(str, chosen[1]))


@pytest.mark.parametrize("change", [
    {"endings": ["a", "b", "c"]}, {"label": 4}, {"label": "?"}, {"ctx": " "}, {"label": 1.7}, {"label": True},
    {"label": float("inf")}, {"label": None}, {"ctx_b": None}, {"endings": "abcd"},
    {"endings": ["a", "b", "c", 4]}, {"activity_label": "\ud800"},
    b"\xff\xfe", b"null", b"[" * 100_000, b'{"endings": ' + b"[" * 100_000,
])  # fmt: skip
def test_malformed_items_are_one_line(tmp_path, change):
    path = write_items(tmp_path / "items.jsonl", random_items(1))
    with open(path, "ab") as f:
        f.write(change if isinstance(change, bytes) else json.dumps(random_items(1)[0] | change).encode())
    refused("items.jsonl, line 2", hellaswag.load, path)


def test_text_may_hold_any_line_break_and_a_label_may_be_a_string(tmp_path):
    odd = item("one\u2028two\x85three\x0b", ["a\u2029", "b", "c", "d"], "3")
    path = tmp_path / "items.jsonl"
    path.write_text((json.dumps(odd, ensure_ascii=False) + "\r\n") * 2, encoding="utf-8")
    first, second = hellaswag.load(path)
    assert first == second == {**odd, "label": 3}


@pytest.mark.parametrize("options, message", [
    (["--limit", "0"], "--limit 0: must be at least 1"),
    (["--file", "."], ". can't be read"),
    (["--file", "nowhere.jsonl"], "nowhere.jsonl can't be read"),
    (["--hf", "empty"], "empty can't be loaded"),
])  # fmt: skip
def test_bad_options_are_one_line(run, tmp_path, options, message):
    write_items(tmp_path / "items.jsonl", random_items(3))
    (tmp_path / "empty").mkdir()
    defaults = ["--hf", "empty", "--file", "items.jsonl"]
    status, said = run(hellaswag, *defaults, *options)
    assert status == 1 and message in said and said.count("\n") == 1, said


def test_too_few_items_are_one_line(tmp_path):
    path = write_items(tmp_path / "items.jsonl", random_items(3))
    assert len(hellaswag.load(path)) == 3
    refused("3 items, not 10042", hellaswag.load, path, hellaswag.N_ITEMS)
    path.write_bytes(b"")
    refused("items.jsonl has 0", hellaswag.load, path)


def cloze_of(folder):
    return hellaswag.cloze_items(hellaswag.validation_documents(folder))


def test_the_cloze_is_six_words_of_held_out_text_and_their_shuffles(sample):
    items = cloze_of(sample)
    assert len(items) == 250 and items == cloze_of(sample)
    val = np.fromfile(sample / "fineweb_val_000000.bin", dtype=np.uint16, offset=1024)
    held_out = " ".join(val.astype(np.uint8).tobytes().decode().replace("\0", " ").split())
    for entry in items:
        assert len(set(entry["endings"])) == 4
        assert entry["ctx"] + " " + entry["endings"][entry["label"]] in held_out
        assert len({" ".join(sorted(ending.split())) for ending in entry["endings"]}) == 1
        assert re.fullmatch("[a-z ]+", entry["endings"][0])  # a full stop or a capital would give it away
    assert {entry["label"] for entry in items} == {0, 1, 2, 3}


@pytest.mark.parametrize("rule", [
    *[lambda endings, i=i: [k == i for k in range(4)] for i in range(4)],
    lambda endings: [ending == min(endings) for ending in endings],
    lambda endings: [ending == max(endings) for ending in endings],
    lambda endings: [len(ending.split()[-1]) for ending in endings],
    lambda endings: [len(ending.split()[0]) for ending in endings],
], ids=[0, 1, 2, 3, "alphabetically first", "last", "longest last word", "longest first word"])  # fmt: skip
def test_a_rule_that_reads_nothing_is_at_chance_in_the_cloze(sample, rule):
    # more than a run has, for a sharper test
    items = hellaswag.cloze_items(hellaswag.validation_documents(sample), 1000)
    assert len(items) > 600
    right = 0.0
    for entry in items:
        values = rule(entry["endings"])
        best = [k for k in range(4) if values[k] == max(values)]
        right += (entry["label"] in best) / len(best)
    # Three standard errors, in percent: the text depends on Python's version, and with so many rules two
    # would be too few for some of them.
    assert abs(100 * right / len(items) - 25) < 3 * (25 * 75 / len(items)) ** 0.5


def test_scorer_of_a_dataset_of_bytes(sample, tmp_path, model):
    scorer = hellaswag.open_scorer("nowhere", sample, fineweb.get_tokenizer("bytes"), 128)
    assert scorer.task == "cloze" and list(scorer.batches) == ["nanogpt"] and len(scorer.labels) == 250
    result = scorer.score(model, "nanogpt", 7, tmp_path)
    saved = json.loads((tmp_path / "cloze_nanogpt.json").read_text())
    assert saved["step"] == 7 and len(saved["labels"]) == 250
    assert saved["predictions"] == result["predictions"]
    right = sum(a == b for a, b in zip(saved["predictions_norm"], saved["labels"]))
    assert result["acc_norm"] == right / 250
    line = hellaswag.one_line(result)
    assert "cloze (nanogpt): acc" in line and "HellaSwag" not in line
    assert hellaswag.open_scorer("nowhere", sample, None, 128) is None


def test_too_little_text_for_a_cloze_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(text(5000, 0))
    fineweb.tokenize_files(tmp_path / "out", [tmp_path / "a.txt"], None, 5000, "bytes", 0)
    capsys.readouterr()
    assert hellaswag.open_scorer("nowhere", tmp_path / "out", fineweb.get_tokenizer("bytes"), 128) is None
    assert "no four-way score" in capsys.readouterr().out


def test_without_a_network_training_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HELLASWAG_URL", "http://127.0.0.1:9/val.jsonl")
    monkeypatch.setenv("RETRY_SECONDS", "0.01")
    tokenizer = argparse.Namespace(name="gpt2")
    assert hellaswag.open_scorer(tmp_path / "no.jsonl", tmp_path, tokenizer, 128) is None
    warning = capsys.readouterr().out
    assert "HellaSwag will not be scored" in warning and "--hellaswag" in warning


def letters_tokenizer(items, is_sentencepiece):
    """A tokenizer of letters; like SentencePiece with a space before the first one and <s> before a text."""
    from tokenizers import Tokenizer, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    if not is_sentencepiece:
        vocabulary = {chr(i): i for i in range(128)}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])))
    letters = sorted(set("".join(entry["ctx"] + "".join(entry["endings"]) for entry in items)) - {" "})
    names = ["<unk>", "<s>", "▁", *letters, *("▁" + letter for letter in letters)]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [("▁", letter) for letter in letters]
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


@pytest.mark.parametrize("is_sentencepiece", [False, True])
def test_any_hugging_face_model_by_the_same_code(run, tmp_path, monkeypatch, is_sentencepiece):
    transformers = pytest.importorskip("transformers")
    items = random_items(12)
    write_items(tmp_path / "items.jsonl", items)
    tokenizer = letters_tokenizer(items, is_sentencepiece)
    tokenizer.save_pretrained(tmp_path / "model")
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 512, "vocab_size": 128}
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    theirs.bfloat16().save_pretrained(tmp_path / "model")
    theirs.float()

    # the same by one item after the other, as the convention's authors and lm_eval 0.4.13 do it
    right = 0
    for entry in items:
        means = []
        for ending in entry["endings"]:
            context, tokens = encode_pair(tokenizer.encode, entry["ctx"], " " + ending)
            assert context[:1] == [1] or not is_sentencepiece
            assert (tokens != tokenizer.encode(" " + ending, add_special_tokens=False)) == is_sentencepiece
            with torch.no_grad():
                log_p = theirs(torch.tensor([context + tokens])).logits[0].log_softmax(-1)
            losses = [-log_p[len(context) + i - 1, token] for i, token in enumerate(tokens)]
            means.append(sum(losses) / len(losses))
        right += int(np.argmin(means)) == entry["label"]

    def checked(logits_of, batches, labels, convention, device):
        assert logits_of(torch.zeros(1, 1, dtype=torch.int64)).dtype == torch.float32
        check_rows(batches, items, convention, tokenizer.encode)
        return unchecked(logits_of, batches, labels, convention, device)

    unchecked = hellaswag.score
    monkeypatch.setattr(hellaswag, "score", checked)
    options = ["--file", "items.jsonl", "--device", "cpu"]
    status, said = run(hellaswag, "--hf", "model", *options)
    assert status == 0, said
    nanogpt, harness = said.splitlines()[-2:]
    assert "(nanogpt)" in nanogpt and f"acc_norm {100 * right / 12:.2f}" in nanogpt
    assert "(harness)" in harness

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, said = run(hellaswag, "--hf", "no/such/model", *options)
    assert status == 1 and "no/such/model can't be loaded" in said and said.count("\n") == 1
