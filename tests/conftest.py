"""Shared fixtures. Everything runs on the CPU, without a network, on shapes of a few thousand parameters."""
import os
import sys
from pathlib import Path

import pytest

# Shapes are tiny, and pytest -n 2 has a process for each core, so a second thread only gets in the way.
# Set before torch is loaded; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import fineweb  # noqa: E402

WORDS = "the of and to in a is that for it as was with be by on not he this are or his from at which".split()


def text(n_words, seed):
    """Sentences out of a few words, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (n_words,), generator=generator)]
    return " ".join(words).replace(" which ", ".\n\nWhich ")


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """The offline dataset, built once."""
    folder = tmp_path_factory.mktemp("data") / "sample"
    fineweb.write_sample(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(script, *options) -> (exit status, what was printed) of its main() in a temporary folder."""
    monkeypatch.chdir(tmp_path)

    def run(script, *options):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, options)])
        try:
            script.main()
            status = 0
        except SystemExit as error:
            print(error.code)
            status = int(bool(error.code))
        while fineweb.locks:  # which the end of the process would do
            fineweb.locks.popitem()[1].release()
        return status, capsys.readouterr().out

    return run
