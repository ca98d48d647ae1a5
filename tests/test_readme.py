"""The README's commands are what they say."""
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import fineweb

README = (ROOT / "README.md").read_text()
EVIDENCE = (ROOT / "results/README.md").read_text()


def commands_in(text):
    """The commands in a Markdown file: of its blocks of shell, then those within sentences."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    commands = [line.split("#")[0].strip() for line in lines if line.strip()]
    return commands + re.findall(r"`((?:python|torchrun) [^`]*)`", text)


CLONE, *COMMANDS = commands_in(README)


def to_parse():
    """The commands of both files whose options can be checked, each once."""
    found = set()
    for command in [*COMMANDS, *commands_in(EVIDENCE)]:
        command = command.split("&&")[-1].strip()
        words = command.split()
        # a shell's loop around commands, a copy of a script, an install, and what ends at once
        if not words or words[0] in ("for", "do", "done", "cp", "pip") or "--help" in words:
            continue
        if words == ["python", "-m", "tools.torture"]:  # its file in results/ has the commands
            continue
        command = re.sub(r"^OMP_NUM_THREADS=1 ", "", command)
        command = command.replace("train_$name", "train_gpt2").replace("$seed", "1")
        command = command.replace("train_mine.py", "train_gpt2.py")
        found.add(command.replace("tools.bench NAME", "tools.bench gpt2"))  # one of those it knows
    return sorted(found)


def test_the_first_two_commands():
    assert CLONE.startswith("git clone ")
    assert COMMANDS[0] == "pip install -r requirements.txt && python train_gpt2.py --tiny"
    assert COMMANDS[1] == "pip install -r requirements.txt && python -m pytest -n 2"
    ci = (ROOT / ".ci/run").read_text()
    assert COMMANDS[0] in ci and COMMANDS[1] in ci


class Reached(Exception):
    """The command line was understood."""


@pytest.mark.parametrize("command", to_parse())
def test_commands_parse(command, monkeypatch, tmp_path):
    """Each names a file that is here and options that it has: run up to where the work would begin."""
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


def test_there_are_commands_of_both_files():
    commands = to_parse()
    for command in (
        "python train_gpt2.py --resume",
        "python -m tools.compare results/demo --out results/demo/report",
        "python -m tools.collection results/demo log/*-[123]",
        "python train_rwkv.py --tiny --recipe shared --seed 1 --run_name rwkv-shared-1",
    ):
        assert command in commands
    assert len(commands) > 40


def test_no_placeholder_is_left():
    assert not re.search(r"\b(TODO|FIXME|XXX|[A-Z]+_(OUTPUT|LOSS|CLOZE|FIGURES|VERSIONS))\b", README)


def relative_links(path):
    """The files that a Markdown file links to or shows, but for other sites and headings of its own."""
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    return [path.parent / target for target in targets if "://" not in target]


REPORTS = [f"results/{study}/report/leaderboard.md" for study in ("architectures", "demo")]


@pytest.mark.parametrize("name", ["README.md", "results/README.md", *REPORTS])
def test_links_and_pictures_are_there(name):
    links = relative_links(ROOT / name)
    assert links or name == "results/README.md"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tracked = listed.stdout.splitlines()
    for link in links:
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


def test_a_part_of_the_data_has_its_command():
    """What fineweb.py prints after --shards 10 is what the README says."""
    shards = [{"name": "fineweb_val_000000.bin", "tokens": 10**8}]
    shards += [{"name": f"fineweb_train_{k:06d}.bin", "tokens": 10**8} for k in range(1, 11)]
    command = fineweb.next_command(Path("data/fineweb10B"), shards, False)
    options = "--max_steps 1907 --warmup_steps 72"
    assert options in command and f"`python train_gpt2.py {options}`" in README
