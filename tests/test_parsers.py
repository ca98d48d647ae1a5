"""Whatever is in a file: one line and exit, nothing written elsewhere, nothing of the user's removed.

The parsers of shards, the manifest, JSONL, parquet and HellaSwag, on files made up by hypothesis.
"""
import io
import json
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet
import pytest
from helpers import (THEIRS, bytes_of, documents, in_process, item, put_theirs, refused, write_jsonl,
                     write_parquet)  # fmt: skip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fineweb
import hellaswag

quick = settings(
    max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)

# surrogates too: Python writes and reads half characters in JSON
TEXT = st.text(st.characters(codec=None), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=8)


@contextmanager
def a_user_s_folder():
    """A dataset's folder with a user's files in it and beside it, which must stay as they are."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = root / "data"
        put_theirs(folder)
        (root / "beside.bin").write_text("mine")
        yield folder
        assert sorted(path.name for path in root.iterdir()) == ["beside.bin", "data"]
        assert (root / "beside.bin").read_text() == "mine"
        assert bytes_of(folder).items() >= THEIRS.items()


def one_line_or_done(action):
    """What action() returns, None if it ends the program with one line; anything else is an error."""
    try:
        return action()
    except SystemExit as error:
        assert isinstance(error.code, str) and error.code.strip(), error
        assert "\n" not in error.code and "Traceback" not in error.code
        return None


# ---- shards


@quick
@given(st.binary(max_size=2100), st.sampled_from([0, 5, 500]), st.sampled_from([-1, 0, 1, 2]))
def test_shards(content, n_tokens, more):
    header = fineweb.shard_header(n_tokens)
    with a_user_s_folder() as folder:
        path = folder / "fineweb_train_000001.bin"
        damaged = (content, header[: len(content)], header + content, header + content[: 2 * n_tokens + more])
        for whole in damaged:
            path.write_bytes(whole)
            n = one_line_or_done(lambda: fineweb.shard_tokens(path))
            assert n is None or path.stat().st_size == 1024 + 2 * n
            data = one_line_or_done(lambda: fineweb.open_dataset(folder))
            assert (data is None) == (n is None)
            if n:
                one_line_or_done(lambda: fineweb.Windows(folder, "train", 4))
            assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["fineweb_val_000000.bin", "manifest.json"])
def test_a_folder_in_a_file_s_place_is_one_line(tmp_path, name):
    path = write_jsonl(tmp_path / "a.jsonl", documents(20))
    folder = tmp_path / "out"
    in_process(folder, [path])
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(name, fineweb.open_dataset, folder)
    refused(name, in_process, folder, [path])
    refused(name, fineweb.verify, folder)
    assert (folder / name).is_dir()
    refused("no token shards in .*a.jsonl", fineweb.open_dataset, path)


# ---- manifest


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """(the text, {name: content} of a folder that was stopped after three shards)."""
    folder = tmp_path_factory.mktemp("parsers")
    path = write_jsonl(folder / "a.jsonl", documents(20))
    in_process(folder / "out", [path], last=2)
    return path, {file.name: file.read_bytes() for file in (folder / "out").iterdir()}


FIELDS = ["dataset", "revision", "files", "tokenizer", "vocab_size", "shard_tokens", "val_tokens", "complete"]
SHARD_FIELDS = ["name", "tokens", "sha256", "next"]
PATHS = st.sampled_from(["../beside.bin", "/tmp/x.bin", "a/b.bin", "notes.txt"])
NUMBERS = st.sampled_from([-1, 0, 1.5, [0, 0], [9, 9, 9], [0, 10**30, 0], [0, 0, 10**6], {}])
ODD = JSON | PATHS | NUMBERS


@quick
@given(st.sampled_from([*FIELDS, "shards", *SHARD_FIELDS]), st.booleans(), st.integers(0, 2), ODD)
def test_manifests(dataset, field, without, number, value):
    path, files = dataset
    manifest = json.loads(files["manifest.json"])
    inside = manifest["shards"][number] if field in SHARD_FIELDS else manifest
    if without:
        del inside[field]
    else:
        inside[field] = value
    check_manifest(path, files, json.dumps(manifest).encode())


@quick
@given(JSON | st.just(["["] * 10), st.binary(max_size=30))
def test_manifests_that_are_none(dataset, value, content):
    path, files = dataset
    check_manifest(path, files, json.dumps(value).encode())
    check_manifest(path, files, content)
    check_manifest(path, files, b'{"dataset": ' + b"[" * 100_000)


def check_manifest(path, files, manifest):
    with a_user_s_folder() as folder:
        for name, content in (files | {"manifest.json": manifest}).items():
            (folder / name).write_bytes(content)
        one_line_or_done(lambda: fineweb.open_dataset(folder))
        one_line_or_done(lambda: fineweb.verify(folder))
        one_line_or_done(lambda: in_process(folder, [path]))
        for name in files:
            assert (folder / name).is_file()


# ---- text


def write_documents(name, content):
    with a_user_s_folder() as folder:
        path = folder / name
        path.write_bytes(content)
        one_line_or_done(lambda: in_process(folder, [path], 1024))
        assert path.read_bytes() == content


LINES = st.lists(JSON | st.fixed_dictionaries({"text": JSON}), max_size=3)


@quick
@given(LINES, st.booleans(), st.binary(max_size=20))
def test_jsonl(lines, ascii, rest):
    content = "\n".join(json.dumps(line, ensure_ascii=ascii) for line in lines)
    write_documents("a.jsonl", content.encode(errors="surrogatepass") + rest)
    write_documents("a.txt", content.encode(errors="surrogatepass") + rest)


@pytest.mark.parametrize("line", [
    rb'{"text": "half \ud800 a character"}', b'{"text": ' + b"[" * 100_000, b"[" * 100_000, b"null", b"3",
    b'{"text": "\xff"}', b'{"text": 1' + b"0" * 5000 + b"}", b'{"txt": "two"}', b"nonsense", b'{"text": 7}',
])  # fmt: skip
def test_odd_lines_are_one_line(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b"\n")
    refused("a.jsonl .*line 2", in_process, tmp_path / "out", [path])


def test_a_line_ends_where_json_lines_says(tmp_path):
    texts = ["one\u2028two\x85three", "four\u2029"]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    ((_, found, _),) = fineweb.read_documents(path)
    assert found == texts


@pytest.mark.parametrize("column", [
    {"content": ["a"]}, {"text": [1, 2]}, {"text": [b"a"]}, {"text": [["a"]]}, {"text": [{"a": 1}]},
    {"text": [1.5]}, {"text": [True]},
])  # fmt: skip
def test_parquet_without_text_is_one_line(tmp_path, column):
    pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / "a.parquet")
    refused("""a.parquet .*['"]text['"]""", in_process, tmp_path / "out", [tmp_path / "a.parquet"])


