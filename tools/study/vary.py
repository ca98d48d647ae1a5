"""
Variants of the scripts. Each is a patch: what it changes, and why one asks.

    python -m tools.vary --list          # what there is
    python -m tools.vary gpt2-rope       # write train_gpt2_rope.py
    python -m tools.vary gpt2-rope gpt2-rmsnorm    # both changes in one script
    python -m tools.vary --save gpt2-mine train_mine.py --what "GPT-2 with …"
        --question "Does … ?" --paper "…"    # your edited copy as a patch

What it writes is a whole script, which runs, resumes, is exported and compared
like any other. --force writes over what is there; --save then takes what isn't
given, as the question, from the patch before.

A patch, tools/study/variants/NAME.patch, is a unified diff of the code with a
few lines on top, from which the docstring is made:

    # what: the docstring's first lines
    # question: what the variant is to answer
    # paper: where it is from
    # parameters: what was done to keep their number
    # unequal: why it could not be kept within 1%, if so

A change is found by its text, and by as much of the three lines around it as is
there, so patches outlive edits of other parts.
"""
import dataclasses
import difflib
import itertools
import re
import textwrap
import types
from pathlib import Path

import torch
import tyro
import unidiff

import fineweb
from fineweb import fail
from tools.common import ROOT, parse

VARIANTS = Path(__file__).parent / "variants"
BUDGET = 124_475_904  # parameters of train_gpt2.py
FIELDS = ("what", "question", "paper", "parameters", "unequal")
END_OF_DOCSTRING = '\n"""\n'

# ==========================================================================
# Patches


@dataclasses.dataclass
class Change:
    """Lines to find in a script, those that take their place, and those around them."""

    before: list
    old: list
    new: list
    after: list


@dataclasses.dataclass
class Patch:
    """A variant's file: its base's file name, the fields of its header, its changes."""

    name: str
    base: str
    header: dict
    changes: list


def variants():
    """The names of all variants, in order."""
    return sorted(path.stem for path in VARIANTS.glob("*.patch"))


def read_patch(name):
    """The Patch of a variant. Raises SystemExit, with one line, if there is none or it is no patch."""
    path = VARIANTS / f"{name}.patch"
    if not path.exists():
        close = difflib.get_close_matches(name, variants(), n=1, cutoff=0)
        fail(f"there is no variant {name}: did you mean {close[0]}? (--list names them all)")
    text = path.read_text(encoding="utf-8")
    comment = re.sub(r"\n#   ", " ", text.partition("\n--- ")[0])
    header = dict(re.findall(r"^# (\w+): (.*)$", comment, re.MULTILINE))
    for field in FIELDS[:4]:
        if field not in header:
            fail(f"{path.name} doesn't say its {field}: add a line `# {field}: …` on top")
    try:
        (file,) = unidiff.PatchSet(text)
    except (unidiff.UnidiffParseError, ValueError) as error:
        fail(f"{path.name} is no unified diff of one script: {str(error).strip()}")
    if not (ROOT / file.source_file).is_file():
        fail(f"{path.name} changes {file.source_file}, which isn't here")
    return Patch(name, file.source_file, header, [change for hunk in file for change in changes_of(hunk)])


def changes_of(hunk):
    """The Changes of a hunk of unidiff's, each with the context between it and its neighbours."""
    found = [Change([], [], [], [])]  # what comes after this one comes before the first
    for line in hunk:
        text = line.value.rstrip("\n")
        if line.is_context:
            found[-1].after.append(text)
            continue
        if found[-1].after or len(found) == 1:
            found.append(Change(found[-1].after, [], [], []))
        (found[-1].old if line.is_removed else found[-1].new).append(text)
    return found[1:]


def place(lines, change):
    """Where a change's old lines begin in a script's, by the most context that is in one place; else None."""
    sizes = sorted(itertools.product(range(4), repeat=2), key=sum, reverse=True)
    for before, after in sizes:
        context = change.before[max(0, len(change.before) - before) :]
        block = context + change.old + change.after[:after]
        starts = [i for i in range(len(lines) - len(block) + 1) if lines[i : i + len(block)] == block]
        if len(starts) == 1:
            return starts[0] + len(context)
    return None


