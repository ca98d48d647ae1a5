"""
The README's tables, made from the scripts and from the evidence in results/.

    python -m tools.table                   # print them
    python -m tools.table architectures     # one of them: ranking, seven,
                                            # hybrids, changes, architectures,
                                            # speed or data
    python -m tools.table --write           # put them into README.md, between
                                            # their marks

ranking is made by tools.findings from the studies in results/, and so are
seven, hybrids and changes, its answers by topic. speed and data are made from
results/bench-cpu/*.json, which tools.bench and tools.bench_data wrote. The
lines unlike train_gpt2.py are those that diff marks with < or >. A script of
your own gets no row; a line says so.
"""
import argparse
import importlib
import json
import shutil
import statistics
import subprocess
import sys

import fineweb
from tools import bench, findings, page, sync
from tools.models import all_parameters, make_model
from tools.sync import ORIGINAL, ROOT, siblings

DIFFERENCE = {  # what a reader of the diff to train_gpt2.py will see, in a sentence
    "gpt2": "The reference: learned positions, LayerNorm, full attention, a GELU MLP, biases.",
    "llama": "LLaMA 3: RMSNorm, rotary positions, four query heads to a key-value head, SwiGLU, "
             "no biases.",
    "mistral": "Mistral: LLaMA's block, with attention to the last 512 tokens only. Its RoPE base is "
               "10,000, where LLaMA 3's is 500,000.",
    "gemma": "Gemma 3: narrow and deep, four norms a block, normed queries and keys, five layers that see "
             "256 tokens to one that sees all, GeGLU.",
    "deepseek": "DeepSeek-V3: latent attention, 4 of 16 fine-grained experts and a shared one, balanced by a "
                "bias, and a second token predicted.",
    "rwkv": "RWKV-7: no attention but a matrix-valued state with a delta rule, constant memory per token. "
            "Its authors' learning rate, warm-up, beta2 and eps by default (`--recipe shared` for the "
            "common ones), and L2Wrap in its loss.",
    "mta": "Multi-Token Attention: attention maps convolved over queries and keys and mixed between heads.",
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# architectures


def lines_that_differ(path):
    """What `diff train_gpt2.py PATH | grep -c '^[<>]'` prints. Raises SystemExit without the program diff."""
    if shutil.which("diff") is None:
        fineweb.fail("the program diff, which counts the lines that differ, is not on this machine: "
                     "install diffutils, or make this table elsewhere")  # fmt: skip
    command = ["diff", ORIGINAL, path]
    process = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    return sum(line.startswith(("<", ">")) for line in process.stdout.splitlines())


def describe(path, script):
    """What is different in a script: in words from DIFFERENCE, else the first line of its docstring."""
    name = path.stem.removeprefix("train_")
    first, *_ = (script.__doc__ or "–").strip().splitlines()
    return DIFFERENCE.get(name, first)


def millions(count):
    return f"{count / 1e6:.1f} M"


def architectures():
    """Each script's size, cost, distance from train_gpt2.py and what it is."""
    for path in sync.others():
        print(f"{path.name}: not in the README's table, which has the {len(sync.SCRIPTS)} of tools/sync.py",
              file=sys.stderr)  # fmt: skip
    head = ["script", "parameters", "evaluated", "active", "embedding", "FLOPs per token, forward"]
    head += ["lines unlike train_gpt2.py", "what is different"]
    rows = []
    for path in [ORIGINAL, *siblings()]:
        script = importlib.import_module(path.stem)
        config = script.Config()
        found = all_parameters(script, config)
        flops = make_model(script, config).flops_per_token()
        rows.append([
            f"[`{path.name}`]({path.name})",
            f"{found.trained:,}",
            millions(found.evaluated),
            millions(found.active),
            millions(found.embedding),
            f"{flops / 1e6:.0f} M",
            str(lines_that_differ(path) or "–"),
            describe(path, script),
        ])  # fmt: skip
    return page.table(head, rows, ["---"] + ["--:"] * 6 + ["---"])


# ----------------------------------------------------------------------------------------------------------
# speed


def beside(pair):
    """How many times as fast as the peer a script was: the median of steps in turn, with the spread."""
    peer = pair["kinds"][1]
    rates = pair["rates"]["ours"], pair["rates"][peer]
    ratios = [ours / theirs for ours, theirs in zip(*rates, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def speed_row(name, file):
    """The row of a script in the table of speeds, from what tools.bench wrote."""
    alone, *pairs = json.loads(file.read_text(encoding="utf-8"))["results"]
    rate = statistics.median(alone["rates"]["ours"])
    used = 3 * alone["flops_per_token"] * rate / alone["peak_flops"]
    beside_gpt2 = "1" if name == "gpt2" else "–"
    beside_hf = "–"
    memory = "–"
    for pair in pairs:
        peer = pair["kinds"][1]
        if peer == "gpt2":
            beside_gpt2 = beside(pair)
        if peer == "transformers":
            beside_hf = beside(pair)
            if pair["peer_memory"]:  # it is not measured under Windows
                ratio = pair["our_memory"] / pair["peer_memory"]
                memory = f"{ratio:.2f} of {bench.gigabytes(pair['peer_memory'])}"
    own_memory = bench.gigabytes(alone["memory"])
    return [name, f"{rate:,.0f}", f"{used:.0%}", own_memory, beside_gpt2, beside_hf, memory]


def speed():
    """Of each script with a file in results/bench-cpu: its rate, and the ratios to what ran beside it."""
    head = ["", "tokens/s", "of the peak", "memory"]
    head += ["x GPT-2's tokens/s", "x transformers' tokens/s", "x its memory"]
    rows = []
    for path in [ORIGINAL, *siblings()]:
        name = path.stem.removeprefix("train_")
        file = ROOT / f"results/bench-cpu/{name}.json"
        if file.exists():
            rows.append(speed_row(name, file))
    return page.table(head, rows, ["---"] + ["--:"] * 6)


# ----------------------------------------------------------------------------------------------------------
# data


def data():
    """What tools.bench_data measured: the median of its repeats and their spread."""
    results = json.loads((ROOT / "results/bench-cpu/data.json").read_text(encoding="utf-8"))
    rows = []
    for result in results.values():
        for name, values in result["figures"].items():
            what, _, unit = name.rpartition(", ")
            spread = f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            if min(values) == max(values):
                spread = f"{values[0]:,}"
            rows.append([what, spread, unit])
    return page.table(["", "median", "unit"], rows, ["---", "--:", "---"])


# ----------------------------------------------------------------------------------------------------------

TABLES = {
    "ranking": findings.ranking,
    "seven": lambda: findings.findings("seven"),
    "hybrids": lambda: findings.findings("hybrids"),
    "changes": lambda: findings.findings("changes"),
    "architectures": architectures,
    "speed": speed,
    "data": data,
}


def marks(name):
    """The lines before and after a table in README.md."""
    return f"<!-- {name}: made by python -m tools.table --write -->\n", f"<!-- /{name} -->\n"


def put(text, name, table):
    """README.md's text with a table put between its marks."""
    first, last = marks(name)
    before, mark, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not mark or not end:
        fineweb.fail(f"README.md lacks the marks {first.strip()} and {last.strip()}")
    return before + first + table + last + after


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--write", action="store_true", help="replace the tables in README.md")
    args = fineweb.parse_strictly(parser)
    for name in args.names:
        if name not in TABLES:
            fineweb.fail(f"there is no table {name}: choose from {', '.join(TABLES)}")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name in args.names or TABLES:
        table = TABLES[name]()
        if args.write:
            text = put(text, name, table)
        else:
            print(table)
    if args.write:
        fineweb.write_atomic(readme, lambda f: f.write(text.encode()))


if __name__ == "__main__":
    main()
