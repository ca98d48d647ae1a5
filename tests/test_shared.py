"""What the programs share: one line instead of a traceback, whole files, locks, retries."""
import argparse
import importlib
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

import fineweb


def test_of_several_processes_one_speaks(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="the reason"):
        fineweb.fail("the reason")
    fineweb.say("a line")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        fineweb.fail("the reason")
    fineweb.say("another")
    assert ended.value.code == 1 and capsys.readouterr().out == "a line\n"


def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def half(f):
        f.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(SystemExit, match="a can't be written .No space left on device.: make room, then sing"):
        fineweb.write_atomic(path, half, "sing")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    fineweb.write_atomic(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_file_and_a_folder_in_each_others_place_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for action in (
        lambda: fineweb.lock(tmp_path / "file/folder", ""),
        lambda: fineweb.write_atomic(tmp_path, lambda f: f.write(b"")),
        lambda: fineweb.shard_tokens(tmp_path),
    ):
        with pytest.raises(SystemExit) as error:
            action()
        assert str(tmp_path) in error.value.code and "\n" not in error.value.code
        assert "directory" in error.value.code


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
    with pytest.raises(SystemExit, match="x .*HTTP 503"):
        fineweb.retrying("x", Unlucky(http_error(503), http_error(503)), pauses=(1,))
    pauses.clear()
    for hopeless in (http_error(404), OSError(28, "No space left on device")):
        with pytest.raises(SystemExit, match="x "):
            fineweb.retrying("x", Unlucky(hopeless))
    with pytest.raises(KeyError):  # a mistake in the program is no network error
        fineweb.retrying("x", Unlucky(KeyError("y")))
    assert pauses == []


LOCKER = """\
import pathlib, sys, time
import fineweb
fineweb.lock(pathlib.Path(sys.argv[1]), "wait for it", wait=len(sys.argv) > 2)
print("locked", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    folder = tmp_path / "new"
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen([sys.executable, "-c", LOCKER, folder], **options)
    assert first.stdout.readline() == "locked\n"
    name = rf"process {first.pid} on \S+"
    with pytest.raises(SystemExit, match=f"new is in use by {name}: do something else$"):
        fineweb.lock(folder, "do something else")
    waiting = subprocess.Popen([sys.executable, "-c", LOCKER, folder, "wait"], **options)
    assert waiting.stdout.readline().endswith(f"process {first.pid} on {socket.gethostname()}: waiting for it\n")
    first.kill()
    first.wait()
    assert waiting.stdout.readline() == "locked\n"
    waiting.kill()
    waiting.wait()
    fineweb.lock(folder, "do something else")
    fineweb.lock(folder, "twice is once")
    fineweb.unlock(folder)
    fineweb.unlock(folder)


@pytest.mark.parametrize("name", ["fineweb", "hellaswag"])
def test_help_lists_every_option(name, monkeypatch, capsys):
    program = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and f"python {name}.py" in said
    for option in program.Args.__annotations__:
        assert f"--{option} " in said, option
