"""The README's commands, links and diff are real."""
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import tyro
from conftest import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results/README.md").read_text()


def commands_in(text):
    """The commands in a Markdown file: of its blocks of shell, then those within sentences."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    commands = [re.split(r"\s+#", line)[0].strip() for line in lines if line.strip()]
    return commands + re.findall(r"`((?:python|torchrun) [^`]*)`", text)


CLONE, *COMMANDS = commands_in(README)


def to_parse():
    """The commands of both files that start a program of ours, each once."""
    found = set()
    for command in [*COMMANDS, *commands_in(RESULTS)]:
        command = command.split("&&")[-1].strip()
        if re.match(r"(python|torchrun|OMP_NUM_THREADS=1 python) ", command) and "pytest" not in command:
            found.add(command)
    return sorted(found)


def test_the_first_command_and_the_tests_are_what_ci_types():
    assert CLONE.startswith("git clone ")
    assert COMMANDS[0] == "pip install -r requirements.txt && python train_gpt2.py --tiny"
    ci = (ROOT / ".ci/run").read_text()
    tests = "pip install -r requirements.txt && python -m pytest -n 2"
    assert COMMANDS[0] in ci and tests in COMMANDS and tests in ci
    first_lines = "\n".join(README.splitlines()[:40])
    assert COMMANDS[0] in first_lines and len(README.splitlines()) <= 200


class Reached(Exception):
    """The command line was understood."""


@pytest.mark.parametrize("command", to_parse())
def test_commands_parse(command, monkeypatch, tmp_path):
    """Each names a program that is here and options that it has: run up to where the work would begin."""
    words = shlex.split(command)
    program = next(word for word in words if word.endswith(".py") or word.startswith("tools."))
    rest = words[words.index(program) + 1 :]
    program = "train_gpt2.py" if program == "train_mine.py" else program  # the reader's own
    module = program.removesuffix(".py")
    is_package = (ROOT / module.replace(".", "/")).is_dir()
    program = f"{module}.__main__" if is_package else module
    monkeypatch.delitem(sys.modules, program, raising=False)  # runpy warns of what is imported already
    parse = tyro.cli

    def understood(*args, **kwargs):
        parse(*args, **kwargs)
        raise Reached

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *rest])
    monkeypatch.setattr(tyro, "cli", understood)
    with pytest.raises((Reached, SystemExit)) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.type is Reached or ("--help" in rest and not ended.value.code)


def relative_links(path):
    """The files that a Markdown file links to or shows, but for other sites and headings of its own."""
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    return [path.parent / target for target in targets if "://" not in target]


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_links_and_pictures_are_there(name):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tracked = listed.stdout.splitlines()
    for link in relative_links(ROOT / name):
        assert link.exists(), link
        inside = link.resolve().relative_to(ROOT.resolve()).as_posix()
        # also for those who clone: an ignored file would be there for us alone
        assert not tracked or any(file == inside or file.startswith(inside + "/") for file in tracked), link


def test_the_diff_is_real():
    (shown,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    command = ["diff", "-U", "10000", "train_gpt2.py", "train_llama.py"]
    diff = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    whole = [line.rstrip() for line in diff.splitlines()]
    lines = shown.rstrip("\n").splitlines()
    assert len(lines) >= 12
    assert any(whole[i : i + len(lines)] == lines for i in range(len(whole)))
