"""The benchmarks run, at small shapes, and say what they are asked for. Their speed is not tested."""
import contextlib
import io
import json
import statistics
import sys

import pytest
import torch

from tools import bench


@pytest.fixture
def call(monkeypatch, capfd):
    """call(tool, *arguments) -> (what stopped it or None, stdout, stderr) of a program of tools."""

    def call(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
        capfd.readouterr()
        try:
            tool.main()
            stopped = None
        except SystemExit as error:
            stopped = error.code
        said, errors = capfd.readouterr()
        return stopped, said, errors

    return call


def test_a_step_in_a_fresh_process(call, tmp_path):
    path = tmp_path / "results/bench.json"
    options = ["--micro_batch", 2, "--repeats", 2, "--warm_up", 1, "--gpus", 1, 4]
    options += ["--profile", tmp_path / "trace", "--json", path]
    stopped, said, errors = call(bench, "gpt2", "--tiny", *options)
    assert stopped is None, errors
    file = json.loads(path.read_text())
    assert file["command"].startswith("python -m tools.bench gpt2 --tiny") and file["git"]
    (result,) = file["results"]
    rate = statistics.median(result["rates"]["ours"])
    assert f"{10e9 / rate / 3600:,.1f} h on 1" in said and f"{10e9 / rate / 4 / 3600:,.1f} h on 4" in said
    assert 1e8 < result["memory"] < 4e9
    assert "aten::" in errors
    assert json.loads((tmp_path / "trace/gpt2.json").read_text())["traceEvents"]


@pytest.fixture
def in_this_process(monkeypatch):
    """bench.run() starts no process and no peak is measured: they would take most of the time here."""

    def run(**job):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            bench.work(json.loads(json.dumps(job)))
        return json.loads(said.getvalue().splitlines()[-1])

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(bench, "measured_peak", lambda device, dtype: 1e11)


def test_a_step_beside_its_peers(call, in_this_process, tmp_path):
    path = tmp_path / "bench.json"
    options = ["--micro_batch", 2, "--repeats", 3, "--warm_up", 1, "--json", path]
    stopped, said, _ = call(bench, "deepseek", "--tiny", "--peers", *options)
    assert stopped is None
    alone, *pairs = json.loads(path.read_text())["results"]
    assert [pair["kinds"] for pair in pairs] == [["ours", "transformers"], ["ours", "gpt2"]]
    for result in (alone, *pairs):
        for rates in result["rates"].values():
            assert len(rates) == 3 and min(rates) > 0
    assert 1e8 < pairs[0]["peer_memory"] < 1e11 and 1e8 < pairs[0]["our_memory"] < 1e11
    assert "(both without MTP)" in said
    # unlike torch's counter, ours leaves out the masked half of attention, and elementwise work
    assert 0.5 < alone["flops_per_token"] / alone["counted_flops_per_token"] < 1.05


def test_where_memory_can_not_be_measured_a_line_says_so(call, in_this_process, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as under Windows
    options = ["--micro_batch", 2, 3, "--repeats", 1, "--warm_up", 0]
    stopped, said, _ = call(bench, "gpt2", "--tiny", "--peers", *options)
    assert stopped is None
    assert said.count("memory: not measured under Windows") == 1
    assert said.count(" | – | 10B tokens") == 2 and "x its tok/s" in said


def test_the_peak_is_the_data_sheets_where_it_is_known(monkeypatch):
    import train_gpt2

    def find_peak(name, dtype):
        machine = train_gpt2.Machine(0, 1, torch.device("cpu"), name, dtype, "")
        return bench.find_peak(train_gpt2, machine)["peak_flops"]

    monkeypatch.setattr(bench, "measured_peak", lambda device, dtype: 1.0)
    assert find_peak("Tesla T4", torch.float16) == 65e12
    assert find_peak("Tesla T40", torch.float16) == 1.0
    assert find_peak("Tesla T4", torch.float32) == 1.0


@pytest.mark.parametrize("arguments, expected", [
    (["gpt3"], "there is no gpt3"),
    (["llama", "--set", "n_expert=4"], "train_llama.py has no option n_expert"),
    (["llama", "--set", "block_size=long"], "'long' is not of type int"),
    (["--repeats", "0"], "at least 1"),
    (["gpt2", "--gpus", "0"], "--gpus must be at least 1"),
    (["gpt2", "--json", "."], "--json .: is a folder, give the name of a file"),
    (["--swift"], "--swift"),
])  # fmt: skip
def test_a_mistake_is_one_line(arguments, expected, call):
    stopped, _, errors = call(bench, *arguments)
    assert stopped and expected in f"{stopped}{errors}"


@pytest.mark.parametrize("part", ["recurrence", "experts"])
def test_the_parts_agree_with_the_plain_way(part, call, tmp_path):
    from tools import bench_parts

    stopped, said, _ = call(bench_parts, part, "--repeats", 1, "--json", tmp_path / "parts.json")
    assert stopped is None and said.startswith(f"{part:10}")
    assert set(json.loads((tmp_path / "parts.json").read_text())["seconds"][part]) == {"ours", "plain"}
