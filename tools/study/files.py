"""
What a study's file asks for: a question, and entries, each a script or variants of one with options, to be
trained for so many seeds, rates, scales of the initial weights and sizes.

Raises SystemExit, with one line, for whatever makes no sense.
"""
import difflib
import functools
import graphlib
import math
import re
from pathlib import Path

import msgspec

from fineweb import fail
from tools.study import vary

STUDIES = Path(__file__).parent / "studies"
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
SET_BY_STUDY = ("run_name", "seed", "max_steps", "max_lr", "min_lr")  # no options of a file

Options = dict[str, int | float | str]


class Size(msgspec.Struct, forbid_unknown_fields=True):
    """What a size means; see sizes.toml."""

    about: str
    tiny: bool = False
    max_lr: float | None = None
    max_steps: int | None = None
    evaluations: int | None = None
    options: Options = {}
    model: dict[str, Options] = {}  # of a script or a variant
    shapes: str = ""  # the size whose model it has
    own_rate: dict[str, float] = {}  # of a script: its best multiple of max_lr


class Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A model of a study: a script, or variants of one, with options."""

    base: str | list[str] | None = None  # the entries that it is compared with
    script: str | None = None  # as gpt2; else the entry's name is that of a script or a variant
    variants: list[str] = []
    options: Options = {}
    at: dict[str, Options] = {}  # options at a size
    unequal: str | None = None  # why its parameters are not within 2% of its base's

    def bases(self):
        """The names of the entries that it is compared with."""
        return [self.base] if isinstance(self.base, str) else self.base or []


class Study(msgspec.Struct, forbid_unknown_fields=True):
    """A study's file."""

    question: str
    sizes: list[str]
    seeds: list[int]
    runs: dict[str, Entry]
    rates: tuple[float | str, ...] = (1.0,)  # multiples of the size's learning rate; "own": a script's best
    inits: tuple[float, ...] = (1.0,)  # multiples of the initial matrices and embeddings
    max_steps: dict[str, int] = {}  # at a size, where it is not the size's
    options: Options = {}
    name: str = ""

    def bases_first(self):
        """The names of its entries, each after its bases. Raises graphlib.CycleError."""
        return list(graphlib.TopologicalSorter({n: e.bases() for n, e in self.runs.items()}).static_order())


def read_toml(path, kind):
    """A TOML file as a kind. Raises SystemExit, with one line, if it isn't one."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        fail(f"{path} can't be read: {getattr(error, 'strerror', None) or error}")


def study_names():
    """The names of the studies that are here."""
    return sorted(path.stem for path in STUDIES.glob("*.toml") if path.stem != "sizes")


@functools.cache
def read_sizes():
    """{name: Size} of sizes.toml, from small to large."""
    return read_toml(STUDIES / "sizes.toml", dict[str, Size])


def read_study(name):
    """The Study of a name, a file, or a variant with its base. Raises SystemExit, with one line."""
    path = STUDIES / f"{name}.toml" if name in study_names() else Path(name)
    if path.suffix == ".toml":
        study = read_toml(path, Study)
        study.name = path.stem
    elif name in vary.variants():
        patch = vary.read_patch(name)
        base = vary.short_name(patch.base)
        pair = {base: Entry(), name: Entry(base=base, unequal=patch.header.get("unequal"))}
        study = Study(patch.header["question"], list(read_sizes()), [1, 2, 3], pair, name=name)
    else:
        close = difflib.get_close_matches(name, study_names() + vary.variants(), n=1, cutoff=0)
        fail(f"there is no study {name}: did you mean {close[0]}? --list names them")
    check_study(path, study)
    return study


def check_study(where, study):
    """Raises SystemExit, with one line, for a study that makes no sense."""
    if not (study.sizes and study.seeds and study.rates and study.inits and study.runs):
        fail(f"{where}: needs at least one of sizes, seeds, rates, inits and runs")
    for factor in (*study.rates, *study.inits):
        if factor != "own" and (isinstance(factor, str) or not 0 < factor < math.inf):
            fail(f'{where}: {factor} is neither a positive number nor the rate "own"')
    if min(study.seeds) < 0:
        fail(f"{where}: seeds must be at least 0")
    tables = [study.options]
    sizes = [*study.sizes, *study.max_steps]
    for name, entry in study.runs.items():
        tables += [entry.options, *entry.at.values()]
        sizes += entry.at
        if not PLAIN_NAME.fullmatch(name):
            fail(f"{where}: {name!r} is to be a part of a folder's name: letters, digits, dots and dashes")
        for base in entry.bases():
            if base not in study.runs:
                fail(f"{where}: the base of {name}, {base}, is none of its runs")
    for name in SET_BY_STUDY:
        if any(name in table for table in tables):
            fail(f"{where}: {name} is no option here: seeds, rates and max_steps set it")
    for size in sizes:
        if size not in read_sizes():
            fail(f"{where}: there is no size {size}, only {', '.join(read_sizes())}")
    try:
        study.bases_first()
    except graphlib.CycleError as error:
        fail(f"{where}: {', '.join(dict.fromkeys(error.args[1]))} are each other's bases")