def apply(patch, text, onto):
    """A script's text with a patch. Raises SystemExit, with one line, where it doesn't fit; onto: for it."""
    lines = text.split("\n")
    for change in patch.changes:
        start = place(lines, change)
        if start is None:
            sought = (change.old or change.after or change.before)[0]
            fail(f"{patch.name} doesn't fit {onto}: no place there, or more than one, reads as the patch "
                 f"expects at `{sought.strip()[:60]}`; in another order patches may fit")  # fmt: skip
        lines[start : start + len(change.old)] = change.new
    return "\n".join(lines)


def write_patch(name, base, header, text):
    """Writes a variant's file from its header and its script's text."""
    lines = []
    for field, value in header.items():
        if value:
            lines += textwrap.wrap(f"# {field}: {value}", 79, subsequent_indent="#   ",
                                   break_long_words=False, break_on_hyphens=False)  # fmt: skip
    old = read_script(ROOT / base).splitlines()
    lines += difflib.unified_diff(old, text.splitlines(), base, script_name(base, [name]), lineterm="")
    content = "\n".join(lines) + "\n"
    fineweb.write_atomic(VARIANTS / f"{name}.patch", lambda file: file.write(content.encode()))


# ==========================================================================
# Scripts


def read_script(path):
    """A script's text with LF at the ends of lines. Raises SystemExit, with one line, if it isn't one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} can't be read: {getattr(error, 'strerror', None) or error}")
    if not text.startswith('"""\n') or END_OF_DOCSTRING not in text:
        fail(f'{path} is no training script: it must begin with a docstring between lines of """')
    return text.rstrip("\n") + "\n"


def body(text):
    """A script without its docstring."""
    return text.partition(END_OF_DOCSTRING)[2]


def short_name(base):
    """train_gpt2.py -> gpt2."""
    return base.removeprefix("train_").removesuffix(".py")


def script_name(base, names):
    """The file of variants of one base: ["gpt2-rope", "gpt2-rmsnorm"] -> train_gpt2_rope_rmsnorm.py."""
    added = [name.removeprefix(short_name(base) + "-") for name in names]
    return f"train_{'_'.join([short_name(base), *added])}.py".replace("-", "_")


def load_text(name, text):
    """The module of a script that needn't be in a file. Raises SystemExit if it doesn't run."""
    module = types.ModuleType(name)
    module.__file__ = str(ROOT / f"{name}.py")
    try:
        exec(compile(text, f"{name}.py", "exec"), module.__dict__)
    except Exception as error:  # whatever is wrong in it
        fail(f"{name}.py would not run: {type(error).__name__}: {error}")
    return module


def count(name, text):
    """The number of parameters, at full size, of a script that needn't be in a file."""
    module = load_text(name, text)
    try:
        with torch.device("meta"):
            model = module.Model(module.Config(**module.RECIPE))
    except Exception as error:  # whatever is wrong in it
        fail(f"{name}.py would not run: {type(error).__name__}: {error}")
    return sum(parameter.numel() for parameter in model.parameters())


def docstring(patches, name, number):
    """A variant's docstring: what it is, its number of parameters, and the base's commands."""
    base = patches[0].base
    paragraphs = [patch.header["what"] for patch in patches]
    paragraphs += [f"Paper: {patch.header['paper']}" for patch in patches]
    asked = " ".join(patch.name for patch in patches)
    paragraphs.append(f"Made of {base} by `python -m tools.vary {asked}`. {number:,} parameters with the "
                      "vocabulary padded to 50,304.")  # fmt: skip
    if any('"""' in text or "\\" in text for text in paragraphs):
        fail(f'{name}: a patch has """ or a backslash on top, which a docstring can\'t hold')
    wrapped = [textwrap.fill(text, 79, break_long_words=False, break_on_hyphens=False) for text in paragraphs]
    commands = []
    for line in read_script(ROOT / base).partition(END_OF_DOCSTRING)[0].split("\n"):
        if line.startswith("    "):
            line = line.replace(base, name)
            commands.append(line if len(line) <= 79 else line.partition("#")[0].rstrip())
    return '"""\n' + "\n\n".join([*wrapped, "\n".join(commands)]) + END_OF_DOCSTRING