PARQUET = write_parquet(io.BytesIO(), documents(10), row_group_size=4).getvalue()


@quick
@given(st.data())
def test_damaged_parquet(data):
    content = bytearray(PARQUET)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] ^= data.draw(st.integers(1, 255))
    write_documents("a.parquet", bytes(content))


# ---- HellaSwag


ITEM = item("b c", ["d", "e", "f", "g"], 2)
LABELS = st.sampled_from([1.7, True, float("inf"), "3", "x", -1, 4, None])


@quick
@given(st.sampled_from(list(ITEM)), JSON | LABELS | st.lists(TEXT, min_size=4, max_size=4), st.booleans())
def test_items(field, value, ascii):
    line = json.dumps(ITEM | {field: value}, ensure_ascii=ascii).encode(errors="surrogatepass")
    check_items(line)


@quick
@given(JSON, st.binary(max_size=20))
def test_items_that_are_none(value, content):
    check_items(json.dumps(value).encode())
    check_items(content)


def check_items(content):
    encode = fineweb.get_tokenizer("bytes").encode_ordinary
    with a_user_s_folder() as folder:
        path = folder / "items.jsonl"
        path.write_bytes(content)
        items = one_line_or_done(lambda: hellaswag.load(path))
        assert path.read_bytes() == content
    for entry in items or []:
        assert type(entry["label"]) is int and 0 <= entry["label"] < 4
    for convention in hellaswag.CONVENTIONS:
        if items:
            hellaswag.make_batches(items, convention, encode, 64)
