"""The benchmarks run, at small shapes, and say what they are asked for. How fast anything is they are not asked here."""
import json
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT


def call(tool, *arguments):
    process = subprocess.run([sys.executable, "-m", f"tools.{tool}", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    return process.returncode, process.stdout, process.stderr


def test_a_step_beside_its_peers_with_a_trace(tmp_path):
    path = tmp_path / "results/bench.json"
    status, said, errors = call("bench", "deepseek", "--tiny", "--peers", "--micro_batch", 2, "--repeats", 3, "--warm_up", 1, "--gpus", 1, 4,
                                "--profile", tmp_path / "trace", "--json", path)  # fmt: skip
    assert status == 0, errors
    alone, *pairs = json.loads(path.read_text())["results"]
    assert [pair["kinds"] for pair in pairs] == [["ours", "transformers"], ["ours", "gpt2"]]
    assert all(len(rates) == 3 and min(rates) > 0 for result in (alone, *pairs) for rates in result["rates"].values())
    rate = statistics.median(alone["rates"]["ours"])
    assert f"{10e9 / rate / 3600:,.1f} h on 1" in said and f"{10e9 / rate / 4 / 3600:,.1f} h on 4" in said
    assert 1e8 < alone["memory"] < 4e9 and 1e8 < pairs[0]["peer_memory"] < 4e9
    # ours leaves out the half of attention that is masked, and the elementwise work; torch's counter does neither
    assert 0.5 < alone["flops_per_token"] / alone["counted_flops_per_token"] < 1.05
    assert "aten::" in errors
    assert json.loads((tmp_path / "trace/deepseek.json").read_text())["traceEvents"]


@pytest.mark.parametrize("arguments, said", [
    (["gpt3"], "there is no gpt3"),
    (["llama", "--set", "n_expert=4"], "train_llama.py has no option n_expert"),
    (["llama", "--set", "block_size=long"], "'long' is not of type int"),
    (["--repeats", "0"], "at least 1"),
    (["--swift"], "--swift"),
])  # fmt: skip
def test_a_mistake_is_one_line(arguments, said):
    status, out, errors = call("bench", *arguments)
    assert status != 0 and said in errors + out and "Traceback" not in errors


@pytest.mark.parametrize("part", ["recurrence", "experts"])
def test_the_parts_agree_with_the_plain_way(part, tmp_path):
    status, said, errors = call("bench_parts", part, "--repeats", 1, "--json", tmp_path / "parts.json")
    assert status == 0 and f"{part:10}" in said, errors
    assert set(json.loads((tmp_path / "parts.json").read_text())["seconds"][part]) == {"ours", "plain"}
