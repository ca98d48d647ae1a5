"""What all programs share: options, the log, whole files, retries."""
import argparse
import dataclasses
import importlib
import json
import math
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

import fineweb


@dataclasses.dataclass
class Config:
    steps: int = fineweb.option(100, "optimizer steps, of which 5% warm up")
    lr: float = fineweb.option(0.25, "learning rate")
    decay: float = fineweb.option(0.5, "weight decay", zero=True)
    device: str = fineweb.option("auto", "where to run", ("auto", "cpu"))
    run_name: str = fineweb.option("", "the run's folder")


def parse(monkeypatch, *words, **replaced):
    monkeypatch.setattr("sys.argv", ["program", *words])
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    return fineweb.parse_options(parser, Config, **replaced)


def test_only_given_fields_are_returned(monkeypatch):
    given, args = parse(monkeypatch)
    assert given == {} and not args.tiny
    given, args = parse(monkeypatch, "--tiny", "--lr", "1", "--steps=7", "--run", "a")
    assert given == {"lr": 1.0, "steps": 7, "run_name": "a"} and args.tiny
    assert isinstance(given["lr"], float)


@pytest.mark.parametrize("words, message", [
    (["--step", "7"], "unknown option --step: did you mean --steps? (--help lists them all)"),
    (["--runname=a"], "unknown option --runname=a: did you mean --run_name?"),
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
])  # fmt: skip
def test_wrong_options_are_one_line(monkeypatch, words, message):
    with pytest.raises(SystemExit) as error:
        parse(monkeypatch, *words)
    assert error.value.code.startswith(message) and "\n" not in error.value.code


def test_help_shows_the_values_that_will_run(monkeypatch, capsys):
    recipe = {"lr": 0.125, "decay": 0.5}
    tiny = {"lr": 2.0, "steps": 10, "device": "auto"}
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--help", recipe=recipe, tiny=tiny)
    said = " ".join(capsys.readouterr().out.split())
    assert "--steps optimizer steps, of which 5% warm up [100]; --tiny: [10] --lr" in said
    assert "--lr learning rate [0.125]; --recipe shared: [0.25]; --tiny: [2.0] --decay" in said
    assert "--decay weight decay [0.5] --device" in said
    assert "--device {auto,cpu} where to run [auto] --run_name" in said


def test_numbers_out_of_range_are_one_line():
    fineweb.check_options(Config())
    fineweb.check_options(Config(decay=0.0))
    with pytest.raises(SystemExit, match="^--lr 0: must be more than 0$"):
        fineweb.check_options(Config(lr=0))
    with pytest.raises(SystemExit, match="^--decay -1: must be at least 0$"):
        fineweb.check_options(Config(decay=-1))
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(SystemExit, match="^--lr (nan|inf): must be"):
            fineweb.check_options(Config(lr=wrong))


def test_the_log_is_cut_where_the_run_goes_on(tmp_path):
    path = tmp_path / "run/log.jsonl"
    with fineweb.open_log(path, 0) as log:
        log.write(json.dumps({"event": "run"}) + "\n")
        for step in range(5):
            log.write(json.dumps({"event": "train", "step": step}) + "\n")
        log.write('{"event": "tra')  # killed here
    with fineweb.open_log(path, 3) as log:
        log.write(json.dumps({"event": "train", "step": 3, "again": True}) + "\n")
        lines = path.read_text().splitlines()  # it is there without a flush
    steps = [json.loads(line).get("step") for line in lines]
    assert steps == [None, 0, 1, 2, 3]
    assert json.loads(lines[-1])["again"]
    before = path.read_bytes()
    with fineweb.open_log(path, math.inf) as log:  # beside a process that may be writing to it
        log.write("more\n")
    assert path.read_bytes() == before + b"more\n"
    with fineweb.open_log(None, 0) as log:
        log.write("kept nowhere")


