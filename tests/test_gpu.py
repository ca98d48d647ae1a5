"""tools.gpu: what is counted and estimated, the report, the check of a real GPU and the bench."""
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sympy
import torch
import torch.nn.functional as F
from conftest import ROOT
from helpers import table_rows
from torch._inductor.dependencies import MemoryDep
from torch._inductor.virtualized import V

from tools.gpu import __main__ as command
from tools.gpu import check, report, step, trace


def recorded(function, *args):
    """What the Recorder notes of a function of tensors on the CPU."""
    trace.trace.calls.clear()
    with trace.Recorder("cpu"):
        function(*args)
    return [(call.name, call.n_bytes, call.flops) for call in trace.trace.calls]


def test_operations_are_counted():
    a, b = torch.zeros(8, 16), torch.zeros(16, 4)
    assert recorded(torch.mm, a, b) == [("mm", 4 * (8 * 16 + 16 * 4 + 8 * 4), 2 * 8 * 16 * 4)]
    assert recorded(lambda: torch.mm(a, b, out=torch.zeros(8, 4)))[-1] == ("mm", 896, 1024)
    assert recorded(lambda: a.view(4, 32).t()[:, None].transpose(0, 1)) == []  # nothing is moved
    assert recorded(lambda: a.add_(1.0)) == [("add_", 2 * 4 * 128, 0)]  # read and written
    assert recorded(torch.zeros(1).expand(1000).neg) == [("neg", 4 + 4000, 0)]
    weight = torch.nn.Parameter(torch.zeros(1000))
    weight.grad = torch.zeros(1000)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()
    [n_bytes] = [n_bytes for name, n_bytes, _ in recorded(optimizer.step) if name == "_fused_adamw_"]
    assert n_bytes == pytest.approx(7 * 4000, abs=8)  # four read, three written, and the step


def test_causal_attention_is_half_of_the_square():
    q = torch.zeros(2, 3, 64, 16)
    square = 2 * 3 * 64 * 64 * 16 * 4  # two products
    forward = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert trace.count_flops(forward, (q, q, q, 0.0, False), {}, (q,)) == square
    assert trace.count_flops(forward, (q, q, q, 0.0, True), {}, (q,)) == square / 2
    assert trace.count_flops(forward, (q, q, q), {"is_causal": True}, (q,)) == square / 2


def test_a_kernels_bytes():
    """x (64, 32), a vector that is broadcast and twice the same element, and a result made inside."""
    from torch._inductor import scheduler

    i, j, token = sympy.symbols("i j token", integer=True)

    def over(name, index):
        return MemoryDep(name, index, (i, j), (sympy.Integer(64), sympy.Integer(32)))

    class Node(scheduler.BaseSchedulerNode):
        def __init__(self, reads, made):
            self.read_writes = SimpleNamespace(reads=reads, writes=[over(made, 32 * i + j)])
            self.get_nodes = lambda: [self]
            self.get_buffer_names = lambda: [made]

    graph = SimpleNamespace(removed_buffers={"inside"}, get_dtype=lambda name: torch.bfloat16)
    graph.get_numel = {"x": 2048, "vector": 32, "inside": 2048, "y": 2048}.get
    x = over("x", 32 * i + j)
    first = Node([x, over("vector", j)], "inside")
    second = Node([over("inside", 32 * i + j), x, over("x", 32 * i + 31 - j)], "y")
    with V.set_graph_handler(graph):
        n_bytes, _ = trace.kernel_bytes(SimpleNamespace(removed_buffers=set()), [first, second])
    assert n_bytes == 2 * (2048 + 32 + 2048)  # x once, though by two expressions
    assert trace.count_elements(over("table", 32 * token + j)) == 64 * 32  # token was loaded: no range


def test_kernels_that_are_not_inductors_are_counted_and_not_launched(monkeypatch):
    class Kernel:
        fn = torch.relu

        def run(self, *args, grid, warmup, **kwargs):
            return "compiled" if warmup else pytest.fail("launched")

    stub = SimpleNamespace(JITFunction=Kernel, Autotuner=type("Autotuner", (), {}))
    for name in ("triton", "triton.runtime", "triton.runtime.autotuner", "triton.runtime.jit"):
        monkeypatch.setitem(sys.modules, name, stub)
    trace.install_launches()
    x = torch.zeros(4, 8)
    assert Kernel().run(x, x, 5, grid=(1,), warmup=False, out=torch.zeros(2)) == "compiled"
    last = trace.trace.calls[-1]
    assert (last.name, last.n_bytes) == ("relu", 4 * (32 + 2)) and trace.trace.own["relu"] == "compiled"


