"""The shard writer and the loader."""
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, text

import fineweb


def write(folder, *options):
    """Runs fineweb.py with these options in folder: (exit status, what it printed)."""
    command = [sys.executable, ROOT / "fineweb.py", *map(str, options)]
    quiet = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    result = subprocess.run(command, cwd=folder, **quiet)
    return result.returncode, result.stdout + result.stderr


def documents(n, seed=0):
    return [text(20 + 37 * i % 300, seed + i) for i in range(n)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tokens_in(shard):
    return np.fromfile(shard, dtype=np.uint16, offset=fineweb.HEADER_BYTES)


def tokens_of(folder):
    """All tokens of a folder's shards, in order."""
    paths = sorted(folder.glob("*.bin"), key=lambda path: path.name[-10:])
    return np.concatenate([tokens_in(path) for path in paths])


def straight(texts, name="bytes"):
    """The tokens of documents, without any of the writer's machinery."""
    encoding = fineweb.get_tokenizer(name)
    tokens = []
    for document in texts:
        tokens += [encoding.eot_token, *encoding.encode_ordinary(document)]
    return np.array(tokens)


def bytes_of(folder):
    """{name: content} of a folder's files, without the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".lock")}


def in_process(folder, paths, shard_tokens=5000, last=None, workers=0):
    fineweb.tokenize_files(folder, paths, last, shard_tokens, "bytes", workers)


# ---- writer


def test_bytes_tokenizer_knows_every_byte_and_end_of_text():
    encoding = fineweb.get_tokenizer("bytes")
    every = bytes(range(256)).decode("latin-1")
    assert encoding.n_vocab == 257 and encoding.eot_token == 256
    assert encoding.encode_ordinary(every) == list(every.encode())
    assert encoding.encode_ordinary("<|endoftext|>") == list(b"<|endoftext|>")
    assert encoding.decode(encoding.encode_ordinary(every)) == every


def test_gpt2_tokenizer():
    try:
        encoding = fineweb.get_tokenizer("gpt2")
    except SystemExit:
        pytest.skip("GPT-2's vocabulary is not on this machine and there is no network")
    tokens = encoding.encode_ordinary("Hello, I'm a language model,")
    assert tokens == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    hello, nothing = fineweb.tokenize(["Hello world", ""], True, "gpt2")
    assert hello.tolist() == [50256, 15496, 995] and nothing.tolist() == [50256]
    assert hello.dtype == np.uint16


def test_a_prefix_of_gpt2s_merges_is_a_tokenizer():
    try:
        whole = fineweb.get_tokenizer("gpt2")
    except SystemExit:
        pytest.skip("GPT-2's vocabulary is not on this machine and there is no network")
    prefix = fineweb.get_tokenizer("gpt2-4096")
    text = "Hello world, naïve tokenisation of <|endoftext|>\n\n  costs nothing."
    tokens = prefix.encode_ordinary(text)
    assert prefix.n_vocab == 4096 and prefix.eot_token == 4095 and max(tokens) < 4095
    assert prefix.decode(tokens) == text
    assert len(whole.encode_ordinary(text)) < len(tokens) < len(text.encode())
    for i in (0, 255, 256, 4094):  # the same ids mean the same bytes
        assert prefix.decode_single_token_bytes(i) == whole.decode_single_token_bytes(i)
    assert fineweb.get_tokenizer("gpt2-50257").encode_ordinary(text) == whole.encode_ordinary(text)
    merges = {prefix.decode_single_token_bytes(i) for i in tokens}
    assert all(len(token) == 1 or token in whole._mergeable_ranks for token in merges)


@pytest.mark.parametrize("name", ["gpt2-256", "gpt2-50258", "gpt2-", "gpt3", "gpt2-4096x"])
def test_a_tokenizer_that_there_is_not_is_one_line(name):
    with pytest.raises(SystemExit, match=f"{name}.*gpt2.*bytes"):
        fineweb.get_tokenizer(name)


def own_tokenizer(path, end="</s>"):
    """A small tokenizer.json like SentencePiece's, with what such files say for other uses; its path."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", *[end][: end != ""]]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    inner.train_from_iterator([*documents(40), "</s>", "<endoftext>|"], trainer)
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    inner.enable_truncation(8)
    inner.enable_padding(length=100)
    inner.save(str(path))
    return path


def with_own_tokenizer(tmp_path, **options):
    """(folder of shards, the texts, the path of the tokenizer.json) of a small dataset."""
    path = own_tokenizer(tmp_path / "tokenizer.json")
    texts = [*documents(30), "", "with </s> letters", "of<|endoftext|>the"]
    fineweb.tokenize_files(tmp_path / "out", [write_jsonl(tmp_path / "a.jsonl", texts)], None, 1024, str(path), 0)
    return tmp_path / "out", texts, path


def test_a_tokenizer_of_ones_own(tmp_path):
    import tokenizers

    folder, texts, path = with_own_tokenizer(tmp_path)
    manifest = fineweb.read_manifest(folder)
    name = f"tokenizer-{fineweb.sha256(path)[:16]}.json"
    theirs = tokenizers.Tokenizer.from_file(str(path))
    assert manifest["tokenizer"] == name and manifest["vocab_size"] == theirs.get_vocab_size()
    assert (folder / name).read_bytes() == path.read_bytes()
    theirs.no_truncation()
    theirs.no_padding()
    theirs.encode_special_tokens = True
    expected = []
    for document in [*texts[:-1], "of", "the"]:
        expected += [2, *theirs.encode(document, add_special_tokens=False).ids]
    tokens = tokens_of(folder).tolist()
    assert tokens == expected
    assert tokens.count(2) == len(texts) + 1 and 1 not in tokens and max(map(len, texts)) > 8
    data = fineweb.open_dataset(folder)
    assert data["tokenizer"] == name
    tokenizer = fineweb.get_tokenizer(name, str(folder))  # as the scripts do
    assert tokenizer.eot_token == 2 and tokenizer.n_vocab == manifest["vocab_size"]
    first, second = tokenizer.encode_ordinary("the for")[:1], tokenizer.encode_ordinary("the for")[1:]
    assert tokenizer.decode(first + second) == " the for"
    assert tokenizer.decode(first) + tokenizer.decode(second) == " the for"  # a sample goes on after a prompt


def test_a_changed_tokenizer_is_refused(tmp_path):
    folder, _, path = with_own_tokenizer(tmp_path)
    (copy,) = folder.glob("tokenizer-*.json")
    whole = bytes_of(folder)
    copy.write_text(path.read_text().replace('"version"', ' "version"'))
    fineweb.get_tokenizer.cache_clear()
    with pytest.raises(SystemExit, match=f"{copy} has changed"):
        fineweb.open_dataset(folder)
    copy.unlink()
    with pytest.raises(SystemExit, match=copy.name):
        fineweb.open_dataset(folder)
    copy.write_bytes(path.read_bytes())
    own_tokenizer(tmp_path / "other.json", "<eos>")
    for other in (str(tmp_path / "other.json"), "bytes"):
        with pytest.raises(SystemExit, match=f"{copy.name}', not .*choose another folder"):
            fineweb.tokenize_files(folder, [tmp_path / "a.jsonl"], None, 1024, other, 0)
    assert bytes_of(folder) == whole


def test_a_tokenizer_survives_a_kill_at_every_write(tmp_path):
    path = own_tokenizer(tmp_path / "tokenizer.json")
    text = write_jsonl(tmp_path / "a.jsonl", documents(20))

    def action(folder):
        fineweb.tokenize_files(folder, [text], None, 1024, str(path), 0)

    assert survives_a_kill_at_every_write(tmp_path, action) >= 6


def test_tokenizers_that_cannot_be_used_are_one_line(tmp_path, monkeypatch, run):
    import tokenizers
    from tokenizers import models

    own_tokenizer(tmp_path / "no end.json", "")
    for name, n in (("large", 1 << 16), ("too large", (1 << 16) + 1)):
        vocabulary = {"</s>": 0, **{str(i): i for i in range(1, n)}}
        tokenizers.Tokenizer(models.WordLevel(vocabulary, "1")).save(str(tmp_path / f"{name}.json"))
    assert fineweb.n_vocab(str(tmp_path / "large.json")) == 65_536
    (tmp_path / "bad.json").write_text('{"model": {}}')
    (tmp_path / "a.txt").write_text("some text")
    facts = {"no end": "</s>", "too large": "65,537", "bad": "not a tokenizer.json", "nowhere": "No such file"}
    for name, fact in facts.items():
        status, said = run(fineweb, "--files", "a.txt", "--tokenizer", f"{name}.json", "--out", "out")
        assert status == 1 and f"{name}.json" in said and fact in said and said.count("\n") == 1, said
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    status, said = run(fineweb, "--files", "a.txt", "--tokenizer", "bad.json", "--out", "out")
    assert status == 1 and "pip install tokenizers" in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_tokenizer_of_ones_own_on_the_command_line(tmp_path):
    path = own_tokenizer(tmp_path / "tokenizer.json")
    write_jsonl(tmp_path / "a.jsonl", documents(300))
    options = ["--files", "a.jsonl", "--tokenizer", path, "--shard_tokens", 5000, "--workers"]
    assert write(tmp_path, *options, 0, "--out", "inline")[0] == 0
    status, said = write(tmp_path, *options, 2, "--out", "out")
    assert status == 0 and "--vocab_size 128" in said, said
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "inline")


