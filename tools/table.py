"""
The README's tables, made from the scripts themselves and from the evidence in results/.

    python -m tools.table                   # print them
    python -m tools.table architectures     # one of them: architectures, speed or demonstration
    python -m tools.table --write           # put them into README.md, between their marks

speed is made from results/bench-cpu/*.json, which tools.bench wrote; demonstration from the runs in results/demo,
by tools.compare.
"""
import argparse
import difflib
import importlib
import json
import re
import statistics

import fineweb
from tools import compare
from tools.compare import count_parameters, make_model
from tools.sync import ORIGINAL, ROOT, siblings

DIFFERENCE = {  # what a reader of the diff to train_gpt2.py will see, in a sentence
    "gpt2": "The reference: learned positions, LayerNorm, full attention, a GELU MLP, biases.",
    "llama": "LLaMA 3: RMSNorm, rotary positions, four query heads to a key-value head, SwiGLU, no biases.",
    "mistral": "Mistral: LLaMA's block that sees only the last 512 tokens.",
    "gemma": "Gemma 3: narrow and deep, four norms a block, normed queries and keys, five layers that see 256 tokens to one that "
             "sees all, GeGLU.",
    "deepseek": "DeepSeek-V3: latent attention, 4 of 16 fine-grained experts and a shared one, balanced by a bias, and a second "
                "token predicted.",
    "rwkv": "RWKV-7: no attention but a matrix-valued state with a delta rule, constant memory per token.",
    "mta": "Multi-Token Attention: attention maps convolved over queries and keys and mixed between heads.",
}  # fmt: skip


def row(path):
    """One line of the table for a script."""
    script = importlib.import_module(path.stem)
    total, active = count_parameters(script, script.RECIPE)
    diff = difflib.unified_diff(ORIGINAL.read_text().splitlines(), path.read_text().splitlines(), n=0)
    changed = sum(line[0] in "+-" and line[:3] not in ("+++", "---") for line in diff)
    flops = f"{make_model(script, script.Config()).flops_per_token() / 1e6:.0f} M"
    sentence = DIFFERENCE[path.stem.removeprefix("train_")]
    return f"| [`{path.name}`]({path.name}) | {total:,} | {active:,} | {flops} | {changed or '–'} | {sentence} |\n"


def architectures():
    head = "| script | parameters | active per token | FLOPs per token, forward | lines unlike train_gpt2.py | what is different |\n"
    return head + "|---|--:|--:|--:|--:|---|\n" + "".join(row(path) for path in [ORIGINAL, *siblings()])


def speed():
    """Of each script with a file in results/bench-cpu: its rate, and the ratios to what ran beside it."""
    text = ("| | tokens/s | of the peak | memory | x GPT-2's tokens/s | x transformers' tokens/s | x its memory |\n"
            "|---|--:|--:|--:|--:|--:|--:|\n")  # fmt: skip
    for path in [ORIGINAL, *siblings()]:
        name = path.stem.removeprefix("train_")
        file = ROOT / f"results/bench-cpu/{name}.json"
        if not file.exists():
            continue
        alone, *pairs = json.loads(file.read_text())["results"]
        rates = alone["rates"]["ours"]
        ratio, memory = {"gpt2": "1" if name == "gpt2" else "–"}, "–"
        for pair in pairs:
            peer = pair["kinds"][1]
            ratios = [a / b for a, b in zip(pair["rates"]["ours"], pair["rates"][peer])]
            ratio[peer] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            if peer == "transformers":
                memory = f"{pair['our_memory'] / pair['peer_memory']:.2f} of {pair['peer_memory'] / 1e9:.2f} GB"
        share = 3 * alone["flops_per_token"] * statistics.median(rates) / alone["peak_flops"]
        text += (f"| {name} | {statistics.median(rates):,.0f} | {share:.0%} | {alone['memory'] / 1e9:.2f} GB | {ratio['gpt2']} | "
                 f"{ratio.get('transformers', '–')} | {memory} |\n")  # fmt: skip
    return text


def demonstration():
    """The leaderboard of the runs in results/demo and which of them can be told apart, as tools.compare has it."""
    runs = [compare.read_run(log.parent) for log in sorted((ROOT / "results/demo").glob("*/log.jsonl"))]
    (pools, _), *others = compare.fair_groups(compare.pool_runs(runs))
    if others:
        fineweb.fail("the runs in results/demo can't all be compared: see `python -m tools.compare results/demo/*`")
    keys = sorted({key for run in runs for key in run.scores})
    pools.sort(key=lambda pool: pool.loss())
    return compare.leaderboard(pools, keys) + "\n" + compare.pairs_tables(pools, keys[0])[1]


TABLES = {"architectures": architectures, "speed": speed, "demonstration": demonstration}


def marks(name):
    return f"<!-- {name}: made by python -m tools.table --write -->\n", f"<!-- /{name} -->\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--write", action="store_true", help="replace the tables in README.md")
    args = fineweb.parse_strictly(parser)
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name in args.names or TABLES:
        if name not in TABLES:
            fineweb.fail(f"there is no table {name}: choose from {', '.join(TABLES)}")
        table = TABLES[name]()
        if not args.write:
            print(table)
            continue
        first, last = marks(name)
        pattern = re.escape(first) + ".*?" + re.escape(last)
        if not re.search(pattern, text, re.DOTALL):
            fineweb.fail(f"README.md lacks the marks {first.strip()} and {last.strip()}")
        text = re.sub(pattern, lambda _: first + table + last, text, flags=re.DOTALL)
    if args.write:
        fineweb.write_atomic(readme, lambda f: f.write(text.encode()))


if __name__ == "__main__":
    main()
