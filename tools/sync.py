"""
Keeps the text that all training scripts share the same, to the letter; train_gpt2.py is the original.

    python -m tools.sync            # copy train_gpt2.py's shared sections into the other scripts
    python -m tools.sync --check    # only say where they differ (exit status 1)

A section starts at `import argparse` or at a line with "the same in every script", and ends at a line with "this
architecture's" or where the next one starts. The one exception is what OWN names.
"""
import argparse
import difflib
from pathlib import Path

import fineweb

ROOT = Path(__file__).parent.parent
ORIGINAL = ROOT / "train_gpt2.py"
OWN = {"train_rwkv.py": ["# Loss: the same in every script"]}  # RWKV-7's L2Wrap changes the logits' gradient


def siblings():
    return sorted(path for path in ROOT.glob("train_*.py") if path != ORIGINAL)


def sections(text):
    """The script as a list of (first line of a shared section or None, its lines)."""
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


def differences(path):
    """The lines of a diff between the original's shared sections and a sibling's."""
    ours, theirs, lines = shared(ORIGINAL), shared(path), []
    for name in ours:
        if name not in OWN.get(path.name, []):
            there = theirs.get(name, "").splitlines(keepends=True)
            lines += difflib.unified_diff(ours[name].splitlines(keepends=True), there, ORIGINAL.name, path.name, n=1)
    return lines + [f"{path.name} has a shared section that the original lacks: {name}\n" for name in theirs.keys() - ours.keys()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = fineweb.parse_strictly(parser)
    ours, wrong = shared(ORIGINAL), 0
    for path in siblings():
        if not differences(path):
            continue
        missing = [name for name in ours if name not in shared(path) and name not in OWN.get(path.name, [])]
        if args.check or missing:
            print("".join(differences(path)))
            wrong += 1
            continue
        parts = sections(path.read_text())
        path.write_text("".join(ours.get(name, "".join(lines)) for name, lines in parts))
        print(f"{path.name}: copied")
    if wrong:
        fineweb.fail(f"{wrong} scripts differ from {ORIGINAL.name} in sections that they share: run `python -m tools.sync`, "
                     "or put back the banners that are missing")


if __name__ == "__main__":
    main()