def test_shards_hold_the_documents_in_order(tmp_path):
    texts = documents(40)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    in_process(tmp_path / "out", [path])
    expected = straight(texts)
    assert np.array_equal(tokens_of(tmp_path / "out"), expected)
    manifest = fineweb.read_manifest(tmp_path / "out")
    assert manifest["complete"]
    assert manifest["tokenizer"] == "bytes" and manifest["vocab_size"] == 257
    counts = [shard["tokens"] for shard in manifest["shards"]]
    assert sum(counts) == len(expected) and set(counts[1:-1]) == {5000}
    header = np.fromfile(tmp_path / "out/fineweb_val_000000.bin", dtype=np.int32, count=256)
    assert header[:3].tolist() == [20240520, 1, counts[0]] and not header[3:].any()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_result_does_not_depend_on_the_number_of_workers(tmp_path, workers):
    path = write_jsonl(tmp_path / "a.jsonl", documents(700))
    in_process(tmp_path / "inline", [path], 50_000)
    options = ["--tokenizer", "bytes", "--shard_tokens", 50_000, "--workers", workers]
    status, said = write(tmp_path, "--files", path, *options, "--out", "out")
    assert status == 0, said
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "inline")


def test_stopped_after_any_shard_it_goes_on_to_the_same_bytes(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = documents(30)
    parquet = tmp_path / "b.parquet"
    table = pyarrow.table({"text": texts, "id": list(range(30))})
    pyarrow.parquet.write_table(table, parquet, row_group_size=7)
    story = tmp_path / "c.txt"
    story.write_text("\n".join(text(200, i) for i in range(20)))
    paths = [write_jsonl(tmp_path / "a.jsonl", documents(30, 100)), parquet, story]
    in_process(tmp_path / "whole", paths)
    whole = bytes_of(tmp_path / "whole")
    n_shards = len(whole) - 1
    assert n_shards > 6
    for stop in range(n_shards):
        in_process(tmp_path / "out", paths, last=stop)
        assert len(list((tmp_path / "out").glob("*.bin"))) == stop + 1
        in_process(tmp_path / "out", paths)
        assert bytes_of(tmp_path / "out") == whole
        shutil.rmtree(tmp_path / "out")
    expected = straight(documents(30, 100) + texts + [story.read_text()])
    assert np.array_equal(tokens_of(tmp_path / "whole"), expected)


@pytest.mark.slow
def test_killed_and_run_again_gives_the_same_bytes_and_redoes_no_finished_shard(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(3000))
    options = ["--files", path, "--tokenizer", "bytes"]
    options += ["--shard_tokens", "20000", "--workers", "2", "--out"]
    assert write(tmp_path, *options, "whole")[0] == 0
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "fineweb.py", *options, out]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **silent)
    while len(list(out.glob("*.bin"))) < 5 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    listed = [shard["name"] for shard in fineweb.read_manifest(out)["shards"]]
    assert 5 <= len(listed) + 1 and not fineweb.read_manifest(out)["complete"]
    before = {name: (out / name).stat().st_mtime_ns for name in listed}
    assert write(tmp_path, *options, out)[0] == 0
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert {name: (out / name).stat().st_mtime_ns for name in listed} == before


