"""
Variants of the scripts. Each is a patch: what it changes, and why one asks.

    python -m tools.vary --list          # what there is
    python -m tools.vary gpt2-rope       # write train_gpt2_rope.py
    python -m tools.vary gpt2-rope gpt2-rmsnorm    # both changes in one script
    python -m tools.vary --save gpt2-mine train_mine.py --what "GPT-2 with …"
        --question "Does … ?" --paper "…"    # your edited copy as a patch
    python -m tools.vary --refresh       # after an edit of the scripts

What it writes is a whole script, which runs, resumes, is exported and compared
like any other. It names the number of parameters, the budget, and how many
lines differ from the base.

A patch, tools/variants/NAME.patch, is a unified diff with a few lines on top:

    # what: the docstring's first lines
    # question: what the variant is to answer
    # paper: where it is from
    # parameters: what was done to keep their number
    # unequal: why it could not be kept within 1%, if so

It holds the code alone; vary writes the docstring. A hunk is found by its
text, which must be in the script once and to the letter. So line numbers may
be off, and patches outlive edits of other parts. Definitions that a patch
takes from another script say so above, "# The same in RWKV-7, as Attention.",
and --refresh renews them.
"""
import argparse
import dataclasses
import difflib
import itertools
import re
import textwrap
import types
from pathlib import Path

import fineweb
from fineweb import fail
from tools import models, sync

ROOT = sync.ROOT
VARIANTS = Path(__file__).parent / "variants"
BUDGET = 124_475_904  # parameters of train_gpt2.py
FIELDS = ("what", "question", "paper", "parameters", "unequal")
DEFINITION = re.compile(r"(?:class|def) (\w+)")
END_OF_DOCSTRING = '\n"""\n'
COPY = re.compile(
    r"^# The same in (?P<scripts>[^\n]*?)(?:, as (?P<theirs>\w+))?\.\n"
    r"(?:class|def) (?P<name>\w+)"
    r"(?:.*\n(?:(?:    .*)?\n)*)",  # all that is indented below, and blank lines
    re.MULTILINE,
)


# ==========================================================================
# Patches


@dataclasses.dataclass
class Hunk:
    """Lines to find in a script, and those that take their place."""

    old: list
    new: list


@dataclasses.dataclass
class Patch:
    """A variant's file: its base's file name, the fields of its header, its hunks."""

    name: str
    base: str
    header: dict
    hunks: list


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
    header = {}
    field = None
    base = None
    hunks = []
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if line.startswith("@@"):
            hunks.append(Hunk([], []))
        elif hunks and line[:1] in ("", " ", "-", "+"):
            if line[:1] != "+":
                hunks[-1].old.append(line[1:])
            if line[:1] != "-":
                hunks[-1].new.append(line[1:])
        elif not hunks and line.startswith("--- "):
            base = Path(line[4:].strip()).name
        elif not hunks and line.startswith("#   ") and field:
            header[field] += " " + line[4:].strip()
        elif not hunks and line.startswith("# "):
            field, _, value = line[2:].partition(":")
            header[field] = value.strip()
        elif hunks or not line.startswith("+++ "):
            fail(f"{path.name}, line {number}: {line[:40]!r} is no line of a unified diff")
    missing = [field for field in FIELDS[:4] if not header.get(field)]
    if missing:
        fail(f"{path.name} doesn't say its {missing[0]}: add a line `# {missing[0]}: …` on top")
    check_header(path.name, header)
    if not hunks or base is None or not (ROOT / base).is_file():
        fail(f"{path.name} changes no script that is here: it needs a line `--- train_x.py`, and hunks below")
    return Patch(name, base, header, hunks)


def check_header(where, header):
    """Raises SystemExit, with one line, if a field can't be written into a docstring."""
    for field, value in header.items():
        if '"""' in (value or "") or "\\" in (value or ""):
            fail(f'{where}: its {field} has """ or a backslash in it, which a docstring can\'t hold')


def places(lines, block):
    """Where a block of lines is to be found in others: the indices of its first line."""
    last = len(lines) - len(block)
    return [i for i in range(last + 1) if lines[i : i + len(block)] == block]


