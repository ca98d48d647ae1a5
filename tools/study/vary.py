"""
Variants of the scripts. Each is a patch: what it changes, and why one asks.

    python -m tools.vary --list          # what there is
    python -m tools.vary gpt2-rope       # write train_gpt2_rope.py
    python -m tools.vary gpt2-rope gpt2-rmsnorm    # both changes in one script
    python -m tools.vary --save gpt2-mine train_mine.py --what "GPT-2 with …"
        --question "Does … ?" --paper "…"    # your edited copy as a patch
    python -m tools.vary --refresh       # after an edit of the scripts

What it writes is a whole script, which runs, resumes, is exported and compared
like any other.

A patch, tools/study/variants/NAME.patch, is a unified diff with a few lines on
top:

    # what: the docstring's first lines
    # question: what the variant is to answer
    # paper: where it is from
    # parameters: what was done to keep their number
    # unequal: why it could not be kept within 1%, if so

It holds the code alone; the docstring is made of these lines. A change is
found by its text, and by as much of the three lines around it as is there, so
patches outlive edits of other parts. Definitions that a patch takes from
another script say so above, "# The same in RWKV-7, as Attention.", and
--refresh renews them.
"""
import dataclasses
import difflib
import itertools
import re
import textwrap
import types
from pathlib import Path

import tyro
import unidiff

import fineweb
from fineweb import fail
from tools import parameters, sync
from tools.common import ROOT, parse

VARIANTS = Path(__file__).parent / "variants"
BUDGET = 124_475_904  # parameters of train_gpt2.py
FIELDS = ("what", "question", "paper", "parameters", "unequal")
END_OF_DOCSTRING = '\n"""\n'
COPY = re.compile(
    r"^# The same in (?P<scripts>[^\n]*?)(?:, as (?P<theirs>\w+))?\.\n"
    r"(?P<text>(?:class|def) (?P<name>\w+)"
    r"(?:.*\n(?:(?:    .*)?\n)*))",  # all that is indented below, and blank lines
    re.MULTILINE,
)

# ==========================================================================
# Patches


@dataclasses.dataclass
class Change:
    """Lines to find in a script, those that take their place, and up to three lines before and after."""

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
        hint = f"did you mean {close[0]}? " if close else ""
        fail(f"there is no variant {name}: {hint}(--list names them all)")
    text = path.read_text(encoding="utf-8")
    comment = re.sub(r"\n#   ", " ", text.partition("\n--- ")[0])
    header = dict(re.findall(r"^# (\w+): (.*)$", comment, re.MULTILINE))
    for field in FIELDS[:4]:
        if field not in header:
            fail(f"{path.name} doesn't say its {field}: add a line `# {field}: …` on top")
    check_header(path.name, header)
    try:
        (file,) = unidiff.PatchSet(text)
    except (unidiff.UnidiffParseError, ValueError) as error:
        fail(f"{path.name} is no unified diff of one script: {error}")
    base = file.source_file
    if not (ROOT / base).is_file():
        fail(f"{path.name} changes {base}, which isn't here")
    return Patch(name, base, header, [change for hunk in file for change in changes_of(hunk)])


def check_header(where, header):
    """Raises SystemExit, with one line, if a field can't be written into a docstring."""
    for field, value in header.items():
        if '"""' in (value or "") or "\\" in (value or ""):
            fail(f'{where}: its {field} has """ or a backslash in it, which a docstring can\'t hold')


def changes_of(hunk):
    """The Changes of a hunk of unidiff's, each with the context between it and its neighbours."""
    groups = []
    for is_context, lines in itertools.groupby(hunk, key=lambda line: line.is_context):
        groups.append((is_context, list(lines)))
    found = []
    for number, (is_context, lines) in enumerate(groups):
        if is_context:
            continue
        before = groups[number - 1][1] if number else []
        after = groups[number + 1][1] if number + 1 < len(groups) else []
        old = [line for line in lines if line.is_removed]
        new = [line for line in lines if line.is_added]
        parts = (before[-3:], old, new, after[:3])
        found.append(Change(*([line.value.rstrip("\n") for line in part] for part in parts)))
    return found


def places(lines, block):
    """Where a block of lines is to be found in others: the indices of its first line."""
    last = len(lines) - len(block)
    return [i for i in range(last + 1) if lines[i : i + len(block)] == block]


def place(lines, change):
    """Where the old lines of a change begin, with as much context as makes that one place; None if nowhere."""
    sizes = itertools.product(range(len(change.before) + 1), range(len(change.after) + 1))
    for before, after in sorted(sizes, key=sum, reverse=True):
        context = change.before[len(change.before) - before :]
        starts = places(lines, context + change.old + change.after[:after])
        if len(starts) == 1:
            return starts[0] + before
    return None


