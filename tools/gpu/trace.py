"""
In a process with the library in front of CUDA: a script's training step is
compiled and run, and what it launches is counted.

All that is above CUDA runs as on a machine with a GPU: autocast, Dynamo,
AOTAutograd, Inductor with its choices for that GPU, the autograd engine and the
allocator. Inductor's Triton kernels are noted instead of launched, with the
bytes that they read and write by the scheduler's index expressions; Triton and
the ptxas in its package then compile each to machine code. Other operations
are seen by a TorchDispatchMode around the compiled graphs and the optimizer.
"""
import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from tools.gpu import report, step

# operations that move nothing
FREE = set("""
    empty empty_strided empty_like new_empty new_empty_strided view reshape as_strided detach alias t
    transpose permute expand slice select unsqueeze squeeze split split_with_sizes unbind _unsafe_view set_
    resize_ record_stream lift_fresh _reshape_alias is_same_size _local_scalar_dense resize_storage_bytes_
""".split())


@dataclasses.dataclass
class Call:
    """Something that was launched."""

    graph: str  # forward, backward, update; own: outside of the compiled ones
    kind: str  # triton, or extern: cuBLAS's, cuDNN's and torch's own kernels
    name: str
    n_bytes: int  # read and written
    flops: int = 0
    dtype: str = ""
    shapes: list = dataclasses.field(default_factory=list)  # of the first tensors


class Trace:
    """What was launched and compiled so far."""

    def __init__(self):
        self.calls = []
        self.graph = "update"
        self.graphs = {}  # id of a compiled graph -> (the graph, its kind)
        self.sources = {}  # Triton kernel -> its source
        self.kernels = {}  # Triton kernel -> (its bytes, the shapes of a template's arguments)
        self.own = {}  # Triton kernel of the script's own, or of a library -> it, compiled


trace = Trace()

# ==========================================================================
# Counting


class Recorder(TorchDispatchMode):
    """Notes each ATen operation on a device: its bytes, and the FLOPs of products and attention."""

    def __init__(self, device="cuda"):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.name().split("::")[1].split(".")[0]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if name in FREE or not any(x.device.type == self.device for x in tensors + made):
            return out
        n_bytes = sum(map(size, tensors)) + written(func, args, kwargs, tensors, made)
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        shapes = [list(x.shape) for x in tensors[:3]]
        trace.calls.append(Call(trace.graph, "extern", name, n_bytes, count_flops(func, args, kwargs, out),
                                dtype, shapes))  # fmt: skip
        return out


def size(x):
    """Bytes of a tensor's elements; those of an expanded one once."""
    elements = math.prod(n for n, stride in zip(x.shape, x.stride()) if stride)
    return elements * x.element_size()


def written(func, args, kwargs, tensors, made):
    """Bytes that an operation writes: of new tensors, and of those that it changes."""
    if func.overloadpacket == torch.ops.aten._fused_adamw_:  # parameters and two moments, not the gradients
        return sum(map(size, tree_leaves((args[0], args[2], args[3]))))
    read = {x.data_ptr() for x in tensors}
    total = sum(size(x) for x in made if x.data_ptr() not in read)
    is_out = "out" in kwargs or func.name().endswith("out")  # the memory of the result, which made has
    for x, argument in zip(args, func._schema.arguments):
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed and isinstance(x, torch.Tensor) and not is_out:
            total += size(x)
    return total


def count_flops(func, args, kwargs, out):
    """FLOPs of products, convolutions and attention, 0 of the rest; of causal attention half the square."""
    packet = func.overloadpacket
    if packet == torch.ops.aten._grouped_mm:  # the rows of all groups, or of a weight's gradient the sum
        return 2 * math.prod(args[0].shape[-2:]) * args[1].shape[-1]
    if packet not in flop_registry:
        return 0
    shape_kwargs = {key: value for key, value in kwargs.items() if key != "out"}
    flops = flop_registry[packet](*args, **shape_kwargs, out_val=out)
    for argument, value in zip(func._schema.arguments, args):
        if argument.name == "is_causal" and value is True:
            return flops / 2
    return flops / 2 if kwargs.get("is_causal") else flops


def count_elements(dep):
    """How many elements of a buffer an index expression of the scheduler reads or writes, each once."""
    variables = dep.index.free_symbols
    indirect = any(variable not in dep.ranges for variable in variables)  # as of an embedding
    return math.prod(int(n) for variable, n in dep.ranges.items() if indirect or variable in variables)