def apply(patch, text, onto):
    """A script's text with a patch. Raises SystemExit, with one line, where it doesn't fit; onto: for it."""
    lines = text.split("\n")
    found = []
    for hunk in patch.hunks:
        starts = places(lines, hunk.old)
        if len(starts) != 1:
            sought = next((line for line in hunk.old if not places(lines, [line])), hunk.old[0])
            count = "nothing" if not starts else "more than one place"
            order = "; in another order they may fit" if " with " in onto else ""
            fail(f"{patch.name} doesn't fit {onto}: {count} there reads as the patch expects at "
                 f"`{sought.strip()[:60]}`{order}")  # fmt: skip
        found.append((starts[0], hunk))
    found.sort(key=lambda place: place[0])
    for (start, hunk), (next_start, _) in itertools.pairwise(found):
        if start + len(hunk.old) > next_start:
            fail(f"{patch.name} changes the same lines of {onto} twice: join its hunks")
    for start, hunk in reversed(found):  # from the end, so that the other places stay where they are
        lines[start : start + len(hunk.old)] = hunk.new
    return "\n".join(lines)


def mark_definitions(lines, others, side):
    """The lines to compare, where those of a definition that the others lack equal nothing there.

    So a diff shows such a definition in one piece, and finds no blank line of it somewhere else.
    """
    names = set()
    for line in others:
        match = DEFINITION.match(line)
        if match:
            names.add(match[1])
    marked = []
    inside = False
    for i, line in enumerate(lines):
        has_comment = line.startswith("# ") and i + 1 < len(lines)
        match = DEFINITION.match(lines[i + 1] if has_comment else line)
        if match:
            inside = match[1] not in names
        elif line[:1].strip():
            inside = False
        marked.append((side, i) if inside else line)
    return marked


def find_changes(old, new):
    """The runs of lines that differ, as (first, end) in old and (first, end) in new."""
    ours = mark_definitions(old, new, "old")
    theirs = mark_definitions(new, old, "new")
    matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
    return [code[1:] for code in matcher.get_opcodes() if code[0] != "equal"]


def group_changes(old, changes):
    """[[first, end in old, its changes]]: hunks with as few lines of context as make them unique."""
    groups = []
    for change in changes:
        first, end = change[:2]
        is_insertion = first == end  # which is read, and found, between its neighbours
        while is_insertion or len(places(old, old[first:end])) > 1:
            first = max(0, first - 1)
            end = min(len(old), end + 1)
            is_insertion = False
        joined = [change]
        while groups and first <= groups[-1][1] + 1:
            before = groups.pop()
            first = min(first, before[0])
            end = max(end, before[1])
            joined = before[2] + joined
        groups.append([first, end, joined])
    return groups


def heading(lines, first):
    """The definition that a line is in, for the reader: "Attention.forward"."""
    outer = ""
    inner = ""
    for line in lines[: first + 1]:
        match = re.match(r"( {4})?(?:class|def) (\w+)", line)
        if match and match[1]:
            inner = f".{match[2]}"
        elif match:
            outer = match[2]
            inner = ""
        elif re.match(r"\S", line):
            outer = inner = ""
    return outer + inner


def diff(old, new):
    """The hunks of a unified diff between two scripts, as text."""
    old = old.split("\n")
    new = new.split("\n")
    out = []
    shift = 0  # how many lines the hunks before have added
    for first, end, changes in group_changes(old, find_changes(old, new)):
        body = []
        at = first
        for a, b, c, d in changes:
            body += [" " + line for line in old[at:a]]
            body += ["-" + line for line in old[a:b]]
            body += ["+" + line for line in new[c:d]]
            at = b
        body += [" " + line for line in old[at:end]]
        size = sum(line[0] != "-" for line in body)
        ranges = f"@@ -{first + 1},{end - first} +{first + 1 + shift},{size} @@"
        shift += size - (end - first)
        out += [f"{ranges} {heading(old, changes[0][0])}".rstrip(), *body]
    return "\n".join(out) + "\n"


def write_text(path, text):
    """Writes a file, whole or not at all, with the same bytes on every system."""
    fineweb.write_atomic(path, lambda f: f.write(text.encode()))


def write_patch(name, base, header, text):
    """Writes a variant's file from its header and its script's text."""
    lines = []
    for field, value in header.items():
        if value:
            lines += textwrap.wrap(f"# {field}: {value}", 79, subsequent_indent="#   ",
                                   break_long_words=False, break_on_hyphens=False)  # fmt: skip
    lines += [f"--- {base}", f"+++ {script_name(base, [name])}"]
    original = read_script(ROOT / base)
    write_text(VARIANTS / f"{name}.patch", "\n".join(lines) + "\n" + diff(original, text))


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


