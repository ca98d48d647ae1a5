"""The shard writer and the loader."""
import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, text
from helpers import (THEIRS, bytes_of, documents, in_process, own_tokenizer, put_theirs, refused, straight,
                     survives_a_kill_at_every_write, tokens_in, tokens_of, with_own_tokenizer, write,
                     write_jsonl, write_parquet)  # fmt: skip

import fineweb


@pytest.fixture
def source(tmp_path):
    """A file of text."""
    return write_jsonl(tmp_path / "a.jsonl", documents(40))


@pytest.fixture
def folder(tmp_path, source):
    """A small dataset, made of that."""
    in_process(tmp_path / "out", [source])
    return tmp_path / "out"


@pytest.fixture
def gpt2():
    """GPT-2's tokenizer."""
    try:
        return fineweb.get_tokenizer("gpt2")
    except SystemExit:
        pytest.skip("GPT-2's vocabulary is not on this machine and there is no network")


# ---- writer


def test_bytes_tokenizer_knows_every_byte_and_end_of_text():
    encoding = fineweb.get_tokenizer("bytes")
    every = bytes(range(256)).decode("latin-1")
    assert encoding.n_vocab == 257 and encoding.eot_token == 256
    assert encoding.encode_ordinary(every) == list(every.encode())
    assert encoding.encode_ordinary("<|endoftext|>") == list(b"<|endoftext|>")
    assert encoding.decode(encoding.encode_ordinary(every)) == every


def test_gpt2_tokenizer(gpt2):
    tokens = gpt2.encode_ordinary("Hello, I'm a language model,")
    assert tokens == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    hello, nothing = fineweb.tokenize(["Hello world", ""], True, "gpt2")
    assert hello.tolist() == [50256, 15496, 995] and nothing.tolist() == [50256]
    assert hello.dtype == np.uint16


def test_a_prefix_of_gpt2s_merges_is_a_tokenizer(gpt2):
    prefix = fineweb.get_tokenizer("gpt2-4096")
    text = "Hello world, naïve tokenisation of <|endoftext|>\n\n  costs nothing."
    tokens = prefix.encode_ordinary(text)
    assert prefix.n_vocab == 4096 and prefix.eot_token == 4095 and max(tokens) < 4095
    assert prefix.decode(tokens) == text
    assert len(gpt2.encode_ordinary(text)) < len(tokens) < len(text.encode())
    for i in (0, 255, 256, 4094, *tokens):  # the same ids mean the same bytes
        assert prefix.decode_single_token_bytes(i) == gpt2.decode_single_token_bytes(i)
    assert fineweb.get_tokenizer("gpt2-50257").encode_ordinary(text) == gpt2.encode_ordinary(text)


@pytest.mark.parametrize("name", ["gpt2-256", "gpt2-50258", "gpt2-", "gpt3", "gpt2-4096x"])
def test_a_tokenizer_that_there_is_not_is_one_line(name):
    refused(f"{name}.*gpt2.*bytes", fineweb.get_tokenizer, name)


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
    assert fineweb.open_dataset(folder)["tokenizer"] == name
    tokenizer = fineweb.get_tokenizer(name, str(folder))  # as the scripts do
    assert tokenizer.eot_token == 2 and tokenizer.n_vocab == manifest["vocab_size"]
    first, *rest = tokenizer.encode_ordinary("the for")
    assert tokenizer.decode([first, *rest]) == " the for"
    assert tokenizer.decode([first]) + tokenizer.decode(rest) == " the for"  # a sample goes on after a prompt


