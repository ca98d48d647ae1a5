"""
What several tools share: their command lines, the training scripts as modules, tables and short numbers.
"""
import hashlib
import importlib
import importlib.util
import re
import sys
from pathlib import Path

import fineweb

ROOT = Path(__file__).parent.parent
NUMERIC = re.compile(r"\**(–|[+-]?[0-9])")  # how a cell of figures begins


def parse(Args, name, description):
    """The command line as an Args, a dataclass whose fields are its options. name: of the module."""
    import tyro

    config = (tyro.conf.FlagCreatePairsOff,)
    program = f"python -m {name}"
    return tyro.cli(Args, prog=program, description=description, use_underscores=True, config=config)


def make_folder(path):
    """Makes a folder and those above it. Raises SystemExit if that isn't possible."""
    with fineweb.one_line(f"{path} can't be made"):
        Path(path).mkdir(parents=True, exist_ok=True)


def script_hash(path):
    """The first 16 digits of a script's sha256, by which its versions are told apart."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def load_script(name, folder=None):
    """(the module of a training script, "") or (None, why there is none).

    It is the copy in a run's folder, if there is one, else the script of that name beside fineweb.py.
    """
    if not re.fullmatch(r"train_\w+", name):  # anything could be imported
        return None, "is no training script"
    copy = folder and folder / f"{name}.py"
    try:
        if not copy or not copy.exists():
            return importlib.import_module(name), ""
        spec = importlib.util.spec_from_file_location(f"{name}_in_{folder.name}", copy)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # a dataclass looks its module up
        spec.loader.exec_module(module)
        return module, ""
    except ModuleNotFoundError as missing:
        if missing.name == name:
            return None, "is not here"
        return None, f"can't be imported: the package {missing.name} is missing"
    except Exception as error:  # whatever a script that is being edited does
        return None, f"can't be imported: {type(error).__name__}: {error}"


def table(head, rows):
    """A Markdown table of lists of str; columns of figures are aligned to the right."""
    align = []
    for column in range(len(head)):
        figures = column > 0 and all(NUMERIC.match(row[column]) for row in rows)
        align.append("--:" if figures else "---")
    text = ""
    for cells in (head, align, *rows):
        text += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return text


def short(number):
    """A number in three digits: 104, 17.1k, 2.76M."""
    if number < 1000:
        return f"{number:.3g}"
    if number < 1e6:
        return f"{number / 1e3:.3g}k"
    return f"{number / 1e6:.3g}M"
