"""The download paths, against a loopback server that speaks the hub's protocol."""
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

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": list(map(str, range(len(texts))))}), buffer,
                                row_group_size=50)  # fmt: skip
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hub():
    files = {f"sample/10BT/{i:03d}_00000.parquet": parquet(documents(200, 1000 * i)) for i in range(3)}
    ready = {name: fineweb.shard_header(n) + np.random.default_rng(n).integers(50257, size=n, dtype=np.uint16).tobytes()
             for name, n in (("fineweb_val_000000.bin", 3000), ("fineweb_train_000001.bin", 5000),
                             ("fineweb_train_000002.bin", 4000))}  # fmt: skip
    repos = {REPO: {"README.md": b"# FineWeb", "data/other.parquet": b"not asked for", **files},
             "kjj0/fineweb10B-gpt2": {"README.md": b"", **ready}}  # fmt: skip
    with HubServer(repos) as server:
        yield server
    assert server.faults == []


def fineweb_py(hub, folder, *options):
    result = subprocess.run([sys.executable, ROOT / "fineweb.py", *map(str, options)], cwd=folder, capture_output=True,
                            text=True, env={**hub.env(), "RETRY_SECONDS": "0.01"})  # fmt: skip
    return result.returncode, result.stdout + result.stderr


TOKENISE = ("--tokenizer", "bytes", "--shard_tokens", 20_000, "--workers", 1, "--out", "out")


def test_text_is_downloaded_tokenised_and_not_kept(hub, tmp_path):
    status, said = fineweb_py(hub, tmp_path, *TOKENISE, "--shards", 2)
    assert status == 0 and "GB of disk" in said, said
    names = [f"fineweb_{'train' if k else 'val'}_{k:06d}.bin" for k in range(3)]
    assert sorted(bytes_of(tmp_path / "out")) == sorted([*names, "manifest.json"])
    status, said = fineweb_py(hub, tmp_path, *TOKENISE)
    assert status == 0, said
    expected = straight([text for i in range(3) for text in documents(200, 1000 * i)])
    assert np.array_equal(tokens_of(tmp_path / "out"), expected)
    assert fineweb.read_manifest(tmp_path / "out")["revision"] == hub.sha(REPO)
    assert not (tmp_path / "out/raw").exists()


def test_faults_on_the_way_change_nothing(hub, tmp_path):
    assert fineweb_py(hub, tmp_path, *TOKENISE)[0] == 0
    whole = bytes_of(tmp_path / "out")
    (tmp_path / "again").mkdir()
    hub.faults += [{"path": r"001_00000\.parquet$", "status": 503, "times": 2},
                   {"path": r"002_00000\.parquet$", "truncate": 3000},
                   {"path": r"000_00000\.parquet$", "drop": True, "method": "HEAD"}]  # fmt: skip
    status, said = fineweb_py(hub, tmp_path / "again", *TOKENISE)
    assert status == 0 and "HTTP 503; again in 1 s" in said, said
    assert bytes_of(tmp_path / "again/out") == whole


def test_ready_made_shards(hub, tmp_path):
    status, said = fineweb_py(hub, tmp_path, "--pretokenized", "--shards", 1)
    assert status == 0, said
    folder = tmp_path / "data/fineweb10B"
    assert [shard["tokens"] for shard in fineweb.read_manifest(folder)["shards"]] == [3000, 5000]
    hub.faults.append({"path": r"train_000002\.bin$", "status": 503})
    requests = len(hub.requests)
    status, said = fineweb_py(hub, tmp_path, "--pretokenized")
    assert status == 0, said
    assert not any("train_000001" in path for _, path in hub.requests[requests:])  # what is there is not fetched again
    assert fineweb.open_dataset(folder)["tokenizer"] == "gpt2" and fineweb.read_manifest(folder)["complete"]
    fineweb.verify(folder)
    assert not (folder / ".cache").exists()


def test_a_hub_that_says_no_is_one_line(hub, tmp_path):
    status, said = fineweb_py(hub, tmp_path, "--dataset", "fineweb-edu", *TOKENISE)
    assert status == 1 and "HuggingFaceFW/fineweb-edu can't be had (HTTP 404)" in said and said.count("\n") == 1, said
    hub.faults.append({"path": "/api/datasets/", "status": 503, "times": 7})
    status, said = fineweb_py(hub, tmp_path, *TOKENISE)
    assert status == 1 and "again in 32 s" in said and "can't be had (HTTP 503)" in said and "Traceback" not in said, said


def test_hellaswag_download_is_whole_or_not_there(tmp_path, monkeypatch):
    item = {"activity_label": "a", "ctx": "b c", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e", "f", "g"], "label": 2}
    content = (json.dumps(item) + "\n").encode() * hellaswag.N_ITEMS
    path = tmp_path / "data/hellaswag/hellaswag_val.jsonl"
    monkeypatch.setenv("RETRY_SECONDS", "0.01")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HubServer({}, {"val.jsonl": content, "half.jsonl": content[: len(content) // 2]}) as server:
        monkeypatch.setenv("HELLASWAG_URL", server.url + "/plain/half.jsonl")
        with pytest.raises(SystemExit, match="only 5,021 of 10,042 lines arrived"):
            hellaswag.download(path)
        assert not path.exists()
        server.faults += [{"path": "val.jsonl", "truncate": 1000}, {"path": "val.jsonl", "status": 503}]
        monkeypatch.setenv("HELLASWAG_URL", server.url + "/plain/val.jsonl")
        hellaswag.download(path)
        assert server.faults == []
    assert len(hellaswag.load(path, hellaswag.N_ITEMS)) == hellaswag.N_ITEMS
    assert [p.name for p in path.parent.iterdir()] == ["hellaswag_val.jsonl"]