def test_a_changed_tokenizer_is_refused(tmp_path):
    folder, _, path = with_own_tokenizer(tmp_path)
    (copy,) = folder.glob("tokenizer-*.json")
    whole = bytes_of(folder)
    copy.write_text(path.read_text().replace('"version"', ' "version"'))
    fineweb.get_tokenizer.cache_clear()
    refused(f"{copy} has changed", fineweb.open_dataset, folder)
    copy.unlink()
    refused(copy.name, fineweb.open_dataset, folder)
    copy.write_bytes(path.read_bytes())
    fact = f"{copy.name}', not .*choose another folder"
    for other in (own_tokenizer(tmp_path / "other.json", "<eos>"), "bytes"):
        refused(fact, in_process, folder, [tmp_path / "a.jsonl"], 1024, tokenizer=other)
    assert bytes_of(folder) == whole


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

    def check(name, fact):
        status, said = run(fineweb, "--files", "a.txt", "--tokenizer", f"{name}.json", "--out", "out")
        assert status == 1 and f"{name}.json" in said and fact in said and said.count("\n") == 1, said

    check("no end", "</s>")
    check("too large", "65,537")
    check("bad", "not a tokenizer.json")
    check("nowhere", "No such file")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    check("bad", "pip install tokenizers")
    assert not (tmp_path / "out").exists()


def test_shards_hold_the_documents_in_order(folder):
    expected = straight(documents(40))
    assert np.array_equal(tokens_of(folder), expected)
    manifest = fineweb.read_manifest(folder)
    assert manifest["complete"]
    assert manifest["tokenizer"] == "bytes" and manifest["vocab_size"] == 257
    counts = [shard["tokens"] for shard in manifest["shards"]]
    assert sum(counts) == len(expected) and set(counts[1:-1]) == {5000}
    header = np.fromfile(folder / "fineweb_val_000000.bin", dtype=np.int32, count=256)
    assert header[:3].tolist() == [20240520, 1, counts[0]] and not header[3:].any()


@pytest.mark.slow
@pytest.mark.parametrize("name, workers, ids", [("bytes", 1, 384), ("bytes", 2, 384), ("own.json", 2, 128)])
def test_result_does_not_depend_on_the_number_of_workers(tmp_path, monkeypatch, name, workers, ids):
    monkeypatch.chdir(tmp_path)
    own_tokenizer(tmp_path / "own.json")
    path = write_jsonl(tmp_path / "a.jsonl", documents(700))
    in_process(tmp_path / "inline", [path], 20_000, tokenizer=name)
    options = ["--tokenizer", name, "--shard_tokens", 20_000, "--workers", workers]
    status, said = write(tmp_path, "--files", path, *options, "--out", "out")
    assert status == 0 and f"--vocab_size {ids}" in said, said
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "inline")


def test_stopped_after_any_shard_it_goes_on_to_the_same_bytes(tmp_path):
    story = "\n".join(text(200, i) for i in range(20))
    paths = [tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "c.txt"]
    write_jsonl(paths[0], documents(30, 100))
    write_parquet(paths[1], documents(30))
    paths[2].write_text(story)
    in_process(tmp_path / "whole", paths)
    whole = bytes_of(tmp_path / "whole")
    expected = straight([*documents(30, 100), *documents(30), story])
    assert np.array_equal(tokens_of(tmp_path / "whole"), expected)
    n_shards = len(whole) - 1
    assert n_shards > 6
    for stop in range(n_shards):
        out = tmp_path / f"stopped after {stop}"
        in_process(out, paths, last=stop)
        finished = {path: path.stat().st_ino for path in out.glob("*.bin")}
        assert len(finished) == stop + 1
        in_process(out, paths)
        assert bytes_of(out) == whole
        assert {path: path.stat().st_ino for path in finished} == finished  # no file was made again


def test_verify_names_the_bad_shards_and_the_writer_rebuilds_them(source, folder, capsys):
    whole = bytes_of(folder)
    names = ["fineweb_val_000000.bin", "fineweb_train_000002.bin", max(whole.keys() - {"manifest.json"})]
    fineweb.verify(folder)
    with open(folder / names[1], "r+b") as f:
        f.seek(3000)
        f.write(b"\x01\x02")
    (folder / names[0]).unlink()
    refused("remove .*val_000000.bin .*train_000002.bin", fineweb.verify, folder)
    (folder / names[1]).unlink()
    in_process(folder, [source])
    assert bytes_of(folder) == whole
    for name in names:
        (folder / name).write_bytes(whole[name][:-100])
    capsys.readouterr()
    in_process(folder, [source])
    assert f"{folder / names[1]} is missing or damaged" in capsys.readouterr().out
    assert bytes_of(folder) == whole


