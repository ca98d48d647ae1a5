"""The download paths, against a loopback server that speaks the hub's protocol."""
import hashlib
import io
import json

import numpy as np
import pytest
from helpers import (THEIRS, bytes_of, documents, item, put_theirs, refused, straight,
                     survives_a_kill_at_every_write, tokens_of, write, write_parquet)  # fmt: skip
from hub_server import HubServer

import fineweb
import hellaswag

REPO = "HuggingFaceFW/fineweb"


def parquet(texts):
    return write_parquet(io.BytesIO(), texts, row_group_size=50).getvalue()


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
    return write(folder, *options, env=hub.env() | {"RETRY_SECONDS": "0.01"})


TOKENISE = ("--tokenizer", "bytes", "--shard_tokens", 20_000, "--out", "out")


@pytest.mark.slow
def test_text_is_downloaded_tokenised_and_not_kept_and_faults_on_the_way_change_nothing(hub, tmp_path):
    status, said = fineweb_py(hub, tmp_path, *TOKENISE, "--workers", 1, "--shards", 2)
    assert status == 0, said
    names = {"fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"}
    assert bytes_of(tmp_path / "out").keys() == names | {"manifest.json"}
    status, said = fineweb_py(hub, tmp_path, *TOKENISE, "--workers", 1)
    assert status == 0, said
    expected = straight(documents(200) + documents(200, 1000) + documents(200, 2000))
    assert np.array_equal(tokens_of(tmp_path / "out"), expected)
    assert fineweb.read_manifest(tmp_path / "out")["revision"] == hub.sha(REPO)
    assert not (tmp_path / "out" / fineweb.DOWNLOADS).exists()
    (tmp_path / "again").mkdir()
    hub.faults += [
        {"path": r"000_00000\.parquet$", "stall": 0, "method": "HEAD"},
        {"path": r"000_00000\.parquet$", "flip": 2000, "times": 2},
        {"path": r"001_00000\.parquet$", "status": 503, "times": 2},
        {"path": r"002_00000\.parquet$", "truncate": 3000},
    ]
    status, said = fineweb_py(hub, tmp_path / "again", *TOKENISE, "--workers", 0)
    assert status == 0 and "HTTP 503; trying again in 1 s" in said, said
    assert said.count("arrived damaged") == 2, said
    assert bytes_of(tmp_path / "again/out") == bytes_of(tmp_path / "out")


@pytest.mark.slow
def test_ready_made_shards_and_one_that_stays_damaged(hub, tmp_path):
    folder = tmp_path / "data/fineweb10B"
    hub.faults.append({"path": r"train_000001\.bin$", "flip": 5000, "times": 7})
    status, said = fineweb_py(hub, tmp_path, "--pretokenized")
    assert status == 1 and "Traceback" not in said, said
    assert "train_000001.bin" in said.splitlines()[-1] and "arrived damaged" in said.splitlines()[-1]
    assert [path.name for path in folder.glob("*.bin")] == ["fineweb_val_000000.bin"]
    status, said = fineweb_py(hub, tmp_path, "--pretokenized", "--shards", 1)
    assert status == 0 and "\nNext: python train_gpt2.py --data_dir data/fineweb10B " in said, said
    shards = fineweb.read_manifest(folder)["shards"]
    assert [shard["tokens"] for shard in shards] == [3000, 5000]
    not_asked_for = {"path": r"train_000001\.bin$", "status": 404}  # since it is there already
    hub.faults += [not_asked_for, not_asked_for | {"method": "HEAD"}]
    hub.faults.append({"path": r"train_000002\.bin$", "status": 503})
    status, said = fineweb_py(hub, tmp_path, "--pretokenized")
    assert status == 0 and len(hub.faults) == 2, said
    hub.faults.clear()
    assert fineweb.open_dataset(folder)["tokenizer"] == "gpt2"
    assert fineweb.read_manifest(folder)["complete"]
    fineweb.verify(folder)
    assert not (folder / ".cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--pretokenized", "--out", "out"], [*TOKENISE, "--workers", 0]])