def apply(patch, text, onto):
    """A script's text with a patch. Raises SystemExit, with one line, where it doesn't fit; onto: for it."""
    lines = text.split("\n")
    for change in patch.changes:
        start = place(lines, change)
        if start is None:
            sought = (change.old or change.after)[0]
            order = "; in another order they may fit" if " with " in onto else ""
            fail(f"{patch.name} doesn't fit {onto}: no place there, or more than one, reads as the patch "
                 f"expects at `{sought.strip()[:60]}`{order}")  # fmt: skip
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
    write_text(VARIANTS / f"{name}.patch", "\n".join(lines) + "\n")


def write_text(path, text):
    """Writes a file, whole or not at all, with the same bytes on every system."""
    fineweb.write_atomic(path, lambda f: f.write(text.encode()))


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


def load_text(name, text):
    """The module of a script that needn't be in a file. Raises SystemExit, with one line, if it doesn't run."""
    module = types.ModuleType(name)
    module.__file__ = str(ROOT / f"{name}.py")
    try:
        exec(compile(text, f"{name}.py", "exec"), module.__dict__)
    except Exception as error:  # whatever is wrong in it
        fail(f"{name}.py would not run: {type(error).__name__}: {error}")
    return module


def body(text):
    """A script without its docstring."""
    return text.partition(END_OF_DOCSTRING)[2]


def with_docstring_of(original, text):
    """A script's text, but with another's docstring."""
    return original.partition(END_OF_DOCSTRING)[0] + END_OF_DOCSTRING + body(text)


def short_name(base):
    """train_gpt2.py -> gpt2."""
    return base.removeprefix("train_").removesuffix(".py")


def script_name(base, names):
    """The file of variants of one base: ["gpt2-rope", "gpt2-rmsnorm"] -> train_gpt2_rope_rmsnorm.py."""
    stem = short_name(base)
    for name in names:
        stem += "_" + name.removeprefix(short_name(base) + "-")
    return f"train_{stem}.py".replace("-", "_")


def count(text, name):
    """The number of parameters, at full size, of a script that needn't be in a file."""
    module = load_text(name.removesuffix(".py"), text)
    try:
        return parameters.count_parameters(module, module.Config(**module.RECIPE))[0]
    except Exception as error:  # whatever is wrong in it
        fail(f"{name} would not run: {type(error).__name__}: {error}")


def definition(path, name):
    """A class's or function's text in a script, without the comment above."""
    match = re.search(rf"^(?:class|def) {name}\b.*\n(?:(?:    .*)?\n)*", read_script(path), re.MULTILINE)
    if match is None:
        fail(f"{path.name} has no {name} that a variant could have the same one of")
    return match[0].rstrip("\n") + "\n"


def copies(text, base):
    """[(text, what it should be)] of the definitions that a variant has from another script than its base."""
    found = []
    for match in COPY.finditer(text):
        scripts = [sync.SCRIPTS.get(script) for script in re.split(", | and ", match["scripts"])]
        if None in scripts:
            fail(f"`# The same in {match['scripts']}.` names a script that is none of "
                 + ", ".join(sync.SCRIPTS))  # fmt: skip
        if base not in scripts:
            theirs = match["theirs"] or match["name"]
            original = definition(ROOT / scripts[0], theirs)
            original = re.sub(rf"^(class|def) {theirs}\b", rf"\1 {match['name']}", original)
            found.append((match["text"].rstrip("\n") + "\n", original))
    return found


def docstring(patches, name, number):
    """A variant's docstring: what it is, its number of parameters, and the base's commands."""
    base = patches[0].base
    asked = " ".join(patch.name for patch in patches)
    paragraphs = [patch.header["what"] for patch in patches]
    paragraphs += [f"Paper: {patch.header['paper']}" for patch in patches]
    paragraphs.append(f"Made of {base} by `python -m tools.vary {asked}`. {number:,} parameters with the "
                      "vocabulary padded to 50,304.")  # fmt: skip
    wrapped = [textwrap.fill(text, 79, break_long_words=False, break_on_hyphens=False) for text in paragraphs]
    commands = read_script(ROOT / base).partition(END_OF_DOCSTRING)[0]
    commands = [line.replace(base, name) for line in commands.split("\n") if line.startswith("    ")]
    for i, line in enumerate(commands):
        if len(line) > 79:  # by a long name: then it has to do without its comment
            commands[i] = line.partition("#")[0].rstrip()
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
    number = count(text, name)
    return name, docstring(patches, name, number) + body(text), base, number


# ==========================================================================
# Command line