@pytest.mark.parametrize("name, content, fact", [
    ("a.txt", b"abc \xff\xfe def", "a.txt .*utf-8"),
    ("a.txt.gz", b"not packed", "a.txt.gz"),
    ("a.parquet", b"PAR1 no, it is not", "a.parquet"),
    ("a.csv", b"text\nhello\n", "a.csv .*.jsonl"),
])  # fmt: skip
def test_unreadable_text_is_one_line(tmp_path, name, content, fact):
    (tmp_path / name).write_bytes(content)
    refused(fact, in_process, tmp_path / "out", [tmp_path / name])


TEXTS = ["One.", "", "Zwei €.", "Three."]
PARTED = "One.<|endoftext|>Zwei €.<|endoftext|>Three.<|endoftext|>\n"


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("name, content, n_ends", [
    ("a.jsonl", lines(*TEXTS), 0),
    ("a.jsonl", b"\xef\xbb\xbf" + lines(*TEXTS).replace(b"\n", b"\n\n").replace(b'""', b"null"), 0),
    ("a.jsonl.gz", gzip.compress(lines(*TEXTS), mtime=0), 0),
    ("a.jsonl", lines("One.<|endoftext|>", "", "Zwei €.<|endoftext|>Three.<|endoftext|>\n"), 3),
    ("a.txt.gz", gzip.compress(PARTED.encode(), mtime=0), 3),
], ids=["plain", "odd", "packed", "separators", "separators in a packed txt"])  # fmt: skip
def test_the_same_documents_however_they_are_packed(tmp_path, capsys, name, content, n_ends):
    (tmp_path / name).write_bytes(content)
    in_process(tmp_path / "out", [tmp_path / name])
    texts = TEXTS if "jsonl" in name else ["One.", "Zwei €.", "Three."]
    assert tokens_of(tmp_path / "out").tolist() == straight(texts).tolist()
    said = capsys.readouterr().out
    if n_ends:
        assert said.startswith(f"{n_ends} times <|endoftext|>") and "--keep_separators" in said
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


def test_a_long_run_of_blanks_is_tokenised_in_parts_to_the_same_tokens(gpt2):
    for blanks in (" " * 70_000, "\n" * 70_000, " " * 50_000, "\t" * 50_001):
        text = "a" + blanks + "word"
        (tokens,) = fineweb.tokenize([text], False, "gpt2")
        assert tokens.tolist() == gpt2.encode_ordinary(text)


def test_other_text_is_refused_and_of_many_files_the_first_that_differs_named(tmp_path, monkeypatch):
    out = tmp_path / "out"
    paths = [tmp_path / f"{number:03d}.txt" for number in range(300)]
    for number, path in enumerate(paths):
        path.write_text(text(10, number))
    in_process(out, paths)
    whole = bytes_of(out)
    paths[7].write_text("longer than before " * 10)
    fact = rf"\['007.txt', \d+\], not \['007.txt', {paths[7].stat().st_size}\]: choose"
    said = refused(fact, in_process, out, paths)
    assert "006.txt" not in said and "008.txt" not in said
    paths[7].write_text(text(10, 7))
    refused("shard_tokens = 5000, not 6000", in_process, out, paths, 6000)
    refused(r"\['299.txt', \d+\], not None", in_process, out, paths[:-1])
    refused("'000.txt'.* not .*'001.txt'", in_process, out, paths[1:])
    said = refused("nowhere.txt is not a", in_process, out, [*paths[:5], tmp_path / "nowhere.txt"])
    assert "000.txt" not in said
    monkeypatch.chdir(tmp_path)
    in_process(out, [Path(path.name) for path in paths])  # the same, spelt otherwise
    assert bytes_of(out) == whole