def test_what_a_user_has_in_the_folder_stays(hub, tmp_path, options):
    put_theirs(tmp_path / "out")
    status, said = fineweb_py(hub, tmp_path, *options)
    assert status == 0, said
    assert bytes_of(tmp_path / "out").items() >= THEIRS.items()
    assert not (tmp_path / "out" / fineweb.DOWNLOADS).exists()


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
    refused(f"{REPO} .*TimeoutError", list_files, tmp_path)
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
    refused("000_00000.parquet .*Timeout", fineweb.fetch, REPO, file, None, tmp_path)
    assert hub.faults == [] and capsys.readouterr().out.count("trying again") == 6
    assert fineweb.fetch(REPO, file, None, tmp_path).stat().st_size == file.size


@pytest.mark.parametrize("body", [
    b"<html>Please log in</html>", b"null", b"[]", b'{"sha": 5}', b'{"sha": "x"}', b"[" * 100_000,
])  # fmt: skip
def test_a_login_page_in_the_way_is_one_line(hub, here, body, tmp_path):
    here(hub)
    hub.faults.append({"path": "/api/datasets/", "body": body, "times": 2})
    refused(f"{REPO}.* login", list_files, tmp_path)
    hub.faults.clear()


def test_a_login_page_instead_of_a_file_is_one_line(hub, here, tmp_path):
    here(hub)
    file = list_files(tmp_path)["sample/10BT/000_00000.parquet"]
    page = {"path": r"000_00000\.parquet$", "body": b"<html>log in</html>", "times": 1000}
    hub.faults += [page, page | {"method": "HEAD"}]
    refused("000_00000.parquet", fineweb.fetch, REPO, file, None, tmp_path)
    hub.faults.clear()


def test_a_repository_that_is_empty_or_not_there_is_one_line(here, tmp_path):
    other = {"README.md": b"nothing here"}
    with HubServer({REPO: other, "kjj0/fineweb10B-gpt2": other}) as server:
        here(server)
        refused("kjj0/fineweb10B-gpt2 .*.bin", fineweb.download_shards, tmp_path / "out", "fineweb", None)
        # what the hub answers to a folder that isn't there, and to a repository
        for dataset in ("fineweb", "fineweb-edu"):
            fact = f"HuggingFaceFW/{dataset} .*HTTP 404"
            refused(fact, fineweb.tokenize_hub, tmp_path / "out", dataset, None, 4000, "bytes", 0)
    assert not list(tmp_path.glob("out/*.bin"))


def test_hellaswag_download_is_whole_or_not_there(tmp_path, monkeypatch):
    content = (json.dumps(item("b c", ["d", "e", "f", "g"])) + "\n").encode() * hellaswag.N_ITEMS
    half = content[: len(content) // 2]
    path = tmp_path / "data/hellaswag/hellaswag_val.jsonl"
    monkeypatch.setenv("RETRY_SECONDS", "0.01")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(content).hexdigest())
    other = content.replace(b'"b c"', b'"b d"')
    with HubServer({}, {"val.jsonl": content, "half.jsonl": half, "other.jsonl": other}) as server:
        for name, fact in (("other", "checksum"), ("half", "5,021 of 10,042 lines")):
            monkeypatch.setenv("HELLASWAG_URL", f"{server.url}/plain/{name}.jsonl")
            refused(fact, hellaswag.download, path)
            assert not path.exists()
        server.faults.append({"path": "val.jsonl", "truncate": 1000})
        server.faults.append({"path": "val.jsonl", "status": 503})
        monkeypatch.setenv("HELLASWAG_URL", server.url + "/plain/val.jsonl")
        hellaswag.download(path)
        assert server.faults == []
    assert len(hellaswag.load(path, hellaswag.N_ITEMS)) == hellaswag.N_ITEMS
    assert [p.name for p in path.parent.iterdir()] == ["hellaswag_val.jsonl"]
