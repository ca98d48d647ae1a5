"""The download paths, against a loopback server that speaks the hub's protocol."""
import hashlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hub_server import HubServer
from test_fineweb import bytes_of, documents, straight, tokens_of

import fineweb
import hellaswag

REPO = "HuggingFaceFW/fineweb"


def parquet(texts):
    import pyarrow
    import pyarrow.parquet

    ids = [str(i) for i in range(len(texts))]
    buffer = io.BytesIO()
    table = pyarrow.table({"text": texts, "id": ids})
    pyarrow.parquet.write_table(table, buffer, row_group_size=50)
    return buffer.getvalue()


def ready_made(n_tokens):
    tokens = np.random.default_rng(n_tokens).integers(50257, size=n_tokens, dtype=np.uint16)
    return fineweb.shard_header(n_tokens) + tokens.tobytes()


@pytest.fixture(scope="module")
def hub():
    text_files = {"README.md": b"# FineWeb", "data/other.parquet": b"not asked for"}
    for i in range(3):
        text_files[f"sample/10BT/{i:03d}_00000.parquet"] = parquet(documents(200, 1000 * i))
    shards = {
        "README.md": b"",
        "fineweb_val_000000.bin": ready_made(3000),
        "fineweb_train_000001.bin": ready_made(5000),
        "fineweb_train_000002.bin": ready_made(4000),
    }
    with HubServer({REPO: text_files, "kjj0/fineweb10B-gpt2": shards}) as server:
        yield server
    assert server.faults == []


def fineweb_py(hub, folder, *options):
    """Runs fineweb.py with these options in folder: (exit status, what it printed)."""
    command = [sys.executable, ROOT / "fineweb.py", *map(str, options)]
    env = {**hub.env(), "RETRY_SECONDS": "0.01"}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    return result.returncode, result.stdout + result.stderr


TOKENISE = ("--tokenizer", "bytes", "--shard_tokens", 20_000, "--out", "out")


def test_text_is_downloaded_tokenised_and_not_kept(hub, tmp_path):
    status, said = fineweb_py(hub, tmp_path, *TOKENISE, "--workers", 1, "--shards", 2)
    assert status == 0 and "GB of disk" in said, said
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert sorted(bytes_of(tmp_path / "out")) == sorted([*names, "manifest.json"])
    status, said = fineweb_py(hub, tmp_path, *TOKENISE, "--workers", 1)
    assert status == 0, said
    expected = straight(documents(200) + documents(200, 1000) + documents(200, 2000))
    assert np.array_equal(tokens_of(tmp_path / "out"), expected)
    assert fineweb.read_manifest(tmp_path / "out")["revision"] == hub.sha(REPO)
    assert not (tmp_path / "out/raw").exists()


def test_faults_on_the_way_change_nothing(hub, tmp_path):
    assert fineweb_py(hub, tmp_path, *TOKENISE, "--workers", 0)[0] == 0
    whole = bytes_of(tmp_path / "out")
    (tmp_path / "again").mkdir()
    hub.faults += [
        {"path": r"001_00000\.parquet$", "status": 503, "times": 2},
        {"path": r"002_00000\.parquet$", "truncate": 3000},
        {"path": r"000_00000\.parquet$", "drop": True, "method": "HEAD"},
    ]
    status, said = fineweb_py(hub, tmp_path / "again", *TOKENISE, "--workers", 0)
    assert status == 0 and "HTTP 503; trying again in 1 s" in said, said
    assert bytes_of(tmp_path / "again/out") == whole


def test_ready_made_shards(hub, tmp_path):
    status, said = fineweb_py(hub, tmp_path, "--pretokenized", "--shards", 1)
    assert status == 0, said
    assert "\nNext: python train_gpt2.py\n" in said
    folder = tmp_path / "data/fineweb10B"
    shards = fineweb.read_manifest(folder)["shards"]
    assert [shard["tokens"] for shard in shards] == [3000, 5000]
    hub.faults.append({"path": r"train_000002\.bin$", "status": 503})
    requests = len(hub.requests)
    status, said = fineweb_py(hub, tmp_path, "--pretokenized")
    assert status == 0, said
    fetched = [path for _, path in hub.requests[requests:]]
    assert not any("train_000001" in path for path in fetched)  # it was there already
    assert fineweb.open_dataset(folder)["tokenizer"] == "gpt2"
    assert fineweb.read_manifest(folder)["complete"]
    fineweb.verify(folder)
    assert not (folder / ".cache").exists()


def test_a_hub_that_says_no_is_one_line(hub, tmp_path):
    status, said = fineweb_py(hub, tmp_path, "--dataset", "fineweb-edu", *TOKENISE)
    assert status == 1 and said.count("\n") == 1, said
    assert "HuggingFaceFW/fineweb-edu could not be downloaded (HTTP 404)" in said
    hub.faults.append({"path": "/api/datasets/", "status": 503, "times": 7})
    status, said = fineweb_py(hub, tmp_path, *TOKENISE)
    assert status == 1 and "Traceback" not in said, said
    assert "again in 32 s" in said and "could not be downloaded (HTTP 503)" in said


def test_hellaswag_download_is_whole_or_not_there(tmp_path, monkeypatch):
    item = {"activity_label": "a", "ctx": "b c", "ctx_a": "b", "ctx_b": "c"}
    item |= {"endings": ["d", "e", "f", "g"], "label": 2}
    content = (json.dumps(item) + "\n").encode() * hellaswag.N_ITEMS
    half = content[: len(content) // 2]
    path = tmp_path / "data/hellaswag/hellaswag_val.jsonl"
    monkeypatch.setenv("RETRY_SECONDS", "0.01")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(content).hexdigest())
    other = content.replace(b'"b c"', b'"b d"')
    with HubServer({}, {"val.jsonl": content, "half.jsonl": half, "other.jsonl": other}) as server:
        monkeypatch.setenv("HELLASWAG_URL", server.url + "/plain/other.jsonl")
        with pytest.raises(SystemExit, match="it arrived damaged: its checksum is another"):
            hellaswag.download(path)
        assert not path.exists()
        monkeypatch.setenv("HELLASWAG_URL", server.url + "/plain/half.jsonl")
        with pytest.raises(SystemExit, match="only 5,021 of 10,042 lines arrived"):
            hellaswag.download(path)
        assert not path.exists()
        server.faults.append({"path": "val.jsonl", "truncate": 1000})
        server.faults.append({"path": "val.jsonl", "status": 503})
        monkeypatch.setenv("HELLASWAG_URL", server.url + "/plain/val.jsonl")
        hellaswag.download(path)
        assert server.faults == []
    assert len(hellaswag.load(path, hellaswag.N_ITEMS)) == hellaswag.N_ITEMS
    assert [p.name for p in path.parent.iterdir()] == ["hellaswag_val.jsonl"]