def test_verify_names_the_bad_shards_and_the_writer_rebuilds_them(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(40))
    out = tmp_path / "out"
    in_process(out, [path])
    whole = bytes_of(out)
    fineweb.verify(out)
    with open(out / "fineweb_train_000002.bin", "r+b") as f:
        f.seek(3000)
        f.write(b"\x01\x02")
    (out / "fineweb_val_000000.bin").unlink()
    with pytest.raises(SystemExit, match="remove .*val_000000.bin .*train_000002.bin"):
        fineweb.verify(out)
    (out / "fineweb_train_000002.bin").unlink()
    in_process(out, [path])
    assert bytes_of(out) == whole


@pytest.mark.parametrize("name, content, fact", [
    ("a.jsonl", b'{"text": "one"}\n{"txt": "two"}\n', "a.jsonl .*line 2"),
    ("a.jsonl", b'{"text": "one"}\nnonsense\n', "a.jsonl .*line 2"),
    ("a.jsonl", b'\n{"text": 7}\n', "a.jsonl .*line 2"),
    ("a.txt", b"abc \xff\xfe def", "a.txt .*utf-8"),
    ("a.txt.gz", b"not packed", "a.txt.gz"),
    ("a.parquet", b"PAR1 no, it is not", "a.parquet"),
    ("a.csv", b"text\nhello\n", "a.csv .*.jsonl"),
])  # fmt: skip
def test_unreadable_text_is_one_line(tmp_path, name, content, fact):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=fact):
        in_process(tmp_path / "out", [tmp_path / name])


def test_parquet_without_text_is_one_line(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"content": ["a"], "id": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(SystemExit, match='a.parquet.*"text"'):
        in_process(tmp_path / "out", [tmp_path / "a.parquet"])


TEXTS = ["One.", "", "Zwei €.", "Three."]


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", lines(*TEXTS)),
    ("a.jsonl", b"\xef\xbb\xbf" + lines(*TEXTS).replace(b"\n", b"\n\n").replace(b'""', b"null")),
    ("a.jsonl.gz", gzip.compress(lines(*TEXTS), mtime=0)),
    ("a.jsonl", lines("One.<|endoftext|>", "", "Zwei €.<|endoftext|>Three.<|endoftext|>\n")),
], ids=["plain", "odd", "packed", "separators"])  # fmt: skip
def test_the_same_documents_however_they_are_packed(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    in_process(tmp_path / "out", [tmp_path / name])
    assert tokens_of(tmp_path / "out").tolist() == straight(TEXTS).tolist()
    said = capsys.readouterr().out
    if b"<|endoftext|>" in content:
        assert said.startswith("3 times <|endoftext|>") and "--keep_separators" in said
    else:
        assert said == ""


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_separators_can_be_kept_as_letters(run, tmp_path, workers):
    texts = ["One.<|endoftext|>", "<|endoftext|>Two.<|endoftext|>\n", "x" * 3000]
    write_jsonl(tmp_path / "a.jsonl", texts)
    options = ["--files", "a.jsonl", "--tokenizer", "bytes", "--workers", workers, "--out", "out"]
    status, said = run(fineweb, *options, "--keep_separators")
    assert status == 0 and "times <|endoftext|>" not in said, said
    assert tokens_of(tmp_path / "out").tolist() == straight(texts).tolist()
    whole = bytes_of(tmp_path / "out")
    status, said = run(fineweb, *options)
    assert status == 1 and "keep_separators = True, not None" in said, said
    assert bytes_of(tmp_path / "out") == whole
    status, said = run(fineweb, *options[:-1], "parted")
    assert status == 0 and "3 times <|endoftext|>" in said, said
    status, said = run(fineweb, *options[:-1], "parted", "--keep_separators")
    assert status == 1 and "keep_separators = None, not True" in said, said


def test_separators_in_a_txt_file_part_documents(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"One.<|endoftext|>Two.<|endoftext|>\n"))
    in_process(tmp_path / "out", [tmp_path / "a.txt.gz"])
    assert tokens_of(tmp_path / "out").tolist() == straight(["One.", "Two."]).tolist()


def test_a_long_run_of_blanks_is_tokenised_in_parts_to_the_same_tokens():
    try:
        encoding = fineweb.get_tokenizer("gpt2")
    except SystemExit:
        pytest.skip("GPT-2's vocabulary is not on this machine and there is no network")
    for blanks in (" " * 70_000, "\n" * 70_000, " " * 50_000, "\t" * 50_001):
        text = "a" + blanks + "word"
        (tokens,) = fineweb.tokenize([text], False, "gpt2")
        assert tokens.tolist() == encoding.encode_ordinary(text)