def call(name, n_bytes, flops=0, graph="forward", kind="extern", dtype="bfloat16", shapes=()):
    return trace.Call(graph, kind, name, n_bytes, flops, dtype, list(shapes))


def test_a_call_takes_the_larger_of_its_times():
    gpu = report.GPUS["a100"]
    assert report.seconds(call("mm", 1e6, 1e12), gpu, 0)[:2] == (1e12 / 312e12 / 0.7, "products")
    assert report.seconds(call("mm", 1e9, 1e3), gpu, 0)[0] == 1e9 / 2.039e12 / 0.85
    assert report.seconds(call("mm", 1e6, 1e12, dtype="float32"), gpu, 0)[0] == 1e12 / 156e12 / 0.7
    assert report.seconds(call("triton_poi_fused_add", 10, kind="triton"), gpu, 0)[:2] == (3e-6, "rest")
    fused = call("triton_poi_fused_scaled_dot_product", 10, kind="triton")
    assert report.seconds(fused, gpu, 0)[1] == "rest"  # in a kernel's name only


@pytest.mark.parametrize("window", [1, 5, 12, 100])
def test_flex_attention_costs_what_the_window_lets_through(window):
    i = torch.arange(12)
    seen = ((i <= i[:, None]) & (i[:, None] - i < window)).sum().item()
    shapes = [[12], [2, 4, 12, 6], [2, 1, 12, 6]]
    assert report.flex_flops(shapes, window, False) == 2 * 4 * seen * 6 * 4
    assert report.flex_flops(shapes, window, True) == 2 * 4 * seen * 6 * 10


def test_convolutions_as_torch_counts_them():
    from torch.utils.flop_counter import FlopCounterMode

    x, w = torch.randn(2, 6, 20, 24), torch.randn(6, 1, 3, 5)  # depthwise
    with FlopCounterMode(display=False) as counter:
        F.conv2d(x, w, groups=6)
    found = report.convolution_flops(call("convolution", 0, shapes=[x.shape, w.shape]))
    assert found == counter.get_total_flops()


def test_an_update_is_spread_over_the_whole_batch():
    record = {"rows": 4, "tokens": 1000, "micro_batches": 2, "batch_tokens": 40_000, "parameters": 10}
    calls = [call("mm", 8e9, 8e9), call("neg", 8e9, graph="backward"),
             call("_fused_adamw_", 4e6, graph="update")]  # fmt: skip
    found = report.estimate(calls, record, report.GPUS["h200"], 0)
    assert found["bytes_per_token"] == {"products": 1e6, "rest": 1e6, "update": 100 + 12 * 10 * 9 / 40_000}
    assert found["tokens_per_second"] == 1 / sum(found["seconds_per_token"].values())
    assert found["launches"] == 1 and list(found["costliest"])[0].startswith("mm")


def test_a_kernel_is_as_good_as_its_best_configuration():
    compiled = {"good": [[255, 90, 0, ""], [128, 0, 0, ""]], "spills": [[255, 90, 0, ""], [255, 40, 0, ""]],
                "too_large": [[128, 0, 200_000, "is too large"]]}  # fmt: skip
    assert report.kernels(compiled) == {
        "kernels": 3, "configurations": 5, "spilling": {"spills": 40}, "unfit": {"too_large": "is too large"},
    }  # fmt: skip


def test_the_table_has_the_measurement_beside_the_estimate(run, tmp_path):
    record = json.loads((ROOT / "results/gpu/gpt2-a100.json").read_text())
    record["measured"] = {"rows": 64, "rates": [180e3, 190e3, 170e3], "peak": 32e9, "curve": "equal"}
    report.write(report.path_of(tmp_path / "new", "x/train_gpt2.py", "a100"), record)
    cells = table_rows(run(command, "table", "new")[1])["train_gpt2.py"]
    assert cells[:2] == ["a100", "64"]
    assert cells[-3:] == ["198k", "180k, 32.0 GB, losses equal", "15.4 h, 1.9 h"]
    assert "OutOfMemoryError" in report.details(record | {"error": "OutOfMemoryError: 1 TB"})[-1]


def gpu(*arguments):
    words = [sys.executable, "-m", "tools.gpu", *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, check=False)
    return done.returncode, done.stdout, done.stderr.strip()


