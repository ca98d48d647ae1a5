"""
Keeps the text that the seven scripts share the same, to the letter.

    python -m tools.sync            # copy what is shared from its original
                                    # into the other scripts
    python -m tools.sync --check    # only say where they differ

There are two kinds of shared text. Sections are in every script, and
train_gpt2.py has the original: they start at `import dataclasses` or at a line
with "the same in every script", and end at a line with "this architecture's"
or where the next one starts. Definitions are in some scripts: a comment right
above a class or function says "# The same in LLaMA, Mistral and MTA.", and the
first one named has the original.

A script of your own, such as train_mine.py, is left as it is, so that you can
edit all of it. To keep it in step with the seven, add it to SCRIPTS.
"""
import difflib
import re
from pathlib import Path

import tyro

from fineweb import fail, write_atomic

ROOT = Path(__file__).parent.parent
ORIGINAL = ROOT / "train_gpt2.py"
SCRIPTS = {
    "GPT-2": "train_gpt2.py", "LLaMA": "train_llama.py", "Mistral": "train_mistral.py",
    "Gemma": "train_gemma.py", "DeepSeek": "train_deepseek.py", "RWKV-7": "train_rwkv.py",
    "MTA": "train_mta.py",
}  # fmt: skip
DEFINITION = re.compile(
    r"^# The same in (?P<scripts>.*)\.\n"  # the comment
    r"(?:class|def) (?P<name>\w+)"
    r"(?:.*\n(?:(?:    .*)?\n)*)",  # all that is indented below, and blank lines
    re.MULTILINE,
)


def siblings():
    """The training scripts in SCRIPTS that are there, but the original, in order of name."""
    paths = [ROOT / name for name in SCRIPTS.values()]
    return sorted(path for path in paths if path != ORIGINAL and path.exists())


def others():
    """Training scripts that a user has added, in order of name."""
    return sorted(path for path in ROOT.glob("train_*.py") if path.name not in SCRIPTS.values())


def sections(text):
    """A script as a list of (first line of a shared section or None, its lines)."""
    parts = [(None, [])]
    for line in text.splitlines(keepends=True):
        if "the same in every script" in line or line == "import dataclasses\n":
            parts.append((line.rstrip("\n"), []))
        elif "this architecture's" in line and parts[-1][0] is not None:
            parts.append((None, []))
        parts[-1][1].append(line)
    return parts


def definitions(path):
    """{name of a class or function: (file names of the scripts that have it, its text with the comment)}."""
    found = {}
    for match in DEFINITION.finditer(path.read_text()):
        names = re.split(r", | and ", match["scripts"])
        files = [SCRIPTS.get(name, name) for name in names]
        found[match["name"]] = (files, match.group().rstrip("\n") + "\n")
    return found


def synced(path):
    """A script's text with all that it shares as the original has it.

    Raises SystemExit if a banner or a comment is missing, so that there is nothing to go by.
    """
    ours = {name: "".join(lines) for name, lines in sections(ORIGINAL.read_text()) if name}
    parts = sections(path.read_text())
    for name in ours.keys() ^ {name for name, _ in parts if name}:
        fail(f"{path.name} or {ORIGINAL.name} lacks the line {name!r}: put it back")
    text = "".join(ours.get(name, "".join(lines)) for name, lines in parts)

    mine = definitions(path)
    for other in (ORIGINAL, *siblings()):
        for name, (scripts, whole) in definitions(other).items():
            if path.name in scripts and name not in mine:
                fail(f"{path.name} lacks {name}, which {other.name} says it has, or the comment above it")
            if other.name not in scripts:
                fail(f"{other.name} has {name}, but the comment above it doesn't say so")
            if name in mine and other.name == mine[name][0][0]:
                text = text.replace(mine[name][1], whole)
    return text


def main(check: bool = False):  # change nothing
    for path in others():
        print(f"{path.name}: left as it is, since it is not one of the {len(SCRIPTS)} in tools/sync.py")
    texts = {path: synced(path) for path in (ORIGINAL, *siblings())}
    changed = [path for path, text in texts.items() if path.read_text() != text]
    for path in changed:
        before = path.read_text().splitlines(keepends=True)
        after = texts[path].splitlines(keepends=True)
        print("".join(difflib.unified_diff(before, after, path.name, "as the original has it", n=1)))
        if not check:
            write_atomic(path, lambda file: file.write(texts[path].encode()))
    if check and changed:
        fail(f"{len(changed)} scripts differ in text that they share: run `python -m tools.sync`")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
