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
from test_fineweb import (
    bytes_of,
    check_theirs,
    documents,
    put_theirs,
    straight,
    survives_a_kill_at_every_write,
    tokens_of,
)

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


@pytest.mark.slow
def test_text_is_downloaded_tokenised_and_not_kept(hub, tmp_path):
    status, said = fineweb_py(hub, tmp_path, *TOKENISE, "--workers", 1, "--shards", 2)
    assert status == 0, said
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert sorted(bytes_of(tmp_path / "out")) == sorted([*names, "manifest.json"])
    status, said = fineweb_py(hub, tmp_path, *TOKENISE, "--workers", 1)
    assert status == 0, said
    expected = straight(documents(200) + documents(200, 1000) + documents(200, 2000))
    assert np.array_equal(tokens_of(tmp_path / "out"), expected)
    assert fineweb.read_manifest(tmp_path / "out")["revision"] == hub.sha(REPO)
    assert not (tmp_path / "out" / fineweb.DOWNLOADS).exists()


@pytest.mark.slow
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


@pytest.mark.slow
def test_ready_made_shards(hub, tmp_path):
    status, said = fineweb_py(hub, tmp_path, "--pretokenized", "--shards", 1)
    assert status == 0, said
    assert "\nNext: python train_gpt2.py --data_dir data/fineweb10B " in said
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


@pytest.mark.slow
def test_a_hub_that_says_no_is_one_line(hub, tmp_path):
    status, said = fineweb_py(hub, tmp_path, "--dataset", "fineweb-edu", *TOKENISE)
    assert status == 1 and said.count("\n") == 1, said
    assert "HuggingFaceFW/fineweb-edu" in said and "HTTP 404" in said
    hub.faults.append({"path": "/api/datasets/", "status": 503, "times": 7})
    status, said = fineweb_py(hub, tmp_path, *TOKENISE)
    assert status == 1 and "Traceback" not in said, said
    assert "again in 32 s" in said and "(HTTP 503)" in said.splitlines()[-1]


@pytest.mark.slow
def test_a_damaged_file_is_thrown_away_and_fetched_again(hub, tmp_path):
    hub.faults.append({"path": r"001_00000\.parquet$", "flip": 2000, "times": 2})
    status, said = fineweb_py(hub, tmp_path, *TOKENISE, "--workers", 0)
    assert status == 0 and said.count("arrived damaged") == 2, said
    expected = straight(documents(200) + documents(200, 1000) + documents(200, 2000))
    assert np.array_equal(tokens_of(tmp_path / "out"), expected)


@pytest.mark.slow
def test_a_shard_that_stays_damaged_is_one_line_and_no_shard(hub, tmp_path):
    hub.faults.append({"path": r"train_000001\.bin$", "flip": 5000, "times": 7})
    status, said = fineweb_py(hub, tmp_path, "--pretokenized", "--out", "out")
    assert status == 1 and "Traceback" not in said, said
    assert "train_000001.bin" in said.splitlines()[-1] and "arrived damaged" in said.splitlines()[-1]
    assert [path.name for path in (tmp_path / "out").glob("*.bin")] == ["fineweb_val_000000.bin"]
    status, said = fineweb_py(hub, tmp_path, "--pretokenized", "--out", "out")
    assert status == 0, said
    fineweb.verify(tmp_path / "out")


@pytest.mark.slow
def test_what_a_user_has_in_the_folder_stays(hub, tmp_path):
    theirs = {"raw/sample/10BT/000_00000.parquet": "mine", ".cache/huggingface/download/x": "mine"}
    for options in (["--pretokenized"], [*TOKENISE, "--workers", 0]):
        out = tmp_path / options[0].strip("-") / "out"
        put_theirs(out, **theirs)
        status, said = fineweb_py(hub, out.parent, *options, "--out", "out")
        assert status == 0, said
        check_theirs(out, **theirs)
        assert not (out / fineweb.DOWNLOADS).exists()


@pytest.fixture
def here(monkeypatch):
    """here(server): this process takes the server for the hub, and the hub's client doesn't pause."""
    from huggingface_hub import constants

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)

    def here(server):
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("RETRY_SECONDS", "0.001")
    return here


@pytest.mark.slow
def test_both_downloads_survive_a_kill_at_every_write(tmp_path, here):
    text_files = {}
    for i in range(2):
        text_files[f"sample/10BT/{i:03d}_00000.parquet"] = parquet(documents(12, 1000 * i))
    shards = {f"fineweb_{name}.bin": ready_made(1000) for name in ("val_000000", "train_000001")}
    with HubServer({REPO: text_files, "kjj0/fineweb10B-gpt2": shards}) as server:
        here(server)

        def tokenise(folder):
            fineweb.tokenize_hub(folder, "fineweb", None, 4000, "bytes", 0)

        def download(folder):
            fineweb.download_shards(folder, "fineweb", None)

        (tmp_path / "text").mkdir()
        assert survives_a_kill_at_every_write(tmp_path / "text", tokenise) >= 5
        (tmp_path / "ready").mkdir()
        assert survives_a_kill_at_every_write(tmp_path / "ready", download) == 5