@dataclasses.dataclass
class Args:
    names: tyro.conf.Positional[tuple[str, ...]] = ()  # variants of one base; with --save: the edited script
    list: bool = False  # name all variants
    save: str = ""  # make a patch of this name of an edited script
    base: str = ""  # what it was edited from, as gpt2; empty: as the patch's name begins
    what: str = ""  # what the variant is, in a sentence
    question: str = ""  # what it is to answer
    paper: str = ""  # where it is from, or that it is an idea of your own
    parameters: str = ""  # what keeps their number; empty: by how much it changes
    unequal: str = ""  # why their number can't be kept within 1%
    force: bool = False  # overwrite a file that has been edited
    refresh: bool = False  # make all patches anew from today's scripts


def write_script(names, force):
    """Writes the script with these variants, unless it would overwrite somebody's edits."""
    name, text, base, number = make(names)
    path = ROOT / name
    if path.exists() and path.read_text(encoding="utf-8") != text and not force:
        fail(f"{name} is not what this command writes: it was edited, or {base} or the patch was. "
             "Rename it to keep it, or overwrite it with --force")  # fmt: skip
    write_text(path, text)
    differing = sum(len(change.old) + len(change.new) for n in names for change in read_patch(n).changes)
    print(f"{name}: {number:,} parameters, budget {BUDGET:,}; {differing} lines differ from {base}")
    print(f"Next: python {name} --tiny")


def save(name, path, args):
    """Makes a patch of an edited copy of a script."""
    header = {field: getattr(args, field) for field in FIELDS}
    missing = [f"--{field}" for field in FIELDS[:3] if not header[field]]
    if missing:
        fail(f"a patch is read on its own: give {', '.join(missing)}, a sentence each, in quotes")
    check_header(path.name, header)
    base = f"train_{args.base or name.partition('-')[0]}.py"
    if base not in sync.SCRIPTS.values():
        fail(f"{base} is none of the scripts: name another by --base, or call the variant gpt2-NAME")
    if not re.fullmatch(re.escape(short_name(base)) + r"(-[a-z0-9]+)+", name):
        fail(f"call the variant {short_name(base)}-NAME, in small letters and digits")
    edited = read_script(path)
    original = read_script(ROOT / base)
    text = with_docstring_of(original, edited)
    if text == original:
        fail(f"{path.name} differs from {base} in its docstring at most: there is nothing to save")
    file = VARIANTS / f"{name}.patch"
    if file.exists() and not args.force:
        fail(f"{file.name} is there already: choose another name, or overwrite it with --force")
    for ours, theirs in copies(text, base):
        if ours != theirs:
            first_line = ours.partition("\n")[0]
            fail(f"{path.name}: `{first_line}` isn't the same as where it is from: copy it to the letter, "
                 "or take the comment above away")  # fmt: skip
    number = count(text, script_name(base, [name]))
    before = count(original, base)
    change = (number - before) / before
    header["parameters"] = header["parameters"] or ("the same" if number == before else f"{change:+.2%}")
    if abs(change) > 0.01 and not args.unequal:
        fail(f"{path.name} has {number:,} parameters, {change:+.1%} against {base}: make them equal, "
             "to 1%, or say by --unequal why they can't be")  # fmt: skip
    write_patch(name, base, header, text)
    if apply(read_patch(name), original, base) != text:
        raise AssertionError(f"{file} doesn't give {path} back")
    print(f"saved {file.relative_to(ROOT)}: {number:,} parameters, budget {BUDGET:,}")


def refresh():
    """Makes all patches anew: line numbers, and what they have from other scripts.

    Raises SystemExit, after the others are made, if some no longer fit their base.
    """
    unfit = []
    for name in variants():
        patch = read_patch(name)
        file = VARIANTS / f"{name}.patch"
        before = file.read_bytes()
        try:
            text = apply(patch, read_script(ROOT / patch.base), patch.base)
        except SystemExit as error:
            unfit.append(str(error))
            continue
        for ours, theirs in copies(text, patch.base):
            text = text.replace(ours, theirs)
        write_patch(name, patch.base, patch.header, text)
        if file.read_bytes() != before:
            print(f"{file.name}: made anew")
    if unfit:
        fail(f"{len(unfit)} no longer fit their base and have to be edited by hand: {'; '.join(unfit)}")


def show_list():
    """Prints each variant's name and what it is."""
    width = max(map(len, variants()), default=0)
    for name in variants():
        what = read_patch(name).header["what"]
        print(textwrap.fill(f"{name:{width}}  {what}", 79, subsequent_indent=" " * (width + 2)))


def main():
    args = parse(Args, "tools.vary", __doc__)
    if args.list:
        show_list()
    elif args.refresh:
        refresh()
    elif args.save:
        if len(args.names) != 1:
            fail("--save NAME wants one script beside the name, as --save gpt2-mine train_mine.py")
        save(args.save, Path(args.names[0]), args)
    elif args.names:
        write_script(args.names, args.force)
    else:
        fail("which variant? --list names them all")
