"""
A GPU that isn't there: a library in front of CUDA's says that there is one, and
torch compiles a script's training step for it and counts. Linux, gcc and a CUDA
build of torch are needed, a GPU and a driver are not.
"""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fineweb import fail, one_line
from tools.common import ROOT
from tools.gpu import report

INSTALL = ("python3 -m venv cuda && cuda/bin/pip install torch==2.13.0 numpy setuptools; "
           "cuda/bin/pip install -r requirements.txt")  # fmt: skip
SOURCE = Path(__file__).parent / "library.c"
# of CUDA's functions that torch needs, those that say the same without a GPU
REAL = set("""
    cudaGetErrorName cudaGetErrorString cudaRuntimeGetVersion cublasLtGetVersion cudnnGetVersion
    cudnnGetErrorString cudnnGetLastErrorString cudnnGetProperty cudnnGetCudartVersion
""".split())


def needed(libraries):
    """CUDA's functions that torch's libraries expect of others."""
    names = set()
    for library in libraries:
        command = ["nm", "-D", "--undefined-only", library]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names.update(line.split()[-1].split("@")[0] for line in said.splitlines())
    starts = re.compile(r"(cuda|cu|cublas|cudnn|cusolver|cusparse|curand)[A-Z]|(cublas|cusolver|cusparse)Lt")
    return {name for name in names if starts.match(name) and "cuFile" not in name}


def build():
    """The library for this torch, compiled once. Raises SystemExit if that isn't possible."""
    if torch.version.cuda is None or sys.platform != "linux":
        fail("the fake GPU needs Linux and a CUDA build of torch, not this one. In an environment of its own "
             f"(5 GB): {INSTALL}")  # fmt: skip
    for program in ("gcc", "nm"):
        if not shutil.which(program):
            fail(f"the fake GPU needs {program}: install gcc and binutils")
    source = SOURCE.read_text()
    site = Path(torch.__file__).parent.parent
    key = hashlib.sha256((source + torch.__version__ + str(site)).encode()).hexdigest()[:12]
    path = Path.home() / ".cache/nanotitan" / key / "libcuda.so.1"  # by this name torch finds the driver, too
    if path.exists():
        return path
    names = ("torch_cuda", "torch_cuda_linalg", "c10_cuda", "torch_python", "caffe2_nvrtc")
    libraries = [file for name in names for file in site.glob(f"torch/lib/lib{name}.so")]
    here = set(re.findall(r"\b(?:__)?cu\w+", source))
    rest = needed(libraries) - here - REAL | {"cuInit"}
    folders = [file.parent for file in site.glob("nvidia/*/include/cuda_runtime_api.h")]
    folders.append(site / "triton/backends/nvidia/include")  # has crt/, which NVIDIA's package lacks
    with one_line(f"{path.parent} can't be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # apart, since the headers would contradict these prototypes
        others = Path(folder) / "others.c"
        stubs = [f"int {name}(void) {{ return 0; }}\n" for name in sorted(rest)]
        others.write_text("".join(["int __cudaInitModule(void **h) { return 1; }\n", *stubs]))
        made = path.with_suffix(f".{os.getpid()}")
        headers = [f"-I{folder}" for folder in folders]
        command = ["gcc", "-shared", "-fPIC", "-O1", "-w", *headers, SOURCE, others, "-o", made,
                   "-Wl,-soname,libcuda.so.1", "-ldl"]  # fmt: skip
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            fail(f"gcc can't compile {SOURCE.name}: {next(iter(done.stderr.splitlines()), '')}")
        os.replace(made, path)
    return path


def trace(script, gpu, rows=0):
    """The record of a script's training step on a fake GPU; 1 to 10 minutes. gpu: a name in report.GPUS."""
    kind = report.GPUS[gpu]
    library = build()
    environment = os.environ | {
        "LD_PRELOAD": str(library), "FAKE_GPU_NAME": kind.name, "FAKE_GPU_GB": str(kind.gib),
        "FAKE_GPU_SMS": str(kind.sms), "FAKE_GPU_SM": str(kind.capability),
        "FAKE_GPU_SHARED": str(kind.shared), "CUDA_VISIBLE_DEVICES": "0",
        "TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        job = {"script": str(Path(script).resolve()), "gpu": gpu, "rows": rows, "out": str(out)}
        command = [sys.executable, "-m", "tools.gpu", "trace", json.dumps(job)]
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if not out.exists():
            fail(f"{script} could not be traced (exit status {status}): see above")
        return json.loads(out.read_text())
