"""What all programs share: whole files, the log, retries, signals."""
import argparse
import json
import signal

import pytest

import fineweb


def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def half(f):
        f.write(b"ne")
        raise OSError("no space left")

    with pytest.raises(SystemExit, match=r"/a .*no space left"):
        fineweb.write_atomic(path, half)
    assert path.read_bytes() == b"old"
    fineweb.write_atomic(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_the_log_is_only_added_to_and_each_event_is_a_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "train", "step": 3, "lo')  # a killed run's
    fineweb.append(path, "run", config={"prompt": "two\nlines"})
    fineweb.append(path, "train", step=0, loss=5.5)
    first, *lines = path.read_text().splitlines()
    assert first == '{"event": "train", "step": 3, "lo'
    assert [json.loads(line) for line in lines] == [
        {"event": "run", "config": {"prompt": "two\nlines"}}, {"event": "train", "step": 0, "loss": 5.5},
    ]  # fmt: skip
    with pytest.raises(SystemExit, match=f"{tmp_path} .*--resume"):
        fineweb.append(tmp_path, "run")


def unlucky(*errors):
    """An action that fails with these errors one after the other, then returns "done"."""
    left = list(errors)

    def action():
        if left:
            raise left.pop(0)
        return "done"

    return action


def http_error(status):
    error = OSError("the server says no")
    error.response = argparse.Namespace(status_code=status)
    return error


def test_retrying(monkeypatch, capsys):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    # an error without a word, as time-outs have it
    action = unlucky(OSError(), http_error(503), ConnectionResetError("reset\nby peer"))
    assert fineweb.retrying("x", action) == "done"
    assert pauses == [1, 2, 4]
    lines = capsys.readouterr().out.splitlines()
    reasons = ("OSError", "HTTP 503", "ConnectionResetError reset by peer")
    assert all(reason in line for reason, line in zip(reasons, lines, strict=True))
    with pytest.raises(SystemExit, match="x .*HTTP 503"):
        fineweb.retrying("x", unlucky(http_error(503), http_error(503)), pauses=(1,))
    pauses.clear()
    for hopeless in (http_error(404), http_error(403)):
        with pytest.raises(SystemExit, match="^x "):
            fineweb.retrying("x", unlucky(hopeless))
    with pytest.raises(KeyError):  # a mistake in the program is no network error
        fineweb.retrying("x", unlucky(KeyError("y")))
    assert pauses == []


def test_the_first_signal_is_noted_and_the_second_is_as_without():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with fineweb.noted_signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # which ends the process
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_hangup_that_nohup_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with fineweb.noted_signals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert signals == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