def kernel_bytes(kernel, schedule):
    """(bytes that a Triton kernel of Inductor reads and writes, shapes of a template's arguments)."""
    from torch._inductor.dependencies import MemoryDep
    from torch._inductor.scheduler import BaseSchedulerNode
    from torch._inductor.utils import get_dtype_size
    from torch._inductor.virtualized import V

    def buffer(name):
        return int(V.graph.get_numel(name)), get_dtype_size(V.graph.get_dtype(name))

    removed = set(V.graph.removed_buffers) | set(kernel.removed_buffers)
    nodes = [part for node in schedule if isinstance(node, BaseSchedulerNode) for part in node.get_nodes()]
    if not nodes or "Template" in type(kernel).__name__:  # flex_attention: its arguments
        names = {*kernel.args.input_buffers, *kernel.args.output_buffers} - removed
        shapes = [[int(n) for n in V.graph.try_get_buffer(name).get_size()] for name in names]
        return sum(math.prod(buffer(name)) for name in names), shapes
    made = {name for node in nodes for name in node.get_buffer_names()}  # they stay in registers
    elements = collections.defaultdict(dict)  # (buffer, way) -> {index expression: elements}
    for node in nodes:
        for way, deps in (("read", node.read_writes.reads), ("write", node.read_writes.writes)):
            for dep in deps:
                if not isinstance(dep, MemoryDep) or dep.name in removed:  # others only order the kernels
                    continue
                if way == "write" or dep.name not in made:
                    elements[dep.name, way][str(dep.index)] = count_elements(dep)
    total = 0
    for (name, _), found in elements.items():
        numel, itemsize = buffer(name)
        total += min(sum(found.values()), numel) * itemsize
    return total, []


# ==========================================================================
# What needs more of a GPU than the library gives


def install_driver(shared, sms):
    """Triton's driver, without the C extension that would look for a GPU."""
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    class Utils:
        def get_device_properties(self, device):
            return {"max_shared_mem": shared, "multiprocessor_count": sms, "max_num_regs": 65_536,
                    "warpSize": 32, "sm_clock_rate": 1_700_000, "mem_clock_rate": 2_600_000,
                    "mem_bus_width": 5120}  # fmt: skip

        def load_binary(self, name, kernel, shared, device):
            return 1, 1, 32, 0, 1024

    class Driver(CudaDriver):
        def __init__(self):
            self.get_device_capability = torch.cuda.get_device_capability
            self.get_current_stream = lambda index: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda index: None
            self.utils = Utils()
            self.launcher_cls = lambda *args, **kwargs: lambda *args, **kwargs: None

    triton.runtime.driver.set_active(Driver())


def install():
    """Notes Triton's kernels instead of launching them, and names the graphs that run. torch 2.11 to 2.13."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codegen.triton import TritonScheduling
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.output_code import CompiledFxGraph

    class Kernel:
        def __init__(self, name):
            self.name = name

        def run(self, *args, **kwargs):
            n_bytes, shapes = trace.kernels[self.name]
            trace.calls.append(Call(trace.graph, "triton", self.name, n_bytes, shapes=shapes))

    def note_source(self, name, source, device_str="cuda"):
        trace.sources[name] = source
        return Kernel(name)

    define = TritonScheduling.define_kernel

    def define_kernel(self, source, schedule, kernel):
        name = define(self, source, schedule, kernel)
        if name not in trace.kernels:  # a kernel with the same source is the same
            trace.kernels[name] = kernel_bytes(kernel, schedule)
        return name

    call = CompiledFxGraph.__call__

    def called(self, inputs):
        kind = "backward" if self.fx_kwargs.get("is_backward") else "forward"
        trace.graphs[id(self)] = self, kind
        trace.graph = kind
        with Recorder():
            out = call(self, inputs)
        trace.graph = "update"
        return out

    numbers = iter(range(10**9))  # over all graphs, so that a name is one kernel
    PythonWrapperCodegen.next_kernel_suffix = lambda self: str(next(numbers))
    AsyncCompile.triton = note_source
    TritonScheduling.define_kernel = define_kernel
    CompiledFxGraph.__call__ = called
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    install_operations()
    install_launches()


def install_operations():
    """cuDNN plans an operation by asking the driver: here its outputs have the right shapes, and no more."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    def by_shape(op):
        def run(*args, **kwargs):
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake_args, fake_kwargs = tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
                out = op(*fake_args, **fake_kwargs)
            return tree_map_only(FakeTensor, real, out)

        return run

    def real(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

    warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
    for name in ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward",
                 "cudnn_convolution", "convolution_backward"):  # fmt: skip
        library.impl(f"aten::{name}", "CUDA", by_shape(getattr(torch.ops.aten, name).default))

    def all_nonzero(x):  # its size would be read back from the GPU
        return torch.zeros(x.numel(), x.dim(), dtype=torch.int64, device=x.device)

    library.impl("aten::nonzero", "CUDA", all_nonzero)


