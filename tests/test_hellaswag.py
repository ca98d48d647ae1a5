"""The four-way scorer."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import text

import fineweb
import hellaswag
import train_gpt2

ENCODE = fineweb.get_tokenizer("bytes").encode_ordinary


def item(ctx, endings, label=0, **fields):
    common = {"activity_label": "", "ctx": ctx, "ctx_a": ctx, "ctx_b": ""}
    return {**common, "endings": endings, "label": label, **fields}


def random_items(n, seed=0):
    rng = np.random.default_rng(seed)
    items = []
    for i in range(n):
        texts = []
        for j, n_words in enumerate(rng.integers(2, 14, size=5)):
            texts.append(text(int(n_words), 100 * seed + 10 * i + j))
        endings = [f"{ending} {k}" for k, ending in enumerate(texts[1:])]
        items.append(item(texts[0], endings, int(rng.integers(4))))
    return items


def write_items(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def losses_by_byte(table):
    """A model whose loss of a token is looked up in a table, whatever came before."""
    return lambda inputs, targets: table[targets.clamp(min=0)]


def labels_of(items):
    return np.array([item["label"] for item in items])


def score_by_byte(table, items, convention):
    batches = hellaswag.make_batches(items, convention, ENCODE, 64)
    return hellaswag.score(losses_by_byte(table), batches, labels_of(items), convention)


def test_by_hand():
    # only the letters cost anything: a 1, b 2, c 3; the space before an ending is free
    table = torch.zeros(257)
    table[[97, 98, 99]] = torch.tensor([1.0, 2.0, 3.0])
    items = [
        item("c", ["aaaa", "b", "cc", "bb"], 1),  # sums 4 2 6 4: 1; means 4/5 1 2 4/3: 0
        item("a", ["cc", "ab", "a", "bbb"], 2),  # sums 6 3 1 6: 2; means 2 1 1/2 3/2: 2
        item("b", ["ccc", "a.......", "b", "bb"], 0),  # sums 9 1 2 4: 1; means 9/4 1/9 1 4/3: 1
    ]
    result = score_by_byte(table, items, "nanogpt")
    assert result["predictions"] == "121" and result["predictions_norm"] == "021"
    assert result["acc"] == pytest.approx(2 / 3) and result["acc_norm"] == pytest.approx(1 / 3)
    assert result["acc_se"] == pytest.approx((2 / 9 / 3) ** 0.5) and result["n"] == 3
    # by characters: 4/4 2/1 6/2 4/2: 0; 6/2 3/2 1/1 6/3: 2; 9/3 1/8 2/1 4/2: 1
    result = score_by_byte(table, items, "harness")
    assert result["predictions"] == "121" and result["predictions_norm"] == "021"


def test_by_hand_where_tokens_and_characters_differ():
    # nanogpt counts the space before an ending, and é is two bytes
    items = [item("a", ["é", "ab", "ccccccc", "ccccccc"], 0)]
    table = torch.zeros(257)
    table[[97, 98, 99]] = torch.tensor([1.0, 2.0, 3.0])
    # é 1.5: mean of its three tokens 0.5 < 3/3; of its one character 1.5, equal to ab's 3/2
    table[ENCODE("é")] = torch.tensor([1.5, 0.0])
    for convention in hellaswag.CONVENTIONS:
        assert score_by_byte(table, items, convention)["predictions_norm"] == "0"
    # é 1.8: mean of its three tokens 0.6 < 3/3; of its one character 1.8 > 3/2
    table[ENCODE("é")] = torch.tensor([1.6, 0.2])
    assert score_by_byte(table, items, "nanogpt")["predictions_norm"] == "0"
    assert score_by_byte(table, items, "harness")["predictions_norm"] == "1"


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


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_harness_splits_the_tokens_as_lm_evaluation_harness(tokenizer):
    """Contexts with trailing spaces, as a bracket at the end leaves them, and everything else that is odd."""
    try:
        encode = fineweb.get_tokenizer(tokenizer).encode_ordinary
    except SystemExit:
        pytest.skip("GPT-2's vocabulary is not on this machine and there is no network")
    pieces = ["He", " ran", "[header]", " [title] Go", " ", "  ", ".", ", it's", "\n", "\t", " 12", "é", " -- "]
    generator = np.random.default_rng(0)
    items = []
    for _ in range(300):
        ctx_a, ctx_b, *endings = ["A" + "".join(generator.choice(pieces, 6)) for _ in range(6)]
        item = {"activity_label": "Run", "ctx_a": ctx_a, "ctx_b": generator.choice([ctx_b, ""])}
        items.append(item | {"ctx": ctx_a, "endings": endings, "label": 0})
    contexts = [hellaswag.prompt_and_endings(item, "harness")[0] for item in items]
    assert sum(context != context.rstrip() for context in contexts) >= 20
    seen = 0
    for numbers, inputs, targets, _ in hellaswag.make_batches(items, "harness", encode, 1024):
        for place, number in enumerate(numbers):
            context, endings = hellaswag.prompt_and_endings(items[number], "harness")
            for k, ending in enumerate(endings):
                prefix, tokens = encode_pair(encode, context, " " + ending)
                row, target = inputs[4 * place + k], targets[4 * place + k]
                assert row[: len(prefix + tokens) - 1].tolist() == (prefix + tokens)[:-1]
                assert target[target >= 0].tolist() == tokens
                assert (target[: len(prefix) - 1] == -1).all()
                seen += 1
    assert seen == 1200


def test_targets_are_the_endings_and_nothing_else():
    items = random_items(20)
    seen = set()
    batches = hellaswag.make_batches(items, "nanogpt", ENCODE, 512, 3)
    for numbers, inputs, targets, characters in batches:
        assert inputs.shape == targets.shape
        assert inputs.shape[0] == 12 and inputs.shape[1] % 8 == 0
        for at, number in enumerate(numbers):
            seen.add(int(number))
            for k, ending in enumerate(items[number]["endings"]):
                row = inputs[4 * at + k]
                goal = targets[4 * at + k]
                scored = np.flatnonzero(goal >= 0)
                assert goal[scored].tolist() == ENCODE(" " + ending)
                whole = ENCODE(items[number]["ctx"] + " " + ending)
                assert row[: scored[-1] + 1].tolist() == whole[:-1]
                assert characters[at, k] == len(ending)
        assert (targets[4 * len(numbers) :] == -1).all()
    assert seen == set(range(20))
    batches = hellaswag.make_batches(items, "nanogpt", ENCODE, 512)
    assert len({inputs.shape for _, inputs, _, _ in batches}) <= 4


def test_a_long_context_loses_its_beginning():
    items = [item("x" * 100 + "yz", ["one", "two two", "three", "four"])]
    ((_, inputs, targets, _),) = hellaswag.make_batches(items, "nanogpt", ENCODE, 16, 1)
    assert inputs.shape == (4, 16)
    assert bytes(inputs[1].tolist()) == b"xxxxxxxyz two two"[:-1]
    assert bytes(targets[1][targets[1] >= 0].tolist()) == b" two two"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = train_gpt2.Config(n_layer=2, n_head=2, n_embd=32, vocab_size=257, block_size=256)
    model = train_gpt2.Model(config)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # far from indifferent between the endings
    return model


def padded(array, width, fill):
    more = width - array.shape[1]
    return np.pad(array, ((0, 0), (0, more)), constant_values=fill)


@pytest.mark.parametrize("convention", hellaswag.CONVENTIONS)
def test_same_answers_for_any_batch_size_padding_and_rank(model, convention):
    items = random_items(32)

    def losses_of(inputs, targets):
        return model(inputs, targets, "none")[1]

    def answers(batches):
        return hellaswag.score(losses_of, batches, labels_of(items), convention)

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


def test_skipping_the_head_changes_no_loss(model):
    items = random_items(8)
    for _, inputs, targets, _ in hellaswag.make_batches(items, "nanogpt", ENCODE, 256, 4):
        inputs = torch.from_numpy(inputs).long()
        targets = torch.from_numpy(targets).long()
        with torch.no_grad():
            losses = model(inputs, targets, "none")[1]
            logits = model(inputs)[0].transpose(1, 2)
        full = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
        torch.testing.assert_close(losses, full, rtol=1e-5, atol=1e-5)
        assert (losses[targets < 0] == 0).all()


@pytest.mark.parametrize("change, message", [
    ({"endings": ["a", "b", "c"]}, "line 2 is not a HellaSwag item"),
    ({"label": 4}, "line 2 is not a HellaSwag item"),
    ({"label": "?"}, "line 2 is not a HellaSwag item"),
    ({"ctx": " "}, "line 2 is not a HellaSwag item"),
    ({"label": 1.7}, "line 2 is not a HellaSwag item .Expected `int`, got `float`"),
    ({"label": True}, "line 2 is not a HellaSwag item .Expected `int`, got `bool`"),
    ({"label": float("inf")}, "line 2 is not a HellaSwag item"),
    ({"label": None}, "line 2 is not a HellaSwag item"),
    ({"ctx_b": None}, "line 2 is not a HellaSwag item .Expected `str`, got `null` - at `\\$.ctx_b`"),
    ({"endings": "abcd"}, "line 2 is not a HellaSwag item"),
    ({"endings": ["a", "b", "c", 4]}, "line 2 is not a HellaSwag item"),
    ({"activity_label": "\ud800"}, "line 2 is not a HellaSwag item"),
])  # fmt: skip
def test_malformed_items_are_one_line(tmp_path, change, message):
    items = random_items(2)
    items[1].update(change)
    path = write_items(tmp_path / "items.jsonl", items)
    with pytest.raises(SystemExit, match=message):
        hellaswag.load(path)
    with pytest.raises(SystemExit, match="does not exist"):
        hellaswag.load(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("content, message", [
    (b"\xff\xfe", "items.jsonl, line 1 is not a HellaSwag item"),
    (b"null\n", "items.jsonl, line 1 is not a HellaSwag item"),
    (b"[" * 100_000, "items.jsonl, line 1 is not a HellaSwag item"),
    (b'{"endings": ' + b"[" * 100_000, "items.jsonl, line 1 is not a HellaSwag item"),
    (b"", "items.jsonl has 0 items"),
])  # fmt: skip
def test_damaged_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "items.jsonl"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        hellaswag.load(path)
    with pytest.raises(SystemExit, match="can't be read"):
        hellaswag.load(tmp_path)


def test_text_may_hold_any_line_break_and_a_label_may_be_a_string(tmp_path):
    odd = item("one\u2028two\x85three\x0b", ["a\u2029", "b", "c", "d"], "3")
    path = tmp_path / "items.jsonl"
    path.write_text((json.dumps(odd, ensure_ascii=False) + "\r\n") * 2, encoding="utf-8")
    first, second = hellaswag.load(path)
    assert first == second == {**odd, "label": 3}


@pytest.mark.parametrize("options, message", [
    (["--limit", "0"], "--limit 0: must be at least 1"),
    (["--limit", "-3"], "--limit -3: must be at least 1"),
    (["--file", "."], ". can't be read (Is a directory)"),
    (["--file", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    (["--hf", "items.jsonl"], "items.jsonl can't be loaded"),
    (["--hf", "empty"], "empty can't be loaded"),
    (["--convention", "other"], "argument --convention: invalid choice: 'other'"),
])  # fmt: skip
def test_bad_options_are_one_line(run, tmp_path, options, message):
    write_items(tmp_path / "items.jsonl", random_items(3))
    (tmp_path / "empty").mkdir()
    defaults = ["--hf", "empty", "--file", "items.jsonl"]
    status, said = run(hellaswag, *defaults, *options)
    assert status == 1 and message in said and said.count("\n") == 1, said


def test_another_file_in_the_published_ones_place_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / hellaswag.DEFAULT_FILE
    path.parent.mkdir(parents=True)
    write_items(path, random_items(3))
    monkeypatch.setattr(hellaswag, "N_ITEMS", 3)
    assert len(hellaswag.hellaswag_items(Path(hellaswag.DEFAULT_FILE))) == 3
    assert "is not the published file" in capsys.readouterr().out
    monkeypatch.setattr(hellaswag, "SHA256", fineweb.sha256(path))
    assert len(hellaswag.hellaswag_items(Path(hellaswag.DEFAULT_FILE))) == 3
    assert capsys.readouterr().out == ""


def test_help_fits_80_columns(monkeypatch, run):
    monkeypatch.setenv("COLUMNS", "80")
    _, said = run(hellaswag, "--help")
    assert max(map(len, said.splitlines())) <= 79 and "{nanogpt,harness,both}" in said


def test_too_few_items_are_one_line(tmp_path):
    path = write_items(tmp_path / "items.jsonl", random_items(3))
    assert len(hellaswag.load(path)) == 3
    with pytest.raises(SystemExit, match="has 3 items, not 10042"):
        hellaswag.load(path, hellaswag.N_ITEMS)


def test_scorer_of_the_offline_dataset(sample, tmp_path, model):
    scorer = hellaswag.open_scorer("nowhere", sample, fineweb.get_tokenizer("bytes"), 128)
    assert scorer.task == "cloze" and list(scorer.batches) == ["nanogpt"] and len(scorer.labels) == 1000
    result = scorer.score(lambda x, y: model(x, y, "none")[1], "nanogpt", 7, tmp_path)
    saved = json.loads((tmp_path / "cloze_nanogpt.json").read_text())
    assert saved["step"] == 7 and len(saved["labels"]) == 1000
    assert saved["predictions"] == result["predictions"]
    right = sum(a == b for a, b in zip(saved["predictions_norm"], saved["labels"]))
    assert result["acc_norm"] == right / 1000
    line = hellaswag.one_line(result)
    assert "cloze (nanogpt): acc" in line and "HellaSwag" not in line
    assert hellaswag.open_scorer("nowhere", sample, None, 128) is None


def test_without_a_network_training_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HELLASWAG_URL", "http://127.0.0.1:9/val.jsonl")
    monkeypatch.setenv("RETRY_SECONDS", "0.01")

    class Tokenizer:
        name = "gpt2"

    assert hellaswag.open_scorer(tmp_path / "no.jsonl", tmp_path, Tokenizer(), 128) is None
    warning = capsys.readouterr().out
    reason = "the HellaSwag validation set could not be downloaded"
    assert f"HellaSwag will not be scored: {reason}" in warning


def test_any_hugging_face_model_by_the_same_code(run, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {chr(i): i for i in range(128)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokenizer.save_pretrained(tmp_path / "model")
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256}
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=128, **shape)).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "model")
    items = random_items(12)
    write_items(tmp_path / "items.jsonl", items)
    options = ["--file", "items.jsonl", "--device", "cpu"]
    status, said = run(hellaswag, "--hf", "model", *options)
    assert status == 0, said
    nanogpt, harness = said.splitlines()[-2:]

    # the same by one item after the other, as the convention's authors do it
    right = 0
    for entry in items:
        context = list(entry["ctx"].encode())
        means = []
        for ending in entry["endings"]:
            tokens = list((" " + ending).encode())
            with torch.no_grad():
                logits = theirs(torch.tensor([context + tokens])).logits[0]
            log_p = logits.log_softmax(-1)
            losses = [-log_p[len(context) + i - 1, token] for i, token in enumerate(tokens)]
            means.append(sum(losses) / len(losses))
        right += int(np.argmin(means)) == entry["label"]
    assert "(nanogpt)" in nanogpt and f"acc_norm {100 * right / 12:.2f}" in nanogpt
    assert "(harness)" in harness

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, said = run(hellaswag, "--hf", "no/such/model", *options)
    assert status == 1 and "no/such/model can't be loaded" in said and said.count("\n") == 1


def test_sentencepiece_models_are_scored_as_lm_eval_does(run, tmp_path, monkeypatch):
    """A tokenizer with a space before the first word and <s> before a text; weights saved in bfloat16."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    items = random_items(6)
    letters = sorted(set("".join(entry["ctx"] + "".join(entry["endings"]) for entry in items)) - {" "})
    names = ["<unk>", "<s>", "▁", *letters, *("▁" + letter for letter in letters)]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [("▁", letter) for letter in letters]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    prepend, replace = tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
    inner.normalizer = tokenizers.normalizers.Sequence([prepend, replace])
    template = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    inner.post_processor = template
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    tokenizer.save_pretrained(tmp_path / "model")
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 512}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(vocabulary), **shape))
    model.bfloat16().save_pretrained(tmp_path / "model")
    write_items(tmp_path / "items.jsonl", items)

    def check(logits_of, batches, labels, convention, device):
        assert logits_of(torch.zeros(1, 1, dtype=torch.int64)).dtype == torch.float32
        n_rows = 0
        for numbers, inputs, targets, _ in batches:
            for place, number in enumerate(numbers):
                for k, ending in enumerate(items[number]["endings"]):
                    # lm_eval 0.4.13: TemplateLM._encode_pair, with HFLM.tok_encode
                    context = tokenizer.encode(items[number]["ctx"])
                    tokens = tokenizer.encode(items[number]["ctx"] + " " + ending)[len(context) :]
                    row, target = inputs[4 * place + k], targets[4 * place + k]
                    length = len(context) + len(tokens) - 1
                    assert row[:length].tolist() == (context + tokens)[:-1] and row[0] == 1
                    assert target[target >= 0].tolist() == tokens
                    assert tokens != tokenizer.encode(" " + ending, add_special_tokens=False)
                    n_rows += 1
        assert n_rows == 24
        raise SystemExit("checked")

    monkeypatch.setattr(hellaswag, "score", check)
    options = ["--file", "items.jsonl", "--device", "cpu", "--convention", "nanogpt"]
    _, said = run(hellaswag, "--hf", "model", *options)
    assert said.splitlines()[-1] == "checked"