def count_parameters(text, name):
    """(all parameters at full size, those active) of a script that needn't be in a file.

    Raises SystemExit, with one line, if it doesn't run.
    """
    module = types.ModuleType(name.removesuffix(".py"))
    module.__file__ = str(ROOT / name)
    try:
        exec(compile(text, name, "exec"), module.__dict__)
        return models.count_parameters(module, module.Config(**module.RECIPE))
    except Exception as error:  # whatever is wrong in it
        reason = str(error).splitlines()[0] if str(error) else ""
        fail(f"{name} would not run ({type(error).__name__}: {reason[:100]}), so nothing was written")


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
        named = re.split(", | and ", match["scripts"])
        scripts = [sync.SCRIPTS.get(script) for script in named]
        if None in scripts:
            fail(f"`# The same in {match['scripts']}.` names a script that is none of "
                 + ", ".join(sync.SCRIPTS))  # fmt: skip
        if base in scripts:
            continue
        ours = match[0].rstrip("\n") + "\n"
        theirs = match["theirs"] or match["name"]
        original = definition(ROOT / scripts[0], theirs)
        original = re.sub(rf"^(class|def) {theirs}\b", rf"\1 {match['name']}", original)
        found.append((ours, ours.partition("\n")[0] + "\n" + original))
    return found


def lines_of(blocks, lines):
    """The indices of the lines that belong to one of the blocks of text."""
    found = set()
    for text in blocks:
        block = text.split("\n")[:-1]  # without what follows the last line's end
        for start in places(lines, block):
            found.update(range(start, start + len(block)))
    return found


def count_lines(text, base):
    """(lines of the diff between base and variant, those of them in whole definitions of other scripts).

    These are copied to the letter, or taken out although another script has the same one.
    """
    original = read_script(ROOT / base)
    old = original.split("\n")
    new = with_docstring_of(original, text).split("\n")
    copied = [ours for ours, _ in copies(text, base)]
    kept = text
    for ours in copied:
        kept = kept.replace(ours, "")
    gone = []
    for match in COPY.finditer(original):
        if not re.search(rf"^(?:class|def) {match['name']}\b", kept, re.MULTILINE):
            gone.append(match[0])
    added = lines_of(copied, new)
    removed = lines_of(gone, old)
    total = 0
    known = 0
    for a, b, c, d in find_changes(old, new):
        total += b - a + d - c
        known += sum(line in removed for line in range(a, b))
        known += sum(line in added for line in range(c, d))
    return total, known


def docstring(patches, name, parameters):
    """A variant's docstring: what it is, and the base's commands."""
    base = patches[0].base
    asked = " ".join(patch.name for patch in patches)
    files = " and ".join(f"tools/variants/{patch.name}.patch" for patch in patches)
    made = f"Made of {base} by `python -m tools.vary {asked}`: the change is {files}. "
    made += f"{parameters:,} parameters with the vocabulary padded to 50,304."
    paragraphs = [patch.header["what"] for patch in patches]
    paragraphs += [f"Paper: {patch.header['paper']}" for patch in patches] + [made]
    wrapped = []
    for paragraph in paragraphs:
        lines = textwrap.wrap(paragraph, 79, break_long_words=False, break_on_hyphens=False)
        wrapped.append("\n".join(lines))
    commands = read_script(ROOT / base).partition(END_OF_DOCSTRING)[0]
    commands = [line.replace(base, name) for line in commands.split("\n") if line.startswith("    ")]
    for i, line in enumerate(commands):
        if len(line) > 79:  # by a long name: then it has to do without its comment
            commands[i] = line.partition("#")[0].rstrip()
    return '"""\n' + "\n\n".join([*wrapped, "\n".join(commands)]) + END_OF_DOCSTRING


def make(names):
    """(file name, text, base, all parameters, active ones) of the script with these variants in order.

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
    parameters, active = count_parameters(text, name)
    return name, docstring(patches, name, parameters) + body(text), base, parameters, active


# ==========================================================================
# Command line


def describe_size(name, text, base, parameters, active):
    """A line on a variant's size and on how much of its base it changes."""
    total, known = count_lines(text, base)
    line = f"{name}: {parameters:,} parameters"
    if active != parameters:
        line += f" ({active:,} active per token)"
    line += f", budget {BUDGET:,}; {total} lines differ from {base}"
    if known:
        line += f", {known} of them in definitions of other scripts"
    if parameters > BUDGET:
        line += f". That is {parameters - BUDGET:,} parameters over the budget"
    return line