@pytest.mark.parametrize("rows", [1, 40])
def test_batches_are_bounded_by_their_bytes(tmp_path, rows):
    (tmp_path / "a.jsonl").write_bytes(lines(*["x" * (3_000_000 // rows)] * rows))
    batches = list(fineweb.read_documents(tmp_path / "a.jsonl"))
    assert sum(len(texts) for _, texts, _ in batches) == rows
    assert all(sum(map(len, texts[:-1])) < 1 << 20 for _, texts, _ in batches)


def test_other_text_into_the_same_folder_is_refused(tmp_path):
    in_process(tmp_path / "out", [write_jsonl(tmp_path / "a.jsonl", documents(20))])
    whole = bytes_of(tmp_path / "out")
    with pytest.raises(SystemExit, match="files = "):
        in_process(tmp_path / "out", [write_jsonl(tmp_path / "b.jsonl", documents(20))])
    with pytest.raises(SystemExit, match="shard_tokens = 5000, not 6000"):
        in_process(tmp_path / "out", [tmp_path / "a.jsonl"], shard_tokens=6000)
    assert bytes_of(tmp_path / "out") == whole


def test_of_many_files_the_first_that_differs_is_named(tmp_path, monkeypatch):
    paths = []
    for number in range(300):
        paths.append(tmp_path / f"{number:03d}.txt")
        paths[-1].write_text(text(10, number))
    in_process(tmp_path / "out", paths)
    whole = bytes_of(tmp_path / "out")
    paths[7].write_text("longer than before " * 10)
    size = paths[7].stat().st_size
    with pytest.raises(SystemExit, match=rf"\['007.txt', \d+\], not \['007.txt', {size}\]: choose") as error:
        in_process(tmp_path / "out", paths)
    assert "006.txt" not in str(error.value) and "008.txt" not in str(error.value)
    paths[7].write_text(text(10, 7))
    for less, fact in ((paths[:-1], r"\['299.txt', \d+\], not None"), (paths[1:], "'000.txt'.* not .*'001.txt'")):
        with pytest.raises(SystemExit, match=fact):
            in_process(tmp_path / "out", less)
    with pytest.raises(SystemExit, match="nowhere.txt is not a") as error:
        in_process(tmp_path / "out", [*paths[:5], tmp_path / "nowhere.txt", *paths[6:]])
    assert "000.txt" not in str(error.value)
    monkeypatch.chdir(tmp_path)
    in_process(tmp_path / "out", [Path(path.name) for path in paths])  # the same, spelt otherwise
    assert bytes_of(tmp_path / "out") == whole


@pytest.mark.parametrize("options, message", [
    (["--shards", "0"], "--shards 0: "),
    (["--shards", "-1"], "--shards -1: "),
    (["--shard_tokens", "5"], "--shard_tokens 5: must be from 1,024 to 2,147,483,647"),
    (["--shard_tokens", 2**31], "--shard_tokens 2147483648: must be from 1,024 to 2,147,483,647"),
    (["--workers", "-1"], "--workers -1: "),
    (["--files", "nowhere.txt"], "nowhere.txt is not a"),
    (["--files", "."], ". is not a"),
    (["--files"], "--files: "),
    (["--files", "a.txt", "--out", "a.txt/b"], "a.txt/b can't be written"),
    (["--files", "a.txt", "--out", "a.txt"], "a.txt can't be written"),
    (["--files", "a.txt", "--out", "a" * 300], "File name too long"),
    (["--verify", "--out", "nowhere"], "nowhere has no manifest.json"),
    (["--verify", "--out", "a.txt"], "a.txt has no manifest.json"),
    (["--files", "a.txt", "--pretokenized"], "--files and --pretokenized"),
    (["--files", "a.txt", "--dataset", "fineweb-edu"], "--files and --dataset"),
    (["--pretokenized", "--shard_tokens", "5000"], "--pretokenized and --shard_tokens"),
    (["--pretokenized", "--keep_separators"], "--pretokenized and --keep_separators"),
])  # fmt: skip
def test_options_that_cannot_be_are_one_line(run, tmp_path, options, message):
    (tmp_path / "a.txt").write_text("some text")
    if "--pretokenized" not in options:
        options = ["--tokenizer", "bytes", *options]
    status, said = run(fineweb, *options)
    assert status == 1 and message in said and said.count("\n") == 1, said
    assert (tmp_path / "a.txt").read_text() == "some text"


@pytest.mark.parametrize("options, facts", [
    (["--shard", "1"], ["--shard", "--shards"]),  # what it may mean
    (["--dataset", "c4"], ["--dataset", "c4", "fineweb-edu"]),
    (["--shards", "many"], ["--shards", "many"]),
    (["--tokenizer", "gpt4"], ["gpt4", "gpt2", "bytes"]),
])  # fmt: skip
def test_wrong_options_are_named(tmp_path, options, facts):
    status, said = write(tmp_path, *options)
    assert status and all(fact in said for fact in facts), said
    assert not list(tmp_path.iterdir())


def test_missing_vocabulary_is_one_line(tmp_path):
    shutil.copy(__file__, tmp_path / "a.txt")
    command = [sys.executable, ROOT / "fineweb.py", "--files", "a.txt"]
    cache = str(tmp_path / "empty")
    nowhere = {**os.environ, "TIKTOKEN_CACHE_DIR": cache, "https_proxy": "http://127.0.0.1:9"}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=nowhere)
    assert result.returncode == 1
    for way_out in ("TIKTOKEN_CACHE_DIR", "vocab.bpe", "encoder.json", "data/gpt2/"):
        assert way_out in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_vocabulary_that_does_not_come_is_given_up(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    never = threading.Event()
    fineweb.get_tokenizer.cache_clear()
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: never.wait(60))
    monkeypatch.setattr(fineweb, "NO_ANSWER", 0.05)
    with pytest.raises(SystemExit, match="GPT-2.*TimeoutError"):
        fineweb.get_tokenizer("gpt2")
    never.set()


def test_too_little_disk_space_stops_before_a_shard_is_written(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", documents(40))
    full = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(SystemExit, match="make room.* --out.* --shards N"):
        in_process(tmp_path / "out", [path])
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("size, steps", [(2_000, 1), (1_200_000, 2)])
def test_the_last_line_is_a_command_for_one_epoch(run, tmp_path, size, steps):
    (tmp_path / "a.txt").write_text("word " * (size // 5))
    options = ["--tokenizer", "bytes", "--workers", 0, "--out", "my out"]
    status, said = run(fineweb, "--files", "a.txt", *options)
    assert status == 0
    command = f"--data_dir 'my out' --max_steps {steps} --warmup_steps 1 --vocab_size 384"
    assert said.splitlines()[-1] == f"Next: python train_gpt2.py {command}"


def test_files_of_three_kinds_on_the_command_line(run, tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = documents(9)
    write_jsonl(tmp_path / "a.jsonl", texts[:4])
    (tmp_path / "b.txt").write_text(texts[4])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[5:]}), tmp_path / "c.parquet")
    options = ["--tokenizer", "bytes", "--workers", 0, "--out", "data/mine"]
    status, said = run(fineweb, "--files", "a.jsonl", "b.txt", "c.parquet", *options)
    assert status == 0, said
    assert np.array_equal(tokens_of(tmp_path / "data/mine"), straight(texts))


def test_sample_dataset(sample):
    manifest = fineweb.read_manifest(sample)
    assert manifest["tokenizer"] == "bytes" and manifest["complete"] and manifest["dataset"] == "sample"
    tokens = tokens_of(sample)
    assert 800_000 < len(tokens) < 2_000_000
    assert len(tokens_in(sample / "fineweb_val_000000.bin")) == 131_073  # --tiny validates on 65,536 of them
    assert tokens.max() == 256 and (tokens == 256).mean() < 0.01
    letters = np.isin(tokens, np.frombuffer(b"etaoinshr ", dtype=np.uint8))
    assert letters.mean() > 0.6  # it is English
    assert bytes_of(sample).keys() == {"manifest.json", "fineweb_val_000000.bin", "fineweb_train_000001.bin"}


def test_the_sample_is_of_python_alone_and_has_no_paragraph_twice():
    program = "import fineweb, hashlib; print(hashlib.sha256('|'.join(fineweb.sample_documents()).encode()).hexdigest())"
    text = "|".join(fineweb.sample_documents())
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == hashlib.sha256(text.encode()).hexdigest()
    paragraphs = [paragraph for document in text.split("|") for paragraph in document.strip().split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 3000
    for foreign in ("numpy", "torch", "tkinter", "IDLE", "turtle"):
        assert text.count(foreign) < 20, foreign


def test_the_sample_of_an_older_version_is_neither_used_nor_touched(sample, tmp_path):
    folder = shutil.copytree(sample, tmp_path / "sample")
    manifest = fineweb.read_manifest(folder)
    fineweb.write_manifest(folder, manifest | {"files": ["documentation of Python, numpy and torch"]})
    before = bytes_of(folder)
    with pytest.raises(SystemExit, match=f"{folder} .*numpy.*move"):
        fineweb.write_sample(folder)
    assert bytes_of(folder) == before


def test_a_sample_of_another_python_stays(sample, tmp_path, capsys):
    folder = shutil.copytree(sample, tmp_path / "sample")
    fineweb.write_manifest(folder, fineweb.read_manifest(folder) | {"revision": "3.0.0"})
    before = bytes_of(folder)
    fineweb.write_sample(folder)
    assert capsys.readouterr().out == "" and bytes_of(folder) == before


# ---- nothing lost


class Killed(BaseException):
    pass


def killed_at(number, before, action):
    """Runs action() and kills it just before or after its write with this number; whether it came so far."""
    count = 0
    replace = os.replace

    def counting(source, target):
        nonlocal count
        count += 1
        if count == number and before:
            raise Killed
        replace(source, target)
        if count == number:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", counting)
        try:
            action()
        except Killed:
            return True
    return False


def survives_a_kill_at_every_write(tmp_path, action):
    """action(folder) is killed at each of its writes in turn and run again: (writes, the bytes each time)."""
    action(tmp_path / "whole")
    whole = bytes_of(tmp_path / "whole")
    number = 1
    while True:
        for before in (True, False):
            folder = tmp_path / f"killed-{number}-{before}"
            folder.mkdir()
            (folder / "notes.tmp").write_text("mine")
            was_killed = killed_at(number, before, lambda folder=folder: action(folder))
            if not was_killed:
                return number - 1
            action(folder)
            assert bytes_of(folder) == whole | {"notes.tmp": b"mine"}, (number, before)
            fineweb.verify(folder)
        number += 1


@pytest.mark.parametrize("shard_tokens", [5000, "whole"])
def test_files_survive_a_kill_at_every_write(tmp_path, shard_tokens):
    path = write_jsonl(tmp_path / "a.jsonl", documents(20))
    n_tokens = len(straight(documents(20)))
    if shard_tokens == "whole":  # the text ends with its last shard
        shard_tokens = n_tokens - max(1024, path.stat().st_size // 40)
    writes = survives_a_kill_at_every_write(tmp_path, lambda out: in_process(out, [path], shard_tokens))
    assert writes >= 5


def test_the_sample_survives_a_kill_at_every_write(tmp_path, monkeypatch):
    texts = documents(20) + [letter * 150_000 for letter in "abcd"]
    monkeypatch.setattr(fineweb, "sample_documents", lambda: texts)
    assert survives_a_kill_at_every_write(tmp_path, fineweb.write_sample) == 5


THEIRS = {"notes.txt": "mine", "results.tmp": "mine", "raw/a.parquet": "mine", ".cache/huggingface/x": "mine"}


def put_theirs(folder, **more):
    for name, content in (THEIRS | more).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def check_theirs(folder, **more):
    for name, content in (THEIRS | more).items():
        assert (folder / name).read_text() == content


@pytest.fixture
def little_sample(monkeypatch):
    texts = documents(20) + [letter * 150_000 for letter in "abcd"]
    monkeypatch.setattr(fineweb, "sample_documents", lambda: texts)


def test_the_sample_leaves_what_is_not_its_own(tmp_path, capsys, little_sample):
    out = tmp_path / "sample"
    put_theirs(out)
    fineweb.write_sample(out)
    check_theirs(out)
    whole = (out / "fineweb_train_000001.bin").read_bytes()
    (out / "fineweb_train_000001.bin").unlink()
    fineweb.write_sample(out)
    assert (out / "fineweb_train_000001.bin").read_bytes() == whole
    (out / "fineweb_train_000001.bin").write_bytes(whole[:-1])
    (out / "manifest.json.77.tmp").write_text("of a killed one")
    fineweb.write_sample(out)
    assert (out / "fineweb_train_000001.bin").read_bytes() == whole
    assert not (out / "manifest.json.77.tmp").exists()
    check_theirs(out)
    capsys.readouterr()
    fineweb.write_sample(out)
    assert capsys.readouterr().out == ""  # nothing was written


@pytest.mark.parametrize("last", [None, 1])
def test_the_sample_into_a_foreign_dataset_is_one_line(tmp_path, little_sample, last):
    out = tmp_path / "out"
    in_process(out, [write_jsonl(tmp_path / "a.jsonl", documents(30))], last=last)
    put_theirs(out)
    before = bytes_of_all(out)
    with pytest.raises(SystemExit, match="out holds shards with dataset = 'files'"):
        fineweb.write_sample(out)
    assert bytes_of_all(out) == before


def bytes_of_all(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    return {path: path.read_bytes() for path in files}


def test_two_writers_in_one_folder(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(40))
    holder = """
import fineweb, pathlib, time
fineweb.lock(pathlib.Path("out"), "")
print("locked", flush=True)
time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", holder]
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "locked\n"
        options = ["--files", path, "--tokenizer", "bytes", "--workers", 0, "--out", "out"]
        status, said = write(tmp_path, *options)
        assert status == 1 and said.count("\n") == 1, said
        assert "out is in use" in said and "choose another --out" in said
        assert not list((tmp_path / "out").glob("*.bin"))
    finally:
        first.kill()
        first.wait()
    status, said = write(tmp_path, *options)
    assert status == 0, said


@pytest.mark.slow
def test_the_second_to_find_no_sample_waits_for_the_first(tmp_path):
    program = """
import fineweb, os, pathlib, time
def documents():
    time.sleep(0.5)
    return ["of the " * 50] + [letter * 150_000 for letter in "abcd"]
fineweb.sample_documents = documents
folder = pathlib.Path("sample")
fineweb.write_sample(folder)
fineweb.verify(folder)
print("at", (folder / "fineweb_train_000001.bin").stat().st_mtime_ns)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    all = [subprocess.Popen(command, cwd=tmp_path, env=environment, **quiet) for _ in range(3)]
    written = set()
    for process in all:
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
        written.add(said.splitlines()[-1])
    assert len(written) == 1  # once


def children(pid):
    """The ids of a process' children, by /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if fields[1] == str(pid) and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_end_when_the_main_process_is_killed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(3000) * 10)
    options = ["--files", path, "--tokenizer", "bytes", "--shard_tokens", "20000", "--workers", "2"]
    command = [sys.executable, ROOT / "fineweb.py", *options, "--out", "out"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=tmp_path, **silent)
    while not list(tmp_path.glob("out/*.bin")) and process.poll() is None:
        time.sleep(0.01)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in workers)


def test_a_truncated_shard_is_written_again(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", documents(40))
    out = tmp_path / "out"
    in_process(out, [path])
    whole = bytes_of(out)
    for name in ("fineweb_val_000000.bin", "fineweb_train_000002.bin", max(whole.keys() - {"manifest.json"})):
        (out / name).write_bytes(whole[name][:-100])
    in_process(out, [path])
    assert f"{out / 'fineweb_train_000002.bin'} is missing or damaged" in capsys.readouterr().out
    assert bytes_of(out) == whole


def test_a_source_that_became_shorter_is_one_line(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(40))
    out = tmp_path / "out"
    in_process(out, [path])
    size = path.stat().st_size
    path.write_text(json.dumps({"text": "short"}) + " " * size)
    os.truncate(path, size)
    last = sorted(out.glob("*_train_*.bin"))[-1]
    last.unlink()
    with pytest.raises(SystemExit, match=f"{last.name} .*source has changed"):
        in_process(out, [path])
    assert not last.exists()


@pytest.mark.parametrize("name, content", [("a.jsonl", b""), ("a.txt", b"")])
def test_no_text_is_one_line_and_can_be_mended(run, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    options = ["--files", name, "--tokenizer", "bytes", "--workers", 0, "--out", "out"]
    status, said = run(fineweb, *options)
    assert status == 1 and "no text" in said.splitlines()[-1], said
    write_jsonl(tmp_path / "a.jsonl", documents(10))
    (tmp_path / "a.txt").write_text(text(2000, 0))
    status, said = run(fineweb, *options)
    assert status == 0, said


def test_text_for_a_validation_shard_only_is_not_a_success(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["short"])
    options = ["--files", "a.jsonl", "--tokenizer", "bytes", "--workers", 0, "--out", "out"]
    status, said = run(fineweb, *options)
    assert status == 1 and "out has no training shard" in said.splitlines()[-1], said


def test_run_again_needs_room_only_for_what_is_missing(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", documents(40))
    out = tmp_path / "out"
    in_process(out, [path], last=2)
    done = sum(2 * shard["tokens"] for shard in fineweb.read_manifest(out)["shards"])
    missing = 2 * path.stat().st_size - done  # a token is two bytes, and there are as many as bytes, or fewer
    free = [missing - 1]
    full = shutil._ntuple_diskusage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full(10**9, 10**9, free[0]))
    with pytest.raises(SystemExit, match="make room"):
        in_process(out, [path])
    free[0] += 1
    in_process(out, [path])
    free[0] = 0
    in_process(out, [path])  # everything is there
    (out / "fineweb_train_000002.bin").unlink()
    with pytest.raises(SystemExit, match="make room"):
        in_process(out, [path])
    free[0] = 10_000
    in_process(out, [path])


def test_the_bar_ends_at_100_percent(tmp_path, capsys):
    paths = [write_jsonl(tmp_path / "a.jsonl", documents(300))]
    for last in (3, None, None):
        in_process(tmp_path / "out", paths, 10_000, last)
        assert "100%|" in capsys.readouterr().err.splitlines()[-1]


# ---- loader


def small_dataset(tmp_path, capsys=None):
    in_process(tmp_path / "data", [write_jsonl(tmp_path / "a.jsonl", documents(120))])
    if capsys:
        capsys.readouterr()  # drops what the writer printed
    return tmp_path / "data"


@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000, 99_999])
def test_an_epoch_has_each_window_once(n):
    assert np.array_equal(np.sort(fineweb.epoch_order(n, 3, 1)), np.arange(n))


def test_the_order_is_of_the_seed_and_the_epoch_and_never_changes():
    order = fineweb.epoch_order(100_000, 1337, 0)
    assert order[:4].tolist() == PUBLISHED_ORDER
    for other in ((1337, 1), (1338, 0)):
        assert (order == fineweb.epoch_order(100_000, *other)).mean() < 0.001


PUBLISHED_ORDER = [27302, 8855, 98261, 24501]


def test_one_epoch_of_the_real_run_fits_100_shards():
    windows = 100 * ((100_000_000 - 1) // 1024)
    assert 19_073 * 512 == 9_765_376 <= windows == 9_765_600


def test_batches_are_the_same_for_any_number_of_ranks(tmp_path):
    windows = fineweb.Windows(small_dataset(tmp_path), "train", 32)
    for step in (0, 1, 7, 100):  # 100 is some epochs on
        whole = fineweb.Loader(windows, 16, seed=5).batch(step)
        assert whole.shape == (16, 33)
        for world in (2, 4, 8):
            loaders = [fineweb.Loader(windows, 16, 5, rank, world) for rank in range(world)]
            parts = [loader.batch(step) for loader in loaders]
            assert all(len(part) == 16 // world for part in parts)
            assert np.array_equal(np.concatenate(parts), whole)


def test_every_window_once_per_epoch_and_each_epoch_in_another_order(tmp_path):
    windows = fineweb.Windows(small_dataset(tmp_path), "train", 32)
    loader = fineweb.Loader(windows, 16, seed=5)
    n = len(windows)
    steps = -(-3 * n // 16)
    assert n % 16  # so that an epoch ends within a batch
    ids = np.concatenate([loader.ids(step) for step in range(steps)])
    epochs = [ids[k * n : (k + 1) * n] for k in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(n))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(np.sort(epochs[0][:16]), np.arange(16))


def test_windows_are_the_text_and_never_cross_a_shard(tmp_path):
    folder = small_dataset(tmp_path)
    windows = fineweb.Windows(folder, "train", 32)
    rows = iter(windows.rows(np.arange(len(windows))))
    for path in sorted(folder.glob("*_train_*.bin")):
        tokens = tokens_in(path).astype(np.int64)
        for k in range((len(tokens) - 1) // 32):
            assert np.array_equal(next(rows), tokens[32 * k : 32 * k + 33])
    assert next(rows, None) is None


def test_more_shards_than_asked_for_change_nothing(tmp_path):
    folder = small_dataset(tmp_path)
    three = fineweb.Windows(folder, "train", 32, max_shards=3)
    for path in sorted(folder.glob("*_train_*.bin"))[3:]:
        path.unlink()
    assert len(three) == len(fineweb.Windows(folder, "train", 32, max_shards=100))


def test_validation_is_the_beginning_of_its_shard(tmp_path, capsys):
    folder = small_dataset(tmp_path, capsys)
    windows = fineweb.Windows(folder, "val", 32, max_tokens=320)
    tokens = tokens_in(folder / "fineweb_val_000000.bin")
    assert len(windows) == 10
    assert np.array_equal(windows.rows(range(10))[:, :-1].ravel(), tokens[:320])
    assert capsys.readouterr().out == ""
    fineweb.Windows(folder, "val", 32, max_tokens=10**6)
    assert "of 1,000,000 val tokens" in capsys.readouterr().out


def test_data_that_repeat_give_a_warning(tmp_path, capsys):
    windows = fineweb.Windows(small_dataset(tmp_path, capsys), "train", 32)
    fineweb.Loader(windows, 16, 0, max_steps=len(windows) // 16)
    assert capsys.readouterr().out == ""
    fineweb.Loader(windows, 16, 0, max_steps=len(windows) // 16 + 1)
    steps = len(windows) // 16
    warning = capsys.readouterr().out
    assert f"the data last for {steps} steps of {steps + 1}: from step {steps} on" in warning


def test_bad_datasets_are_one_line_with_the_way_out(tmp_path):
    with pytest.raises(SystemExit, match="nowhere: run `python fineweb.py`.* --tiny"):
        fineweb.open_dataset(tmp_path / "nowhere")
    folder = small_dataset(tmp_path)
    data = fineweb.open_dataset(folder)
    assert data["tokenizer"] == "bytes" and data["vocab_size"] == 257
    with pytest.raises(SystemExit, match="257.* 256: .* --vocab_size 384"):
        fineweb.open_dataset(folder, 256)
    with pytest.raises(SystemExit, match="bytes .*gpt2 .*--data_dir"):
        fineweb.open_dataset(folder, before={"tokenizer": "gpt2", "fingerprint": ""})
    shard = folder / "fineweb_train_000002.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(SystemExit, match="000002.bin is truncated.*5,000"):
        fineweb.open_dataset(folder)
    shard.write_bytes(b"something else entirely" * 100)
    with pytest.raises(SystemExit, match="000002.bin is not a token shard"):
        fineweb.open_dataset(folder)
    shard.unlink()
    with pytest.raises(SystemExit, match="000002.bin has no tokens, by manifest.json 5000"):
        fineweb.open_dataset(folder)
    shard.write_bytes(content)
    shutil.copy(shard, folder / "fineweb_train_000077.bin")
    with pytest.raises(SystemExit, match="000077.bin has 5000 tokens, by manifest.json none"):
        fineweb.open_dataset(folder)
    (folder / "fineweb_train_000077.bin").unlink()
    (folder / "manifest.json").write_text("{")
    with pytest.raises(SystemExit, match="is not a manifest"):
        fineweb.open_dataset(folder)
    with pytest.raises(SystemExit, match="no val shard of 1000001 tokens"):
        fineweb.Windows(folder, "val", 1_000_000)


def test_other_data_than_before_gives_a_warning(tmp_path, capsys):
    folder = small_dataset(tmp_path, capsys)
    data = fineweb.open_dataset(folder)
    assert fineweb.open_dataset(folder, before=data) == data
    assert capsys.readouterr().out == ""
    fineweb.open_dataset(folder, before={**data, "fingerprint": "other"})
    assert "is not the data that the run began with" in capsys.readouterr().out


def test_shards_beyond_those_used_change_nothing(tmp_path, capsys):
    folder = small_dataset(tmp_path, capsys)
    names = sorted(path.name for path in folder.glob("*_train_*.bin"))
    assert len(names) > 2
    two = fineweb.open_dataset(folder, train_shards=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"] = [shard for shard in manifest["shards"] if shard["name"] not in names[2:]]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name in names[2:]:
        (folder / name).unlink()
    assert fineweb.open_dataset(folder, train_shards=2) == fineweb.open_dataset(folder) == two


def test_shards_without_a_manifest_are_taken_for_gpt2(tmp_path, capsys):
    folder = small_dataset(tmp_path, capsys)
    (folder / "manifest.json").unlink()
    assert fineweb.open_dataset(folder)["tokenizer"] == "gpt2"
    assert "taking its shards for GPT-2 tokens" in capsys.readouterr().out


def gpt2_tokens(n, seed=0):
    """n random ids of GPT-2's, some of them <|endoftext|>."""
    tokens = np.random.default_rng(seed).integers(50257, size=n, dtype=np.uint16)
    tokens[::500] = 50256
    return tokens


def save_shard(path, tokens):
    """Writes tokens as the authors of a shard of this name do."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, tokens)
    elif path.name in ("train.bin", "val.bin"):
        tokens.tofile(path)
    else:
        path.write_bytes(fineweb.shard_header(len(tokens)) + tokens.tobytes())


@pytest.mark.parametrize("val, train", [
    ("tiny_shakespeare_val.bin", ["tiny_shakespeare_train.bin"]),
    ("val.bin", ["train.bin"]),
    ("edufineweb_val_000000.npy", ["edufineweb_train_000001.npy", "edufineweb_train_000002.npy"]),
    ("fineweb_val_000000.bin", ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]),
])  # fmt: skip
def test_shards_of_others_are_read_as_they_are(tmp_path, val, train):
    folder = tmp_path / "theirs"
    for number, name in enumerate([val, *train]):
        save_shard(folder / name, gpt2_tokens(3001 + number, number))
    (folder / "gpt2_tokenizer.bin").write_text("no shard")
    (folder / "meta.pkl").write_text("no shard")
    data = fineweb.open_dataset(folder, train_shards=100)
    assert data["tokenizer"] == "gpt2" and data["vocab_size"] == 50257
    windows = fineweb.Windows(folder, "val", 1000)
    assert np.array_equal(windows.rows([2])[0], gpt2_tokens(3001, 0)[2000:])
    windows = fineweb.Windows(folder, "train", 1000)
    last = gpt2_tokens(3001 + len(train), len(train))[2000:3001]
    assert np.array_equal(windows.rows([3 * len(train) - 1])[0], last) and len(windows) == 3 * len(train)


@pytest.mark.parametrize("name", ["train.bin", "a_train_000001.npy"])
@pytest.mark.parametrize("what", ["32 bits", "no end", "letters", "other vocabulary", "odd size", "empty", "table"])
def test_shards_of_another_vocabulary_are_not_mistaken_for_gpt2s(tmp_path, name, what):
    tokens = gpt2_tokens(300_000)
    if what == "32 bits":  # of LLaMA 3, by whose lower halves <|endoftext|> is there
        tokens = np.random.default_rng(0).integers(50257, size=300_000, dtype=np.uint32)
        tokens[::7] += 65536
    elif what == "no end":
        tokens[tokens == 50256] = 11
    elif what == "letters":
        tokens %= 65
    elif what == "other vocabulary":
        tokens[1000] = 50257
    elif what == "empty":
        tokens = tokens[:0]
    elif what == "table":
        tokens = tokens.reshape(-1, 2) if name.endswith("npy") else tokens + np.uint16(40000)
    save_shard(tmp_path / name, tokens)
    if what == "odd size":
        os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - 1)
    with pytest.raises(SystemExit, match=f"{name} is not a token shard") as error:
        fineweb.open_dataset(tmp_path)
    assert "remove" not in str(error.value) and (tmp_path / name).exists()


def test_a_shard_without_header_must_have_nanogpts_name(tmp_path):
    gpt2_tokens(5000).tofile(tmp_path / "a_train_000001.bin")
    with pytest.raises(SystemExit, match="a_train_000001.bin is not a token shard"):
        fineweb.open_dataset(tmp_path)


def test_llama3s_shards_are_named(tmp_path):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240801, 7, 1000
    tokens = np.arange(127_000, 128_000, dtype=np.uint32)
    (tmp_path / "tiny_shakespeare_train.bin").write_bytes(header.tobytes() + tokens.tobytes())
    with pytest.raises(SystemExit, match="tiny_shakespeare_train.bin .*LLaMA 3.*32 bits"):
        fineweb.open_dataset(tmp_path)


def test_some_shards_of_a_larger_dataset(tmp_path):
    folder = small_dataset(tmp_path)
    names = sorted(path.name for path in folder.glob("*_train_*.bin"))
    three = fineweb.open_dataset(folder, train_shards=3)
    for name in names[3:]:
        (folder / name).unlink()
    assert fineweb.open_dataset(folder, train_shards=3) == three
    n = len(names) - 3
    for train_shards in (100, None):
        with pytest.raises(SystemExit, match=rf"{names[3]} has no tokens.*\({n} such.*--train_shards"):
            fineweb.open_dataset(folder, train_shards=train_shards)
    (folder / names[1]).unlink()
    with pytest.raises(SystemExit, match=f"{names[1]} has no tokens"):
        fineweb.open_dataset(folder, train_shards=3)


def test_the_writer_goes_into_no_folder_with_shards_of_others(tmp_path):
    for name in ("train.bin", "edufineweb_train_000001.npy"):
        folder = tmp_path / name.split(".")[0]
        save_shard(folder / name, gpt2_tokens(2000))
        with pytest.raises(SystemExit, match="choose another folder"):
            in_process(folder, [write_jsonl(tmp_path / "a.jsonl", documents(20))])
        assert list(bytes_of(folder)) == [name]


def test_token_beyond_the_vocabulary_stops_the_run(tmp_path):
    folder = small_dataset(tmp_path)
    loader = fineweb.Loader(fineweb.Windows(folder, "train", 32), 16, 0, vocab_size=120)
    with pytest.raises(SystemExit, match="token .* is beyond the vocabulary of 120"):
        loader.batch(0)


@pytest.mark.parametrize("size", [0, 12, 501, 1023])
def test_a_shard_cut_off_in_its_header_is_one_line(tmp_path, size):
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(fineweb.shard_header(100)[:size])
    with pytest.raises(SystemExit, match="000001.bin is (truncated|not a token shard)"):
        fineweb.shard_tokens(path)
