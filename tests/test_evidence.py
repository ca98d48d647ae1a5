"""The intervals in results/README.md, which are typed by hand, are those of the runs."""
import itertools
import re

import pytest
from conftest import ROOT

from tools import effects, findings

EVIDENCE = re.sub(r"\s+", " ", (ROOT / "results/README.md").read_text(encoding="utf-8"))
WRITTEN = re.findall(r"\d\.\d+ ± \d\.\d+", EVIDENCE)
# Not of two entries: the mean of two differences, and losses read off too far for tools.findings.
OTHERS = {"0.026 ± 0.020", "0.022 ± 0.028", "0.057 ± 0.032", "0.012 ± 0.025"}


def intervals(losses):
    """The differences of all pairs of {seed: loss}, without their signs, as the file writes them."""
    for ours, theirs in itertools.combinations(losses, 2):
        loss, seeds = effects.paired_loss(ours, theirs)
        if len(seeds) > 1:
            yield findings.with_half(abs(loss.difference), loss.half)


def studies():
    """{(collection, size): {entry with its learning rate: its {seed: loss}}} of all that is in results/."""
    found = {}
    for file in sorted((ROOT / "results").glob("*/runs.jsonl")):
        path = f"results/{file.parent.name}"
        for size, runs in effects.by_size(findings.studied(path)).items():
            groups, _ = effects.group_runs(runs)
            found[path, size] = {group.name: group.losses() for group in groups.values()}
            fresh = [group.on_fresh_text() for group in groups.values()]
            found[path, f"{size}, on fresh text"] = {group.name: group.losses() for group in fresh if group}
    return found


def at_equal_cost(cost, size, shorter):
    """The seven's {seed: loss} with the FLOPs of each of them, or in its time: a list for each of these."""
    paced = findings.Evidence(findings.PACED, "0.25M").selected
    groups = findings.Evidence(findings.RANKED, size).selected.values()
    for reference in groups:
        others = [group for group in groups if group is not reference]
        losses = [findings.losses_at_cost(cost, group, reference, shorter, paced) for group in others]
        yield [reference.losses(), *filter(None, losses)]


@pytest.fixture(scope="module")
def known():
    found = studies()
    sets = [entries.values() for entries in found.values()]
    sets += at_equal_cost("FLOPs", "0.25M", findings.shorter_runs("0.25M"))
    sets += at_equal_cost("time", "0.25M", findings.shorter_runs("0.25M"))
    sets += at_equal_cost("FLOPs", "0.8M", findings.Evidence("results/ablations", "0.8M").selected)
    for size in ("0.25M", "0.8M"):  # these two studies put together: the seeds are others
        hybrids = found["results/hybrids", size]
        titan = found["results/titan", size]
        sets.append([hybrids[entry] | titan[entry] for entry in hybrids.keys() & titan.keys()])
    return {text for losses in sets for text in intervals(losses)}


def test_intervals_are_of_the_runs(known):
    assert len(WRITTEN) > 30 and OTHERS <= set(WRITTEN)
    assert [text for text in WRITTEN if text not in known | OTHERS] == []


def test_how_often_rwkv_is_ahead_of_gemma():
    """The README says in words: fifteen pairs of runs as scored, fourteen on fresh text."""
    scored = []
    fresh = []
    for size in ("0.25M", "0.8M", "2.7M"):
        for path in ("results/architectures", "results/titan"):
            here = findings.Evidence(path, size)
            ours, theirs = (here.group(name).runs for name in ("rwkv", "gemma"))
            for seed in ours.keys() & theirs.keys():
                scored.append(ours[seed].loss < theirs[seed].loss)
                fresh.append(ours[seed].fresh_loss() < theirs[seed].fresh_loss())
    assert (len(scored), sum(scored), sum(fresh)) == (15, 15, 14)


def test_most_intervals_that_are_a_unit_off_are_not(known):
    """Or the test above would say little."""
    off = [f"{float(text[:5]) + 0.001:.3f}{text[5:]}" for text in set(WRITTEN) - OTHERS]
    assert sum(text in known for text in off) < len(off) / 3
