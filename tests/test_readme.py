"""The README's commands are what they say."""
import re
import shlex
import sys

import pytest
from conftest import ROOT

import fineweb
from tools import table

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
COMMANDS += [command for command in re.findall(r"`((?:python|torchrun) [^`]*)`", README)]


def test_the_first_two_commands():
    assert COMMANDS[0] == "pip install -r requirements.txt && python train_gpt2.py --tiny"
    assert COMMANDS[1] == "pip install -r requirements.txt && python -m pytest"
    ci = (ROOT / ".ci/run").read_text()
    assert COMMANDS[0] in ci and COMMANDS[1] in ci


class Reached(Exception):
    """The command line was understood."""


@pytest.mark.parametrize("command", sorted({c.split("&&")[-1].strip() for c in COMMANDS if not {"pip", "--help"} & set(c.split("&&")[-1].split())}))
def test_commands_parse(command, monkeypatch, tmp_path):
    """Each command names a file that is here and options that it has: run up to where the work would begin."""
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py") or word.startswith(("tools.", "pytest")))
    monkeypatch.chdir(tmp_path)
    if script == "pytest":
        return
    path = ROOT / (script if script.endswith(".py") else script.replace(".", "/") + ".py")
    assert path.exists(), script
    module = pytest.importorskip(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."))
    monkeypatch.setattr(sys, "argv", words[words.index(script) :])

    def parse(parser):
        parser.error = lambda message: pytest.fail(message)
        _, unknown = parser.parse_known_args()
        assert not unknown
        raise Reached

    monkeypatch.setattr(fineweb, "parse_strictly", parse)
    if hasattr(module, "parse_strictly"):
        monkeypatch.setattr(module, "parse_strictly", parse)
    with pytest.raises(Reached):
        module.main()


def test_no_placeholder_is_left():
    assert not re.search(r"\b(TODO|FIXME|XXX|[A-Z]+_(OUTPUT|LOSS|CLOZE|FIGURES|VERSIONS))\b", README)


@pytest.mark.parametrize("name", table.TABLES)
def test_the_tables_are_what_the_tool_makes(name):
    first, last = table.marks(name)
    assert first + table.TABLES[name]() + last in README, "run `python -m tools.table --write`"
