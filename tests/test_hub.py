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


def test_a_damaged_file_is_thrown_away_and_fetched_again(hub, tmp_path):
    hub.faults.append({"path": r"001_00000\.parquet$", "flip": 2000, "times": 2})
    status, said = fineweb_py(hub, tmp_path, *TOKENISE, "--workers", 0)
    assert status == 0 and said.count("001_00000.parquet arrived damaged") == 2, said
    expected = straight(documents(200) + documents(200, 1000) + documents(200, 2000))
    assert np.array_equal(tokens_of(tmp_path / "out"), expected)


def test_a_shard_that_stays_damaged_is_one_line_and_no_shard(hub, tmp_path):
    hub.faults.append({"path": r"train_000001\.bin$", "flip": 5000, "times": 3})
    status, said = fineweb_py(hub, tmp_path, "--pretokenized", "--out", "out")
    assert status == 1 and "Traceback" not in said, said
    assert "train_000001.bin arrived damaged three times: run the same command again" in said
    assert [path.name for path in (tmp_path / "out").glob("*.bin")] == ["fineweb_val_000000.bin"]
    status, said = fineweb_py(hub, tmp_path, "--pretokenized", "--out", "out")
    assert status == 0, said
    fineweb.verify(tmp_path / "out")


def test_what_a_user_has_in_the_folder_stays(hub, tmp_path):
    theirs = {"raw/sample/10BT/000_00000.parquet": "mine", ".cache/huggingface/download/x": "mine"}
    for options in (["--pretokenized"], [*TOKENISE, "--workers", 0]):
        out = tmp_path / options[0].strip("-") / "out"
        put_theirs(out, **theirs)
        status, said = fineweb_py(hub, out.parent, *options, "--out", "out")
        assert status == 0, said
        check_theirs(out, **theirs)
        assert not (out / fineweb.DOWNLOADS).exists()


def test_removing_downloads_leaves_the_rest(tmp_path):
    for name in ("a/b.parquet", "a/notes.txt", ".cache/huggingface/download/a/b.parquet.lock", ".cache/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    fineweb.remove_downloads(tmp_path, ["a/b.parquet", "a/never-there.parquet"])
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".cache/x", "a/notes.txt"]


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


def test_a_hub_that_says_nothing_is_given_up(hub, here, monkeypatch, capsys):
    here(hub)
    monkeypatch.setattr(fineweb, "NO_ANSWER", 0.05)
    hub.faults.append({"path": "/api/datasets/", "stall": 60, "times": 7})
    with pytest.raises(SystemExit, match="the file list of .* could not be downloaded .ReadTimeout"):
        fineweb.hub_files(REPO, "sample/10BT", ".parquet", None)
    assert capsys.readouterr().out.count("trying again") == 6
    hub.faults.append({"path": "/tree/", "stall": 60})
    _, entries = fineweb.hub_files(REPO, "sample/10BT", ".parquet", None)
    assert len(entries) == 3


def test_a_file_that_stalls_is_given_up_after_two_tries(hub, here, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    here(hub)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    _, entries = fineweb.hub_files(REPO, "sample/10BT", ".parquet", None)
    name, entry = next(iter(entries.items()))
    # its own six tries, twice
    hub.faults.append({"path": r"000_00000\.parquet$", "stall": 60, "times": 12})
    assert huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT <= 30
    with pytest.raises(SystemExit, match="nothing arrives any more: run the same command again later"):
        fineweb.fetch(REPO, name, None, tmp_path, entry)
    assert hub.faults == []
    assert fineweb.fetch(REPO, name, None, tmp_path, entry).stat().st_size == entry.size


@pytest.mark.parametrize("body", [
    b"<html><body>Please log in</body></html>", b"null", b"[]", b'{"sha": 5}', b'{"sha": "x"}', b"[" * 100_000,
])  # fmt: skip
def test_a_login_page_in_the_way_is_one_line(hub, here, body):
    here(hub)
    hub.faults.append({"path": "/api/datasets/", "body": body, "times": 2})
    with pytest.raises(SystemExit, match="doesn't answer as the hub does: does this network want a login"):
        fineweb.hub_files(REPO, "sample/10BT", ".parquet", None)
    hub.faults.clear()


def test_a_login_page_instead_of_a_file_is_one_line(hub, here, tmp_path):
    here(hub)
    _, entries = fineweb.hub_files(REPO, "sample/10BT", ".parquet", None)
    name, entry = next(iter(entries.items()))
    page = {"path": r"000_00000\.parquet$", "body": b"<html>log in</html>", "times": 1000}
    hub.faults += [page, page | {"method": "HEAD"}]
    with pytest.raises(SystemExit, match="000_00000.parquet"):
        fineweb.fetch(REPO, name, None, tmp_path, entry)
    hub.faults.clear()


def test_another_dataset_of_the_hub_in_the_folder_is_one_line(hub, here, tmp_path):
    here(hub)
    fineweb.download_shards(tmp_path / "out", "fineweb", 1)
    before = bytes_of(tmp_path / "out")
    with pytest.raises(SystemExit, match="out holds shards with dataset = 'kjj0/fineweb10B-gpt2', not"):
        fineweb.tokenize_hub(tmp_path / "out", "fineweb", None, 4000, "bytes", 0)
    assert bytes_of(tmp_path / "out") == before


def test_an_empty_repository_is_one_line(here, tmp_path):
    other = {"README.md": b"nothing here"}
    with HubServer({REPO: other, "kjj0/fineweb10B-gpt2": other}) as server:
        here(server)
        with pytest.raises(SystemExit, match="kjj0/fineweb10B-gpt2 has no .bin files"):
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