def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def half(f):
        f.write(b"ne")
        raise OSError("no space left")

    with pytest.raises(SystemExit, match="a can't be written .no space left.: make room"):
        fineweb.write_atomic(path, half)
    assert path.read_bytes() == b"old"
    fineweb.write_atomic(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_file_and_a_folder_in_each_others_place_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for action in (
        lambda: fineweb.make_folder(tmp_path / "file"),
        lambda: fineweb.make_folder(tmp_path / "file/folder"),
        lambda: fineweb.refuse_folder("--json", tmp_path),
        lambda: fineweb.write_atomic(tmp_path, lambda f: f.write(b"")),
    ):
        with pytest.raises(SystemExit) as error:
            action()
        assert str(tmp_path) in error.value.code and "\n" not in error.value.code
    assert "(Is a directory): mend that, then" in error.value.code
    fineweb.refuse_folder("--json", None)


class Unlucky:
    """Fails with these errors one after the other, then returns "done"."""

    def __init__(self, *errors):
        self.errors = list(errors)

    def __call__(self):
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def http_error(status):
    error = OSError("the server says no")
    error.response = argparse.Namespace(status_code=status)
    return error


def test_retrying(monkeypatch, capsys):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    # an error without a word, as time-outs have it
    action = Unlucky(OSError(), http_error(503), ConnectionResetError("reset\nby peer"))
    assert fineweb.retrying("x", action) == "done"
    assert pauses == [1, 2, 4]
    assert capsys.readouterr().out.splitlines() == [
        "x: OSError; trying again in 1 s",
        "x: HTTP 503; trying again in 2 s",
        "x: ConnectionResetError reset by peer; trying again in 4 s",
    ]
    with pytest.raises(SystemExit, match="x could not be downloaded .HTTP 503.: run the same"):
        fineweb.retrying("x", Unlucky(http_error(503), http_error(503)), pauses=(1,))
    pauses.clear()
    for hopeless in (http_error(404), OSError(28, "No space left on device")):
        with pytest.raises(SystemExit, match="could not be downloaded"):
            fineweb.retrying("x", Unlucky(hopeless))
    with pytest.raises(KeyError):  # a mistake in the program is no network error
        fineweb.retrying("x", Unlucky(KeyError("y")))
    assert pauses == []


def test_copies_are_kept_one_per_version(tmp_path):
    file = tmp_path / "script.py"
    folder = tmp_path / "run"
    folder.mkdir()
    for content in ("one", "one", "two", "three", "two"):
        file.write_text(content)
        fineweb.keep_copy(file, folder)
    copies = {path.name: path.read_text() for path in folder.iterdir()}
    assert copies == {"script.py": "one", "script.2.py": "two", "script.3.py": "three"}
    for name, content in copies.items():  # a copy that is run is no other script
        fineweb.keep_copy(folder / name, folder)
        hash = fineweb.script_hash(folder / name)
        assert fineweb.find_copy(folder, "script", hash) == folder / name, content
    assert len(list(folder.iterdir())) == 3
    assert fineweb.find_copy(folder, "script", "unknown") == folder / "script.py"


LOCKER = """\
import pathlib, sys, time
import fineweb
fineweb.lock_folder(pathlib.Path(sys.argv[1]), "wait for it", wait=len(sys.argv) > 2)
print("locked", flush=True)
time.sleep(60)
"""


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    folder = tmp_path / "new"
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen([sys.executable, "-c", LOCKER, folder], **options)
    assert first.stdout.readline() == "locked\n"
    name = rf"process {first.pid} on \S+"
    with pytest.raises(SystemExit, match=f"new is in use by {name}: do something else$"):
        fineweb.lock_folder(folder, "do something else")
    waiting = subprocess.Popen([sys.executable, "-c", LOCKER, folder, "wait"], **options)
    assert waiting.stdout.readline().endswith(f"process {first.pid} on {socket.gethostname()}: waiting for it\n")
    first.kill()
    first.wait()
    assert waiting.stdout.readline() == "locked\n"
    waiting.kill()
    waiting.wait()
    fineweb.lock_folder(folder, "do something else")
    fineweb.lock_folder(folder, "twice is once")
    fineweb.unlock_folder(folder)
    fineweb.unlock_folder(folder)


def test_numbers_in_a_few_letters():
    assert [fineweb.short(n) for n in (0.5, 104.4, 17_136, 345_120, 2_761_234)] == ["0.5", "104", "17.1k", "345k", "2.76M"]
    seconds = (4.4, 59, 600, 7200, 86_400, 1e7)
    assert [fineweb.duration(s) for s in seconds] == ["4s", "59s", "10m", "2.0h", "24.0h", "116d"]


def test_the_first_signal_is_noted_and_the_second_ends_the_process():
    program = "import fineweb, os, signal\n"
    program += "received = fineweb.catch_signals()\n"
    program += "os.kill(os.getpid(), signal.SIGTERM)\n"
    program += "print(received == [signal.SIGTERM], flush=True)\n"
    program += "os.kill(os.getpid(), signal.SIGTERM)\n"
    program += "print('still here')\n"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "True\n" and result.returncode == -signal.SIGTERM


def test_nested_facts_are_listed(capsys):
    fineweb.show({"torch": "2.13", "data": {"tokenizer": "gpt2"}})
    assert capsys.readouterr().out.split() == ["torch", "2.13", "data", "tokenizer", "gpt2"]


def test_git_version(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert fineweb.git_version(tmp_path) == "unknown"


@pytest.mark.parametrize("seconds, said", [(0.5, ""), (3.0, "scoring takes about 2 min here; take fewer\n")])
def test_a_long_loop_says_how_long_it_takes(monkeypatch, capsys, seconds, said):
    now = [0.0]
    monkeypatch.setattr(fineweb.time, "perf_counter", lambda: now[0])
    seen = []
    for item in fineweb.with_estimate(range(40), "scoring", "take fewer"):
        now[0] += 100 if item == 0 else seconds  # the first compiles
        seen.append(item)
    assert seen == list(range(40)) and capsys.readouterr().out == said


PROGRAMS = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")] if "\ndef main():" in path.read_text()]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_help_fits_80_columns(path, monkeypatch, capsys):
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and said.startswith("usage: ")
    assert [line for line in said.splitlines() if len(line) > 80] == []
