"""
Keeps the text that the seven scripts share the same, to the letter.

    python -m tools.sync            # copy what is shared from its original
                                    # into the other scripts
    python -m tools.sync --check    # only say where they differ

There are two kinds of shared text. Sections are in every script, and
train_gpt2.py has the original: they start at `import argparse` or at a line
with "the same in every script", and end at a line with "this architecture's"
or where the next one starts. Definitions are in some scripts: a comment right
above a class or function says "# The same in LLaMA, Mistral and MTA.", and the
first one named has the original.

A script of your own, such as train_mine.py, is left as it is, so that you can
edit all of it. To keep it in step with the seven, add it to SCRIPTS.
"""
import argparse
import difflib
import re
from pathlib import Path

import fineweb

ROOT = Path(__file__).parent.parent
ORIGINAL = ROOT / "train_gpt2.py"
# RWKV-7's L2Wrap changes the gradient of the logits
OWN = {"train_rwkv.py": ["# Loss: the same in every script"]}
SCRIPTS = {
    "GPT-2": "train_gpt2.py", "LLaMA": "train_llama.py", "Mistral": "train_mistral.py", "Gemma": "train_gemma.py",
    "DeepSeek": "train_deepseek.py", "RWKV-7": "train_rwkv.py", "MTA": "train_mta.py",
}  # fmt: skip
FAMILY = re.compile(
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


# ==========================================================================
# Sections, the same in every script


def sections(text):
    """A script as a list of (first line of a shared section or None, its lines)."""
    parts = [(None, [])]
    for line in text.splitlines(keepends=True):
        if "the same in every script" in line or line == "import argparse\n":
            parts.append((line.rstrip("\n"), []))
        elif "this architecture's" in line and parts[-1][0] is not None:
            parts.append((None, []))
        parts[-1][1].append(line)
    return parts


def shared(path):
    """{first line: text} of a script's shared sections."""
    return {name: "".join(lines) for name, lines in sections(path.read_text()) if name is not None}


def diff(ours, theirs, from_name, to_name):
    """The lines of a unified diff between two texts."""
    ours = ours.splitlines(keepends=True)
    theirs = theirs.splitlines(keepends=True)
    return list(difflib.unified_diff(ours, theirs, from_name, to_name, n=1))


def section_differences(path):
    """The lines of a diff between the original's sections and a sibling's."""
    ours = shared(ORIGINAL)
    theirs = shared(path)
    lines = []
    for name in ours:
        if name not in OWN.get(path.name, []):
            lines += diff(ours[name], theirs.get(name, ""), ORIGINAL.name, path.name)
    for name in theirs.keys() - ours.keys():
        lines.append(f"{path.name} has a shared section that {ORIGINAL.name} lacks: {name}\n")
    return lines


def copy_sections(path):
    """Puts the original's sections into a sibling. Returns False if a banner is missing there."""
    ours = shared(ORIGINAL)
    for name in ours:
        if name not in shared(path) and name not in OWN.get(path.name, []):
            return False
    text = ""
    for name, lines in sections(path.read_text()):
        text += ours.get(name, "".join(lines))
    path.write_text(text)
    return True


# ==========================================================================
# Definitions, the same in some scripts


def named_scripts(words):
    """The scripts' paths that a comment names: "LLaMA, Mistral and MTA" -> [train_llama.py, …]."""
    return [ROOT / SCRIPTS[name] for name in re.split(r", | and ", words)]


def families(path):
    """{name of a class or function: (scripts that have the same one, its text with the comment)}."""
    found = {}
    for match in FAMILY.finditer(path.read_text()):
        text = match.group().rstrip("\n") + "\n"
        found[match["name"]] = (named_scripts(match["scripts"]), text)
    return found


def family_differences(path):
    """The lines of a diff between a script's shared definitions and their originals."""
    lines = []
    for name, (scripts, text) in families(path).items():
        original, *_ = scripts
        if path not in scripts:
            lines.append(f"{path.name} has {name}, whose comment does not name it\n")
        elif not original.exists() or name not in families(original):
            lines.append(f"{path.name} has {name} from {original.name}, which lacks it\n")
        else:
            lines += diff(families(original)[name][1], text, original.name, path.name)
        for other in scripts:
            if other.exists() and name not in families(other):
                lines.append(f"{other.name} lacks {name}, or its comment, by {path.name}\n")
    return lines


def copy_families(path):
    """Puts the originals' text of shared definitions into a script."""
    content = path.read_text()
    for name, (scripts, text) in families(path).items():
        original, *_ = scripts
        if original.exists() and name in families(original):
            content = content.replace(text, families(original)[name][1])
    path.write_text(content)


# ==========================================================================
# Command line


def differences(path):
    """The lines of a diff between a script and what it must share. Empty: nothing differs."""
    own = [] if path == ORIGINAL else section_differences(path)
    return own + family_differences(path)


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = fineweb.parse_strictly(parser)
    for path in others():
        print(f"{path.name}: left as it is, since it is not one of the {len(SCRIPTS)} in tools/sync.py")
    wrong = 0
    for path in siblings():
        if not differences(path):
            continue
        if not args.check and copy_sections(path):
            copy_families(path)
        if differences(path):
            print("".join(differences(path)))
            wrong += 1
        else:
            print(f"{path.name}: copied")
    if wrong:
        fineweb.fail(
            f"{wrong} scripts differ in text that they share: run `python -m tools.sync`, "
            "or put back the banners and comments that are missing"
        )


if __name__ == "__main__":
    main()