def list_files(folder):
    return fineweb.hub_files(folder, REPO, "sample/10BT", ".parquet")[1]


def test_a_hub_that_says_nothing_is_given_up(hub, here, monkeypatch, capsys, tmp_path):
    here(hub)
    monkeypatch.setattr(fineweb, "NO_ANSWER", 0.1)
    hub.faults.append({"path": "/api/datasets/", "stall": 60, "times": 7})
    with pytest.raises(SystemExit, match=f"{REPO} .*TimeoutError"):
        list_files(tmp_path)
    assert capsys.readouterr().out.count("trying again") == 6
    hub.faults.append({"path": "/tree/", "stall": 60})
    monkeypatch.setattr(fineweb, "NO_ANSWER", 2)
    assert len(list_files(tmp_path)) == 3


def test_a_file_that_stalls_is_given_up(hub, here, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    here(hub)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    file = list_files(tmp_path)["sample/10BT/000_00000.parquet"]
    # its client's own six tries, seven times
    hub.faults.append({"path": r"000_00000\.parquet$", "stall": 60, "times": 42})
    assert constants.HF_HUB_ETAG_TIMEOUT <= 30
    with pytest.raises(SystemExit, match="000_00000.parquet .*Timeout"):
        fineweb.fetch(REPO, file, None, tmp_path)
    assert hub.faults == [] and capsys.readouterr().out.count("trying again") == 6
    assert fineweb.fetch(REPO, file, None, tmp_path).stat().st_size == file.size


@pytest.mark.parametrize("body", [
    b"<html><body>Please log in</body></html>", b"null", b"[]", b'{"sha": 5}', b'{"sha": "x"}', b"[" * 100_000,
])  # fmt: skip
def test_a_login_page_in_the_way_is_one_line(hub, here, body, tmp_path):
    here(hub)
    hub.faults.append({"path": "/api/datasets/", "body": body, "times": 2})
    with pytest.raises(SystemExit, match=f"{REPO}.* login"):
        list_files(tmp_path)
    hub.faults.clear()


def test_a_login_page_instead_of_a_file_is_one_line(hub, here, tmp_path):
    here(hub)
    file = list_files(tmp_path)["sample/10BT/000_00000.parquet"]
    page = {"path": r"000_00000\.parquet$", "body": b"<html>log in</html>", "times": 1000}
    hub.faults += [page, page | {"method": "HEAD"}]
    with pytest.raises(SystemExit, match="000_00000.parquet"):
        fineweb.fetch(REPO, file, None, tmp_path)
    hub.faults.clear()


def test_another_dataset_of_the_hub_in_the_folder_is_one_line(hub, here, tmp_path):
    here(hub)
    fineweb.download_shards(tmp_path / "out", "fineweb", 1)
    before = bytes_of(tmp_path / "out")
    with pytest.raises(SystemExit, match="dataset = 'kjj0/fineweb10B-gpt2', not"):
        fineweb.tokenize_hub(tmp_path / "out", "fineweb", None, 4000, "bytes", 0)
    assert bytes_of(tmp_path / "out") == before


def test_an_empty_repository_is_one_line(here, tmp_path):
    other = {"README.md": b"nothing here"}
    with HubServer({REPO: other, "kjj0/fineweb10B-gpt2": other}) as server:
        here(server)
        with pytest.raises(SystemExit, match="kjj0/fineweb10B-gpt2 .*.bin"):
            fineweb.download_shards(tmp_path / "out", "fineweb", None)
        with pytest.raises(SystemExit, match="HTTP 404"):  # the hub's answer to a folder that isn't there
            fineweb.tokenize_hub(tmp_path / "out", "fineweb", None, 4000, "bytes", 0)
    assert not list(tmp_path.glob("out/*.bin"))


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
        with pytest.raises(SystemExit, match="checksum"):
            hellaswag.download(path)
        assert not path.exists()
        monkeypatch.setenv("HELLASWAG_URL", server.url + "/plain/half.jsonl")
        with pytest.raises(SystemExit, match="5,021 of 10,042 lines"):
            hellaswag.download(path)
        assert not path.exists()
        server.faults.append({"path": "val.jsonl", "truncate": 1000})
        server.faults.append({"path": "val.jsonl", "status": 503})
        monkeypatch.setenv("HELLASWAG_URL", server.url + "/plain/val.jsonl")
        hellaswag.download(path)
        assert server.faults == []
    assert len(hellaswag.load(path, hellaswag.N_ITEMS)) == hellaswag.N_ITEMS
    assert [p.name for p in path.parent.iterdir()] == ["hellaswag_val.jsonl"]