@pytest.mark.parametrize("options, message", [
    (["--shards", "0"], "--shards 0: "),
    (["--shard_tokens", "5"], "--shard_tokens 5: must be from 1,024 to 2,147,483,647"),
    (["--shard_tokens", 2**31], "--shard_tokens 2147483648: must be from 1,024 to 2,147,483,647"),
    (["--workers", "-1"], "--workers -1: "),
    (["--tokenizer", "gpt4"], "gpt4"),
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
    assert bytes_of(tmp_path) == {"a.txt": b"some text"}


def test_a_vocabulary_that_does_not_come_is_given_up(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    never = threading.Event()
    fineweb.get_tokenizer.cache_clear()
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: never.wait(60))
    monkeypatch.setattr(fineweb, "NO_ANSWER", 0.05)
    said = refused("GPT-2.*TimeoutError", fineweb.get_tokenizer, "gpt2")
    never.set()
    for way_out in ("TIKTOKEN_CACHE_DIR", "vocab.bpe", "encoder.json", "data/gpt2/"):
        assert way_out in said


@pytest.mark.parametrize("size, steps, warmup", [(2_000, 1, 1), (1_200_000, 142, 6)])
def test_the_last_line_is_a_command_for_one_epoch(run, tmp_path, size, steps, warmup):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("word " * (size // 10))
    options = ["--tokenizer", "bytes", "--workers", 0, "--out", "my out"]
    status, said = run(fineweb, "--files", "a.txt", "b.txt", *options)
    assert status == 0
    options = f"--batch_tokens 8192 --max_steps {steps} --warmup_steps {warmup} --vocab_size 384"
    assert said.splitlines()[-1] == f"Next: python train_gpt2.py --data_dir 'my out' {options}"


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
    text = "|".join(fineweb.sample_documents())
    program = "import fineweb; print('|'.join(fineweb.sample_documents()), end='')"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    again = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env=environment, text=True)
    is_same = again == text  # which pytest would explain line by line
    assert is_same
    paragraphs = [part for document in text.split("|") for part in document.strip().split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 3000
    for foreign in ("numpy", "torch", "tkinter", "IDLE", "turtle"):
        assert text.count(foreign) < 20, foreign


def test_a_sample_of_another_version_is_not_touched_and_used_if_of_python_alone(sample, tmp_path, capsys):
    folder = shutil.copytree(sample, tmp_path / "sample")
    manifest = fineweb.read_manifest(folder) | {"revision": "3.0.0"}
    fineweb.write_manifest(folder, manifest)
    before = bytes_of(folder)
    fineweb.write_sample(folder)
    assert capsys.readouterr().out == "" and bytes_of(folder) == before
    fineweb.write_manifest(folder, manifest | {"files": ["documentation of Python, numpy and torch"]})
    before = bytes_of(folder)
    refused(f"{folder} .*numpy.*move", fineweb.write_sample, folder)
    assert bytes_of(folder) == before


# ---- nothing lost


@pytest.mark.parametrize("tokenizer, shard_tokens, least", [
    ("bytes", 5000, 5),
    ("bytes", "whole", 5),  # the text ends with its last shard
    ("tokenizer.json", 1024, 6),
])  # fmt: skip
def test_files_survive_a_kill_at_every_write(tmp_path, monkeypatch, tokenizer, shard_tokens, least):
    monkeypatch.chdir(tmp_path)
    own_tokenizer(tmp_path / "tokenizer.json")
    path = write_jsonl(tmp_path / "a.jsonl", documents(20))
    if shard_tokens == "whole":
        shard_tokens = len(straight(documents(20))) - max(1024, path.stat().st_size // 40)

    def action(folder):
        in_process(folder, [path], shard_tokens, tokenizer=tokenizer)

    assert survives_a_kill_at_every_write(tmp_path, action) >= least


@pytest.fixture
def little_sample(monkeypatch):
    texts = documents(20) + [letter * 150_000 for letter in "abcd"]
    monkeypatch.setattr(fineweb, "sample_documents", lambda: texts)


def test_the_sample_survives_a_kill_at_every_write(tmp_path, little_sample):
    assert survives_a_kill_at_every_write(tmp_path, fineweb.write_sample) == 5


def test_the_sample_leaves_what_is_not_its_own(tmp_path, capsys, little_sample):
    out = tmp_path / "sample"
    put_theirs(out)
    fineweb.write_sample(out)
    assert bytes_of(out).items() >= THEIRS.items()
    shard = out / "fineweb_train_000001.bin"
    whole = shard.read_bytes()
    shard.unlink()
    fineweb.write_sample(out)
    assert shard.read_bytes() == whole
    shard.write_bytes(whole[:-1])
    (out / "manifest.json.77.tmp").write_text("of a killed one")
    fineweb.write_sample(out)
    assert shard.read_bytes() == whole and not (out / "manifest.json.77.tmp").exists()
    assert bytes_of(out).items() >= THEIRS.items()
    capsys.readouterr()
    fineweb.write_sample(out)
    assert capsys.readouterr().out == ""  # nothing was written


@pytest.mark.parametrize("last", [None, 1])
def test_the_sample_into_a_foreign_dataset_is_one_line(tmp_path, source, little_sample, last):
    in_process(tmp_path / "out", [source], last=last)
    put_theirs(tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    refused("out holds shards with dataset = 'files'", fineweb.write_sample, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == before


def test_two_writers_in_one_folder(tmp_path, source):
    options = ["--files", source, "--tokenizer", "bytes", "--workers", 0, "--out", "out"]
    fineweb.lock(tmp_path / "out", "")
    try:
        status, said = write(tmp_path, *options)
    finally:
        fineweb.locks.popitem()[1].release()
    assert status == 1 and said.count("\n") == 1, said
    assert "out is in use" in said and "choose another --out" in said
    assert not list((tmp_path / "out").glob("*.bin"))
    status, said = write(tmp_path, *options)
    assert status == 0, said


def test_the_second_to_find_no_sample_waits_for_the_first(tmp_path, little_sample):
    program = "import fineweb; fineweb.sample_documents = list; fineweb.write_sample('sample')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    fineweb.lock(tmp_path / "sample", "")
    command = [sys.executable, "-c", program]
    second = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert "sample is in use" in second.stdout.readline()
    fineweb.write_sample(tmp_path / "sample")  # releases the lock in the end
    whole = bytes_of(tmp_path / "sample")
    assert second.communicate(timeout=60)[0] == "" and second.returncode == 0
    assert bytes_of(tmp_path / "sample") == whole and len(whole) == 3


@pytest.mark.slow
def test_workers_end_when_the_main_process_is_killed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(3000) * 10)
    options = ["--files", path, "--tokenizer", "bytes", "--shard_tokens", "20000", "--workers", "2"]
    command = [sys.executable, ROOT / "fineweb.py", *options, "--out", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("out/*.bin")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=10)  # to the end of what it and its workers say
    assert process.returncode == -9


@pytest.mark.parametrize("name, content", [("a.jsonl", b""), ("a.txt", b""), ("a.jsonl", lines("short"))])
def test_too_little_text_is_one_line_and_none_can_be_mended(run, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    options = ["--files", name, "--tokenizer", "bytes", "--workers", 0, "--out", "out"]
    status, said = run(fineweb, *options)
    assert status == 1 and "out has no training shard" in said.splitlines()[-1], said
    if not content:
        (tmp_path / name).write_bytes(lines(*documents(10)))
        status, said = run(fineweb, *options)
        assert status == 0, said


def test_room_is_needed_only_for_what_is_missing(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    free = [1000]
    usage = shutil._ntuple_diskusage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, free[0]))
    refused("make room.* --out.* --shards N", in_process, out, [source])
    assert not list(out.iterdir())
    free[0] = 10**9
    in_process(out, [source], last=2)
    done = sum(shard["tokens"] for shard in fineweb.read_manifest(out)["shards"])
    free[0] = 2 * (source.stat().st_size - done) - 1  # a token is two bytes, and there are no more than bytes
    refused("make room", in_process, out, [source])
    free[0] += 1
    in_process(out, [source])
    free[0] = 0
    in_process(out, [source])  # everything is there
    (out / "fineweb_train_000002.bin").unlink()
    refused("make room", in_process, out, [source])
    free[0] = 10_000
    in_process(out, [source])


# ---- loader


def test_the_order_is_of_the_seed_and_the_epoch_and_never_changes():
    order = fineweb.epoch_order(100_000, 1337, 0)
    assert order[:4].tolist() == [27302, 8855, 98261, 24501]
    for other in ((1337, 1), (1338, 0)):
        assert (order == fineweb.epoch_order(100_000, *other)).mean() < 0.001


def test_batches_are_the_same_for_any_number_of_ranks(folder):
    windows = fineweb.Windows(folder, "train", 32)
    for step in (0, 1, 7, 100):  # 100 is some epochs on
        whole = fineweb.Loader(windows, 16, seed=5).batch(step)
        assert whole.shape == (16, 33)
        for world in (2, 4, 8):
            loaders = [fineweb.Loader(windows, 16, 5, rank, world) for rank in range(world)]
            parts = [loader.batch(step) for loader in loaders]
            assert all(len(part) == 16 // world for part in parts)
            assert np.array_equal(np.concatenate(parts), whole)


def test_every_window_once_per_epoch_and_each_epoch_in_another_order(folder):
    windows = fineweb.Windows(folder, "train", 32)
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


def test_windows_are_the_text_and_never_cross_a_shard(folder):
    windows = fineweb.Windows(folder, "train", 32)
    rows = iter(windows.rows(np.arange(len(windows))))
    for path in sorted(folder.glob("*_train_*.bin")):
        tokens = tokens_in(path).astype(np.int64)
        for k in range((len(tokens) - 1) // 32):
            assert np.array_equal(next(rows), tokens[32 * k : 32 * k + 33])
    assert next(rows, None) is None


def test_validation_is_the_beginning_of_its_shard(folder, capsys):
    windows = fineweb.Windows(folder, "val", 32, max_tokens=320)
    tokens = tokens_in(folder / "fineweb_val_000000.bin")
    assert len(windows) == 10
    assert np.array_equal(windows.rows(range(10))[:, :-1].ravel(), tokens[:320])
    assert capsys.readouterr().out == ""
    fineweb.Windows(folder, "val", 32, max_tokens=10**6)
    assert "of 1,000,000 val tokens" in capsys.readouterr().out


def test_data_that_repeat_give_a_warning(folder, capsys):
    windows = fineweb.Windows(folder, "train", 32)
    steps = len(windows) // 16
    fineweb.Loader(windows, 16, 0, max_steps=steps)
    assert capsys.readouterr().out == ""
    fineweb.Loader(windows, 16, 0, max_steps=steps + 1)
    assert f"{steps} of {steps + 1} steps" in capsys.readouterr().out


def test_bad_datasets_are_one_line_with_the_way_out(folder):
    refused("nowhere: run `python fineweb.py --out nowhere`.* --tiny", fineweb.open_dataset, "nowhere")
    data = fineweb.open_dataset(folder)
    assert data["tokenizer"] == "bytes" and data["vocab_size"] == 257
    refused("257.* 256: .* --vocab_size 384", fineweb.open_dataset, folder, vocab_size=256)
    before = {"tokenizer": "gpt2", "fingerprint": ""}
    refused("bytes .*gpt2 .*--data_dir", fineweb.open_dataset, folder, before=before)
    shard = folder / "fineweb_train_000002.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refused("000002.bin is truncated.*5,000", fineweb.open_dataset, folder)
    shard.write_bytes(b"something else entirely" * 100)
    refused("000002.bin is not a token shard", fineweb.open_dataset, folder)
    shard.unlink()
    refused("000002.bin has no tokens, by manifest.json 5000", fineweb.open_dataset, folder)
    shard.write_bytes(content)
    shutil.copy(shard, folder / "fineweb_train_000077.bin")
    refused("000077.bin has 5000 tokens, by manifest.json none", fineweb.open_dataset, folder)
    (folder / "fineweb_train_000077.bin").unlink()
    with open(folder / "fineweb_val_000000.bin", "r+b") as f:
        f.seek(-2, 2)
        f.write(np.uint16(300).tobytes())
    refused("300 .*fineweb_val_000000.bin .*257", fineweb.open_dataset, folder)
    (folder / "manifest.json").write_text("{")
    refused("is not a manifest", fineweb.open_dataset, folder)
    refused("no val shard of 1000001 tokens", fineweb.Windows, folder, "val", 1_000_000)


def test_other_data_than_before_gives_a_warning(folder, capsys):
    data = fineweb.open_dataset(folder)
    assert fineweb.open_dataset(folder, before=data) == data
    assert capsys.readouterr().out == ""
    fineweb.open_dataset(folder, before={**data, "fingerprint": "other"})
    assert "is not the data that the run began with" in capsys.readouterr().out


def test_shards_beyond_those_used_change_nothing_and_may_be_missing(folder):
    names = sorted(path.name for path in folder.glob("*_train_*.bin"))
    data = fineweb.open_dataset(folder, train_shards=3)
    n_windows = len(fineweb.Windows(folder, "train", 32, max_shards=3))
    for name in names[3:]:
        (folder / name).unlink()
    assert fineweb.open_dataset(folder, train_shards=3) == data
    assert len(fineweb.Windows(folder, "train", 32, max_shards=100)) == n_windows
    fact = rf"{names[3]} has no tokens.*\({len(names) - 3} such.*--train_shards"
    for train_shards in (100, None):
        refused(fact, fineweb.open_dataset, folder, train_shards=train_shards)
    manifest = fineweb.read_manifest(folder)
    manifest["shards"] = [shard for shard in manifest["shards"] if shard["name"] not in names[3:]]
    fineweb.write_manifest(folder, manifest)
    assert fineweb.open_dataset(folder, train_shards=3) == fineweb.open_dataset(folder) == data
    (folder / names[1]).unlink()
    refused(f"{names[1]} has no tokens", fineweb.open_dataset, folder, train_shards=3)


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
def test_shards_of_others_are_read_as_they_are(tmp_path, capsys, val, train):
    folder = tmp_path / "theirs"
    for number, name in enumerate([val, *train]):
        save_shard(folder / name, gpt2_tokens(3001 + number, number))
    (folder / "gpt2_tokenizer.bin").write_text("no shard")
    (folder / "meta.pkl").write_text("no shard")
    data = fineweb.open_dataset(folder, train_shards=100)
    assert data["tokenizer"] == "gpt2" and data["vocab_size"] == 50257
    assert "taking its shards for GPT-2 tokens" in capsys.readouterr().out
    windows = fineweb.Windows(folder, "val", 1000)
    assert np.array_equal(windows.rows([2])[0], gpt2_tokens(3001, 0)[2000:])
    windows = fineweb.Windows(folder, "train", 1000)
    last = gpt2_tokens(3001 + len(train), len(train))[2000:3001]
    assert np.array_equal(windows.rows([3 * len(train) - 1])[0], last) and len(windows) == 3 * len(train)


OTHERS = {
    "letters": lambda tokens: tokens % np.uint16(65),
    "no end": lambda tokens: np.where(tokens == 50256, np.uint16(11), tokens),
    "other vocabulary": lambda tokens: np.where(np.arange(300_000) == 1000, np.uint16(50257), tokens),
    # of LLaMA 3, by whose lower halves <|endoftext|> is there
    "32 bits": lambda tokens: tokens + np.uint32(65536) * (np.arange(300_000) % 7 == 0),
    "empty": lambda tokens: tokens[:0],
    "odd size": lambda tokens: tokens,
}


@pytest.mark.parametrize("name", ["train.bin", "a_train_000001.npy"])
@pytest.mark.parametrize("what", OTHERS)
def test_shards_of_another_vocabulary_are_not_mistaken_for_gpt2s(tmp_path, name, what):
    save_shard(tmp_path / name, OTHERS[what](gpt2_tokens(300_000)))
    if what == "odd size":
        os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - 1)
    said = refused(f"{name} is not a token shard", fineweb.open_dataset, tmp_path)
    assert "remove" not in said and (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["train.bin", "edufineweb_train_000001.npy"])
def test_the_writer_goes_into_no_folder_with_shards_of_others(tmp_path, source, name):
    save_shard(tmp_path / "theirs" / name, gpt2_tokens(2000))
    refused("choose another folder", in_process, tmp_path / "theirs", [source])
    assert list(bytes_of(tmp_path / "theirs")) == [name]