def write_script(names, force):
    """Writes the script with these variants, unless it would overwrite somebody's edits."""
    name, text, base, parameters, active = make(names)
    path = ROOT / name
    if path.exists() and path.read_text(encoding="utf-8") != text and not force:
        fail(f"{name} is not what this command writes: it was edited, or {base} or the patch was. "
             "Rename it to keep it, or overwrite it with --force")  # fmt: skip
    write_text(path, text)
    print(describe_size(name, text, base, parameters, active))
    print(f"Next: python {name} --tiny")


def closest(text):
    """The file name of the script that a text differs from in the fewest lines."""
    counts = {base: count_lines(text, base)[0] for base in sync.SCRIPTS.values()}
    return min(counts, key=counts.get)


def find_base(name, path, text, asked):
    """The file name of the script that an edited copy is a variant of: asked for, named, or the closest.

    Raises SystemExit, with one line, if the variant's name doesn't begin with it.
    """
    choices = [short_name(base) for base in sync.SCRIPTS.values()]
    if asked and asked not in choices:
        fail(f"--base {asked} is none of the scripts: {', '.join(choices)}")
    named = name.partition("-")[0]
    near = closest(text)
    base = asked or (named if named in choices else short_name(near))
    if not re.fullmatch(re.escape(base) + r"(-[a-z0-9]+)+", name):
        fail(f"call the variant {base}-NAME, in small letters and digits, since {path.name} is taken as "
             f"one of train_{base}.py; --base names another")  # fmt: skip
    if near != f"train_{base}.py":
        print(f"note: {path.name} differs from {near} in fewer lines than from train_{base}.py")
    return f"train_{base}.py"


def save(name, path, args):
    """Makes a patch of an edited copy of a script."""
    missing = [f"--{field}" for field in FIELDS[:3] if not getattr(args, field)]
    if missing:
        fail(f"a patch is read on its own: give {', '.join(missing)}, a sentence each, in quotes")
    edited = read_script(path)
    header = {field: getattr(args, field) for field in FIELDS}
    check_header(path.name, header)
    base = find_base(name, path, edited, args.base)
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
            fail(f"{path.name} differs from what `{first_line}` says: copy it to the letter, "
                 "or take the comment away")  # fmt: skip
    parameters, active = count_parameters(text, script_name(base, [name]))
    before, _ = count_parameters(original, base)
    change = (parameters - before) / before
    if not header["parameters"]:
        header["parameters"] = "the same" if parameters == before else f"{change:+.2%}"
    if abs(change) > 0.01 and not args.unequal:
        fail(f"{path.name} has {parameters:,} parameters, {change:+.1%} against {base}: make them equal, "
             "to 1%, or say by --unequal why they can't be")  # fmt: skip
    write_patch(name, base, header, text)
    if body(apply(read_patch(name), original, base)) != body(edited):
        raise AssertionError(f"{file} doesn't give {path} back")
    print(f"saved {file.relative_to(VARIANTS.parent.parent)}")
    print(describe_size(script_name(base, [name]), text, base, parameters, active))


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
        patch = read_patch(name)
        lines = textwrap.wrap(patch.header["what"], 77 - width)
        print(f"{name:{width}}  " + ("\n" + " " * (width + 2)).join(lines))


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("names", nargs="*", help="variants of one base; with --save: the edited script")
    parser.add_argument("--list", action="store_true", help="name all variants")
    parser.add_argument("--save", metavar="NAME", help="make the patch NAME of an edited script")
    parser.add_argument("--base", help="what it was edited from, as gpt2 (default: as NAME begins)")
    parser.add_argument("--what", help="what the variant is, in a sentence")
    parser.add_argument("--question", help="what it is to answer")
    parser.add_argument("--paper", help="where it is from, or that it is an idea of your own")
    parser.add_argument("--parameters", help="what keeps their number (default: by how much it changes)")
    parser.add_argument("--unequal", help="why their number can't be kept within 1%%")
    parser.add_argument("--force", action="store_true", help="overwrite a file that has been edited")
    parser.add_argument("--refresh", action="store_true", help="make all patches anew from today's scripts")
    args = fineweb.parse_strictly(parser)
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


if __name__ == "__main__":
    main()
