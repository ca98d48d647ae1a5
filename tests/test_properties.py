"""Whatever stands in a checkpoint or on the command line: at worst one line, and nothing is lost."""
import dataclasses
import io
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fineweb
import train_gpt2

quickly = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

@pytest.fixture(scope="module")
def checkpoint():
    """The bytes of a small checkpoint, and what it holds."""
    torch.manual_seed(0)
    saved = {
        "format": 3, "script": "train_gpt2", "script_hash": "x", "step": 3, "config": {"n_layer": 1},
        "data": {}, "model": {"weight": torch.randn(40, 20)}, "optimizer": {}, "scaler": {}, "rng": torch.get_rng_state(),
    }  # fmt: skip
    file = io.BytesIO()
    torch.save(saved, file)
    return file.getvalue(), saved


@quickly
@given(place=st.floats(0, 1), bit=st.integers(0, 7), length=st.floats(0, 1.2))
def test_a_damaged_checkpoint_is_noticed_or_does_not_matter(checkpoint, place, bit, length):
    content, saved = checkpoint
    damaged = bytearray(content)
    damaged[int(place * (len(content) - 1))] ^= 1 << bit
    damaged = bytes(damaged)[: int(length * len(content))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step_000003.pt"
        path.write_bytes(damaged)
        try:
            loaded = fineweb.load_whole(path, __file__, None)
        except ValueError as reason:
            assert "\n" not in str(reason)
        else:  # the bit was in a gap between the parts of the file
            assert torch.equal(loaded["model"]["weight"], saved["model"]["weight"])
            assert loaded["step"] == 3 and loaded["config"] == saved["config"]
        assert path.read_bytes() == damaged


fields = {field.name: field for field in dataclasses.fields(train_gpt2.Config)}
texts = st.text(max_size=8) | st.integers().map(str) | st.floats().map(str)
texts |= st.sampled_from(["0", "-1", "1", "1e999", "nan", "2" * 40, "../x", "cpu", "float32", ""])
options = st.dictionaries(st.sampled_from(sorted(fields)), texts, max_size=4)


@quickly
@given(chosen=options)
def test_a_command_line_is_a_config_or_one_line(chosen):
    before = sys.argv
    sys.argv = ["train_gpt2.py", "--tiny", *[f"--{name}={text}" for name, text in chosen.items()]]
    try:
        config, given_options, _ = train_gpt2.parse_command_line()
        folder = fineweb.run_folder(config.run_name or "x")
        fineweb.check_run(config, 1)
    except SystemExit as error:
        assert isinstance(error.code, str) and error.code and "\n" not in error.code.rstrip()
    else:
        assert given_options.keys() == chosen.keys()
        for name in chosen:
            assert type(getattr(config, name)) is fields[name].type
        assert folder.resolve().parent == Path("log").resolve()
    finally:
        sys.argv = before