def make(names):
    """(file name, text, base, number of parameters) of the script with these variants in order.

    Raises SystemExit, with one line, if they don't go together.
    """
    patches = [read_patch(name) for name in names]
    base = patches[0].base
    text = read_script(ROOT / base)
    onto = base
    for patch in patches:
        if patch.base != base:
            fail(f"{patch.name} is a patch of {patch.base}, but {names[0]} of {base}: "
                 "variants go together if they have one base")  # fmt: skip
        text = apply(patch, text, onto)
        onto += f" with {patch.name}"
    name = script_name(base, names)
    number = count(name.removesuffix(".py"), text)
    return name, docstring(patches, name, number) + body(text), base, number


# ==========================================================================
# Command line


@dataclasses.dataclass
class Args:
    names: tyro.conf.Positional[tuple[str, ...]] = ()  # variants of one base; with --save: the edited script
    list: bool = False  # name all variants
    save: str = ""  # make a patch of this name of an edited script
    what: str = ""  # what the variant is, in a sentence
    question: str = ""  # what it is to answer
    paper: str = ""  # where it is from, or that it is an idea of your own
    parameters: str = ""  # what keeps their number; empty: by how much it changes
    unequal: str = ""  # why their number can't be kept within 1%
    force: bool = False  # overwrite a file that has been edited


def write_script(names, force):
    """Writes the script with these variants, unless it would overwrite somebody's edits."""
    name, text, base, number = make(names)
    path = ROOT / name
    if path.exists() and path.read_text(encoding="utf-8") != text and not force:
        fail(f"{name} is not what this command writes: it was edited, or {base} or the patch was. "
             "Rename it to keep it, or overwrite it with --force")  # fmt: skip
    fineweb.write_atomic(path, lambda file: file.write(text.encode()))
    differing = sum(len(change.old + change.new) for name in names for change in read_patch(name).changes)
    print(f"{name}: {number:,} parameters, budget {BUDGET:,}; {differing} lines differ from {base}")
    print(f"Next: python {name} --tiny")


def save(name, path, args):
    """Makes a patch of an edited copy of a script."""
    base = f"train_{name.partition('-')[0]}.py"
    if not re.fullmatch(re.escape(short_name(base)) + r"(-[a-z0-9]+)+", name) or not (ROOT / base).is_file():
        fail(f"--save {name}: call it as the script that it changes, and a name, as gpt2-mine")
    edited = read_script(path)
    original = read_script(ROOT / base)
    text = original.partition(END_OF_DOCSTRING)[0] + END_OF_DOCSTRING + body(edited)
    if text == original:
        fail(f"{path.name} differs from {base} in its docstring at most: there is nothing to save")
    file = VARIANTS / f"{name}.patch"
    if file.exists() and not args.force:
        fail(f"{file.name} is there already: choose another name, or overwrite it with --force")
    header = read_patch(name).header if file.exists() else {}
    header |= {field: getattr(args, field) for field in FIELDS if getattr(args, field)}
    missing = [f"--{field}" for field in FIELDS[:3] if field not in header]
    if missing:
        fail(f"a patch is read on its own: give {', '.join(missing)}, a sentence each, in quotes")
    number = count(path.stem, text)
    change = number / count(short_name(base), original) - 1
    header.setdefault("parameters", f"{change:+.2%}" if change else "the same")
    if abs(change) > 0.01 and "unequal" not in header:
        fail(f"{path.name} has {number:,} parameters, {change:+.1%} against {base}: make them equal, "
             "to 1%, or say by --unequal why they can't be")  # fmt: skip
    patch = Patch(name, base, header, [])
    docstring([patch], path.name, number)  # which says if it can't be
    write_patch(name, base, {field: header[field] for field in FIELDS if field in header}, text)
    if apply(read_patch(name), original, base) != text:
        raise AssertionError(f"{file} doesn't give {path} back")
    print(f"saved {file}: {number:,} parameters, budget {BUDGET:,}")


def main():
    args = parse(Args, "tools.vary", __doc__)
    if args.list:
        for name in variants():
            what = read_patch(name).header["what"]
            print(textwrap.fill(f"{name:20}  {what}", 79, subsequent_indent=" " * 22))
    elif args.save:
        if len(args.names) != 1:
            fail("--save NAME wants one script beside the name, as --save gpt2-mine train_mine.py")
        save(args.save, Path(args.names[0]), args)
    elif args.names:
        write_script(args.names, args.force)
    else:
        fail("which variant? --list names them all")