no_cuda = torch.version.cuda is None


@pytest.mark.skipif(not no_cuda, reason="torch is a CUDA build")
def test_without_cudas_libraries_it_says_how_to_get_them():
    status, _, said = gpu("fake", "train_gpt2.py", "--gpu", "h200")
    assert status == 1 and "\n" not in said and said.count("pip install") == 2


@pytest.mark.slow
@pytest.mark.skipif(no_cuda, reason="torch is not a CUDA build")
def test_a_script_on_a_gpu_that_is_not_there(tmp_path):
    text = (ROOT / "train_gpt2.py").read_text()
    (tmp_path / "train_mine.py").write_text(text.replace("n_layer: int = 12", "n_layer: int = 1"))
    status, said, _ = gpu("fake", tmp_path / "train_mine.py", "--rows", 8, "--out", tmp_path)
    record = json.loads((tmp_path / "mine-a100.json").read_text())
    assert status == 0 and record["graphs"] == {"forward": 1, "backward": 1} and not record["breaks"]
    assert record["chosen_rows"] == 64 and 10e9 > record["peak"] > 16 * record["parameters"]
    # forward and backward, of the head and a block
    assert record["flops_per_token"]["products"] == 6 * (50_304 + 12 * 768) * 768


@pytest.mark.parametrize("arguments, fact", [
    (["fake", "train_none.py"], "train_none.py"),
    (["bench", "train_mine.py"], "train_mine.py has no start"),
    (["bench", ROOT / "train_gpt2.py", "--steps", "0"], "--steps 0"),
    (["fake", ROOT / "train_gpt2.py", "--price", "nan"], "--price nan"),
    (["table", ROOT / "tests"], "tests"),
])  # fmt: skip
def test_what_can_not_be_is_one_line(run, arguments, fact):
    Path("train_mine.py").write_text("class Config:\n    pass\n\nclass Model:\n    pass\n")
    status, said = run(command, *arguments)
    assert status == 1 and fact in said and said.count("\n") == 1


def test_steps_are_the_scripts_own_and_taken_in_turn(tmp_path, capsys):
    for name in "ab":
        text = (ROOT / "train_gpt2.py").read_text().replace("n_layer=4", "n_layer=1")
        text += "\nown_step = train_step\ndef train_step(*args):\n"
        text += f"    print('{name}', args[4])\n    return own_step(*args)\n"
        (tmp_path / f"train_{name}.py").write_text(text)
    found = step.measure([tmp_path / "train_a.py", tmp_path / "train_b.py"], 2, rows=2, tiny=True)
    assert capsys.readouterr().out.split() == "a 0 b 0 a 1 b 1 a 2 b 2 a 3 b 3".split()
    assert [len(mine["rates"]) for mine in found] == [2, 2] and min(found[0]["rates"]) > 0


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma", "deepseek", "mta", "rwkv"])
def test_two_layers_have_one_of_each_kind(name):
    config = check.small_config(importlib.import_module(f"train_{name}"), tiny=False)
    assert config.n_layer == 2 and config.block_size == 512
    assert getattr(config, "global_every", 2) == getattr(config, "conv_every", 2) == 2
    assert getattr(config, "window", 128) == 128


def test_what_a_curve_is_worth():
    falling = [9.0 - 0.1 * number for number in range(20)]
    assert check.judge(falling, falling, 0.01, "wte") == "equal"
    assert "step 3" in check.judge(falling[:3] + [math.nan] + falling[4:], falling, 0.01, "wte")
    assert "fall" in check.judge([9.0] * 20, [9.0] * 20, 0.01, "wte")
    assert "blocks.0.mlp" in check.judge(falling, falling, 0.5, "blocks.0.mlp")
    ours = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([math.nan])}
    assert check.furthest(ours, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0])}) == (math.inf, "b")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure the GPU")
def test_a_rehearsal(tmp_path):
    status, said, _ = gpu("check", "train_llama.py", "--tiny", "--out", tmp_path)
    record = json.loads((tmp_path / "llama-cpu.json").read_text())
    assert status == 0 and "losses equal" in said
    assert len(record["measured"]["curves"]["uncompiled"]["losses"]) == check.STEPS
    gpu("check", "train_llama.py", "--tiny", "--out", tmp_path)
    assert json.loads((tmp_path / "llama-cpu.json").read_text()) == record  # not measured again