def install_launches():
    """Notes Triton kernels that aren't Inductor's; of configurations that would be timed the first counts."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        tensors = {x.data_ptr(): x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)}
        name = self.fn.__name__
        trace.calls.append(Call("own", "triton", name, sum(map(size, tensors.values()))))
        trace.own[name] = launch(self, *args, grid=grid, warmup=True, **kwargs)
        return trace.own[name]

    JITFunction.run = run
    Autotuner._bench = lambda self, *args, **kwargs: 0.0
    Autotuner.check_disk_cache = lambda self, key, configs, choose: choose()  # a real GPU's choice stays


# ==========================================================================
# Kernels to machine code


def compile_kernels(limit):
    """{kernel: [registers, words spilled, shared memory, "" or why it can't run] of each configuration}.

    Of them Inductor times all and takes the fastest.
    """
    from torch._inductor.async_compile import _load_triton_kernel_from_source

    torch._inductor.config.use_static_cuda_launcher = False
    found = {name: [resources(binary, limit)] for name, binary in trace.own.items()}
    for name in sorted({call.name for call in trace.calls if call.name in trace.sources}):
        kernel = _load_triton_kernel_from_source(name, trace.sources[name])
        found[name] = []
        for config in list(kernel.configs):
            try:
                binary = kernel._precompile_config(config).kernel
            except Exception as error:
                found[name].append([0, 0, 0, f"{type(error).__name__}: {str(error)[:200]}"])
                continue
            found[name].append(resources(binary, limit))
    return found


def resources(binary, limit):
    """[registers of a thread, words of 4 bytes that it spills, shared memory, "" or why it can't run]."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def most(what):
        return max(map(int, re.findall(rf"{what}:(\d+)", said)), default=0)

    registers = most("REG")
    shared = binary.metadata.shared
    too_large = shared > limit or registers * 32 * binary.metadata.num_warps > 65_536
    return [registers, (most("STACK") + most("LOCAL")) // 4, shared, "is too large" if too_large else ""]


# ==========================================================================
# A training step


def recorded(function):
    """The function, whose operations are noted."""

    def call(*args, **kwargs):
        with Recorder():
            return function(*args, **kwargs)

    return call


def work(job):
    """Traces a script's train_step and writes what was found to job["out"]."""
    gpu = report.GPUS[job["gpu"]]
    install_driver(gpu.shared, gpu.sms)
    install()
    script = step.load(job["script"])
    config = step.make_config(script)
    source = Path(job["script"]).read_bytes()
    record = {
        "script": Path(job["script"]).name, "hash": hashlib.sha256(source).hexdigest()[:16],
        "gpu": job["gpu"], "torch": torch.__version__, "tokens": config.block_size,
        "batch_tokens": config.batch_tokens,
    }  # fmt: skip
    record["chosen_rows"], batch_rows = step.find_rows(script, config)
    record["rows"] = job["rows"] or record["chosen_rows"]
    torch.cuda.empty_cache()
    try:
        record |= trace_step(script, config, record["rows"], batch_rows)
    except Exception as error:  # whatever a script that is being edited does
        said = [line for line in str(error).splitlines() if line.strip()] or [""]
        record["error"] = f"{type(error).__name__}: {said[0][:200]}"
    else:
        record |= report.estimate(trace.calls, record, gpu, getattr(config, "window", config.block_size))
        record |= report.kernels(compile_kernels(gpu.shared))
    Path(job["out"]).write_text(json.dumps(record))
    os._exit(0)  # to take the graphs apart would take long


def trace_step(script, config, rows, batch_rows):
    """Figures of the script's second step, with up to two micro-batches; its calls go to trace.calls."""
    trainer = step.Trainer(script, config)
    trainer.optimizer.step = recorded(trainer.optimizer.step)
    torch.nn.utils.clip_grad_norm_ = recorded(torch.nn.utils.clip_grad_norm_)
    micro_batches = min(2, batch_rows // rows)  # in the second there are gradients, too
    shape = (micro_batches * rows, config.block_size + 1)
    batch = torch.zeros(shape, dtype=torch.int64, device=trainer.device)
    with contextlib.redirect_stdout(None):
        trainer.step(0, batch, rows)  # compiles, and makes AdamW's moments
    trace.calls.clear()
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    trainer.step(1, batch, rows)
    counters = torch._dynamo.utils.counters
    return {
        "micro_batches": micro_batches, "peak": torch.cuda.max_memory_allocated(), "resident": resident,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "graphs": dict(collections.Counter(kind for _, kind in trace.graphs.values())),
        "breaks": {str(why)[:300]: n for why, n in counters["graph_break"].items()},
    }  # fmt: skip
