"""Whatever stands in a checkpoint or on the command line: at worst one line, and nothing is lost."""
import dataclasses
import io
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fineweb
import train_gpt2

allowed = [HealthCheck.function_scoped_fixture]
quickly = settings(max_examples=60, deadline=None, suppress_health_check=allowed)


@pytest.fixture(scope="module")
def checkpoint():
    """The bytes of a small checkpoint, and what it holds."""
    torch.manual_seed(0)
    saved = {"script": "train_gpt2", "step": 3, "config": {"n_layer": 1}}
    saved["model"] = {"weight": torch.randn(40, 20)}
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
        newest, older = Path(folder) / "step_00000004.pt", Path(folder) / "step_00000003.pt"
        newest.write_bytes(damaged)
        older.write_bytes(content)
        # damaged, it is left out; or the bit was in a gap between the parts of the file
        loaded = fineweb.load_checkpoint([newest, older], "train_gpt2", {"n_layer": 12})
        assert torch.equal(loaded["model"].pop("weight"), saved["model"]["weight"])
        assert loaded == {**saved, "model": {}}
        assert newest.read_bytes() == damaged and older.read_bytes() == content


types = {field.name: field.type for field in dataclasses.fields(train_gpt2.Config)}
names = [name for name, type in types.items() if type is not bool]
texts = st.text(max_size=8) | st.integers().map(str) | st.floats().map(str)
texts |= st.sampled_from(["0", "-1", "1", "1e999", "nan", "2" * 40, "../x", "cpu", "float32", ""])


@quickly
@given(chosen=st.dictionaries(st.sampled_from(names), texts, max_size=4))
def test_a_command_line_is_a_config_or_an_error(chosen):
    words = ["train_gpt2.py", "--tiny", *[f"--{name}={text}" for name, text in chosen.items()]]
    with mock.patch.object(sys, "argv", words):
        try:
            config = train_gpt2.parse(train_gpt2.Config())
        except SystemExit as error:
            assert error.code == 2 or "\n" not in error.code.rstrip()
        else:
            assert config.tiny and not config.resume
            for name, text in chosen.items():
                value = getattr(config, name)
                assert str(value) == text or value == types[name](text)
