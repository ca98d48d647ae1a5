"""The README's answers: numbers out of made-up runs, and words that these contradict."""
import json
import statistics

import pytest
from conftest import ROOT
from test_documents import scores
from test_effects import make_entry, make_run, rows, with_fresh
from test_scaling import SIZES, make_sizes

from tools import documents, findings, scaling, verdicts

GPT2 = [3.0, 3.1, 3.05]
ROPE = [2.0, 2.12, 2.03]
DEFAULTS = {"sizes": '["0.8M"]', "later": '"who knows."'}


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """made_up(answer, runs, **fields) -> the findings of one answer, whose collection has these runs.

    runs may be {study: its runs}, where an answer takes more than one collection.
    """

    def made_up(answer, runs, verdicts=(), where="results/x", **fields):
        read = (lambda path: runs[path.name]) if isinstance(runs, dict) else (lambda path: runs)
        monkeypatch.setattr(findings.collection, "read", read)
        file = tmp_path / "findings.toml"
        lines = ['[[finding]]', 'topic = "seven"', 'question = "Is it?"']
        lines.append(f'runs = "{where}"')
        lines.append(f'answer = "{answer}"')
        lines += [f"{name} = {value}" for name, value in (DEFAULTS | fields).items()]
        lines.append("[finding.verdicts]")
        lines += [f'"{place}" = "{verdict}"' for place, verdict in dict(verdicts).items()]
        file.write_text("\n".join(lines))
        return findings.findings(file=file)

    return made_up


def pair(**options):
    return make_entry("gpt2", GPT2, base=None) + make_entry("gpt2-rope", ROPE, **options)


def test_numbers_are_filled_in(made_up):
    facts = {"parameters": 720_000, "active_parameters": 600_000, "flops_per_token": 1.76e6}
    answer = "{gpt2-rope}, {gpt2-rope - gpt2}, {gpt2-rope - gpt2, in %}, {gpt2-rope / gpt2, flops}, "
    answer += "{gpt2-rope / gpt2, parameters}, {gpt2-rope / gpt2, active}, {gpt2-rope / gpt2, tokens/s}"
    said = made_up(answer, pair(facts=facts, ms=200.0), {"gpt2-rope - gpt2": "better"})
    differences = [ours - theirs for ours, theirs in zip(ROPE, GPT2, strict=True)]
    half = 4.30265 * statistics.stdev(differences) / 3**0.5  # t with two degrees of freedom
    mean = statistics.mean(differences)
    wanted = f"**Is it?** {statistics.mean(ROPE):.3f} ± {verdicts.half_interval(ROPE):.3f}, "
    wanted += f"{mean:+.3f} ± {half:.3f}, "
    wanted += f"{100 * mean / 3.05:+.1f} ± {100 * half / 3.05:.1f}%, 1.10, 0.90, 0.75, 0.50 "
    wanted += "(three seeds at 0.8M, 0.4M bytes each: `python -m tools.compare results/x`) "
    assert said == wanted + "*At full size:* who knows.\n"


def test_the_seeds_are_those_of_the_entries_in_the_answer(made_up):
    more = make_entry("gpt2-nope", [3.3, 3.4])
    assert "(three seeds at 0.8M" in made_up("{gpt2-rope}", pair() + more)
    assert "(two to three seeds at 0.8M" in made_up("{gpt2-nope} and {gpt2}", pair() + more)
    assert "(two to three seeds at 0.8M" in made_up("No numbers.", pair() + more)


def test_differences_before_the_end_and_parts_of_others(made_up):
    nope = [3.3, 3.36, 3.34]
    runs = pair() + make_entry("gpt2-nope", nope)
    said = made_up("{gpt2-rope - gpt2, after step 100}", runs)  # where a made-up loss is halfway from 5.5
    halved = [(ours - theirs) / 2 for ours, theirs in zip(ROPE, GPT2, strict=True)]
    assert f"** {statistics.mean(halved):+.3f} ± {verdicts.half_interval(halved):.3f} (" in said
    share = (statistics.mean(nope) - 3.05) / (statistics.mean(ROPE) - 3.05)
    said = made_up("{gpt2-nope - gpt2, as part of gpt2-rope - gpt2}", runs)
    assert f"** {100 * share:.0f}% (" in said and share < 0
    for step in ("150", "ten"):
        with pytest.raises(SystemExit, match=f"gpt2-rope has no validation loss at step {step}"):
            made_up(f"{{gpt2-rope - gpt2, after step {step}}}", runs)


def test_differences_on_fresh_text(made_up):
    """Where the validation has gpt2-rope a nat ahead, the fresh text has it behind, as among all pairs."""
    runs = with_fresh("gpt2", GPT2, [2.0, 2.1, 2.2], base=None)
    runs += with_fresh("gpt2-rope", ROPE, [2.1, 2.201, 2.3], base=None)
    known = {"gpt2-rope - gpt2": "better", "gpt2-rope - gpt2, on fresh text": "worse"}
    answer = "{gpt2-rope - gpt2}, {gpt2, on fresh text}, {gpt2-rope - gpt2, on fresh text}"
    said = made_up(answer, runs, known)
    assert "** -1.000 ± 0.050, 2.100 ± 0.248, +0.100 ± 0.001 (" in said
    later = {"gpt2-rope - gpt2, on fresh text at 0.8M": "worse"}
    assert "+0.100" in made_up("{gpt2-rope - gpt2, on fresh text at 0.8M}", runs, later)
    with pytest.raises(SystemExit, match="gpt2-rope - gpt2, on fresh text is worse by the runs"):
        made_up("{gpt2-rope - gpt2, on fresh text}", runs, {"gpt2-rope - gpt2, on fresh text": "better"})
    with pytest.raises(SystemExit, match="at 0.8M: the runs are too short for a loss on fresh text"):
        made_up("{gpt2-rope, on fresh text}", pair())


def test_a_verdict_that_fresh_text_does_not_bear_out_has_to_say_so(made_up, monkeypatch, tmp_path):
    runs = with_fresh("gpt2", GPT2, [2.0, 2.1, 2.2], base=None)
    runs += with_fresh("gpt2-rope", ROPE, [1.9, 2.3, 2.2])
    runs += with_fresh("gpt2-nope", ROPE, [1.9, 2.001, 2.1])
    known = {"gpt2-rope - gpt2": "better", "gpt2-nope - gpt2": "better"}
    assert "-1.000" in made_up("{gpt2-nope - gpt2}", runs, known)
    words = "gpt2-rope - gpt2 is better, which fresh text doesn't bear out: tell {gpt2-rope - gpt2, on fre"
    with pytest.raises(SystemExit, match=words):
        made_up("{gpt2-rope - gpt2}", runs, known)
    with pytest.raises(SystemExit, match="tell {gpt2-rope - gpt2, on fresh text at 0.8M}, too"):
        made_up("{gpt2-rope - gpt2 at 0.8M}", runs, {"gpt2-rope - gpt2 at 0.8M": "better"})
    told = known | {"gpt2-rope - gpt2, on fresh text": "not distinguishable"}
    said = made_up("{gpt2-rope - gpt2}, {gpt2-rope - gpt2, on fresh text}", runs, told)
    assert "** -1.000 ± 0.050, +0.033 ± " in said
    monkeypatch.setattr(findings, "FILE", tmp_path / "findings.toml")  # the one that made_up writes
    assert "** 1 of 2 (" in made_up("{borne out}", runs, told)


def test_differences_by_documents(made_up, monkeypatch, tmp_path):
    """On four documents of one length, in whatever order."""
    models = {}
    for name, loss in {"x-0.8M-gpt2": 3.0, "x-0.8M-gpt2-rope": 2.0, "x-0.8M-gpt2-rope-x2": 2.5}.items():
        models[name] = {seed: [loss - 0.01 * seed * len(name), loss + 0.03, loss, loss] for seed in (1, 2, 3)}
    monkeypatch.setattr(findings, "ROOT", tmp_path)
    file = tmp_path / "results/x/documents-0.8M.json"
    documents.write(file, scores(models, [10, 10, 10, 10]))
    runs = pair() + make_entry("gpt2-rope", ROPE, rate=2.0)
    answer = "{gpt2-rope - gpt2, by documents}, {gpt2 - gpt2-rope, by documents}"
    known = {"gpt2-rope - gpt2, by documents": "better", "gpt2 - gpt2-rope, by documents": "worse"}
    said = made_up(answer, runs, known)
    kept = documents.read(file)
    (same,) = [each for each in documents.compare(kept) if (each.a[-4:], each.b[-4:]) == ("rope", "gpt2")]
    assert same.difference == pytest.approx(-1.0 - 0.02 * 5 / 4)
    half = findings.with_half(same.difference, same.both.half).split(" ± ")[1]
    assert f"** {same.difference:+.3f} ± {half}, {-same.difference:+.3f} ± {half} (" in said
    key = "gpt2-rope x2 - gpt2, by documents at 0.8M"
    assert "-0.5" in made_up("{gpt2-rope x2 - gpt2, by documents at 0.8M}", runs, {key: "better"})
    with pytest.raises(SystemExit, match="gpt2-rope - gpt2, by documents is better by the runs in results/x"):
        made_up("{gpt2-rope - gpt2, by documents}", runs)
    more = runs + make_entry("gpt2-nope", ROPE)
    with pytest.raises(SystemExit, match="documents-0.8M.json has no runs of gpt2-nope and gpt2"):
        made_up("{gpt2-nope - gpt2, by documents}", more)


def test_rates_on_fresh_text_are_those_that_the_validation_chose(made_up):
    runs = with_fresh("gpt2", GPT2, [2.0, 2.1, 2.2], base=None)
    runs += with_fresh("gpt2", [2.9, 3.0, 2.95], [3.0, 3.1, 3.2], base=None, rate=2.0)
    said = made_up("{gpt2, on fresh text} and {gpt2 x2, on fresh text}", runs, own_rate="true")
    assert "** 3.100 ± 0.248 and 3.100 ± 0.248 (" in said


def test_what_may_change_it_may_have_numbers(made_up):
    said = made_up("Yes.", pair(), later='"{gpt2-rope - gpt2, after step 100} was it."')
    assert "*At full size:* -0.500 ± 0.025 was it.\n" in said


def test_times_of_two_machines_are_not_compared(made_up):
    runs = pair()
    for run in runs[:3]:
        run.machine = "another"
    with pytest.raises(SystemExit, match="gpt2-rope and gpt2 weren't timed on one machine"):
        made_up("{gpt2-rope / gpt2, tokens/s}", runs)


def test_words_that_the_runs_contradict_are_refused(made_up):
    for given in ({"gpt2-rope - gpt2": "worse"}, {"gpt2-rope - gpt2": "not distinguishable"}, {}):
        with pytest.raises(SystemExit, match="gpt2-rope - gpt2 is better by the runs in results/x at 0.8M"):
            made_up("{gpt2-rope - gpt2}", pair(), given)
    one = make_entry("gpt2", GPT2[:1], base=None) + make_entry("gpt2-rope", ROPE[:1])
    with pytest.raises(SystemExit, match="is one seed: no verdict by the runs"):
        made_up("{gpt2-rope - gpt2}", one, {"gpt2-rope - gpt2": "better"})
    with pytest.raises(SystemExit, match="is unequal conditions: no verdict by the runs"):
        made_up("{gpt2-rope - gpt2}", pair(steps=100), {"gpt2-rope - gpt2": "better"})


@pytest.mark.parametrize("answer, words", [
    ("{llama}", "results/x at 0.8M has no run of llama"),
    ("{gpt2 x4}", "results/x at 0.8M has no run of gpt2 x4"),
    ("{gpt2 at 2.7M}", "this answer has no size 2.7M"),
    ("{gpt2-rope / gpt2, memory}", "no ratio of memory: flops, parameters, active or tokens/s"),
])  # fmt: skip
def test_a_place_that_says_nothing_is_one_line(made_up, answer, words):
    with pytest.raises(SystemExit) as reason:
        made_up(answer, pair())
    assert words in str(reason.value) and "\n" not in str(reason.value)


def test_a_size_without_runs_is_one_line(made_up):
    with pytest.raises(SystemExit, match="results/x at 2.7M: there is no run"):
        made_up("{gpt2}", pair(), sizes='["2.7M"]')


def test_several_sizes(made_up):
    small = make_entry("gpt2", [4.0, 4.1, 4.05], base=None, size="0.25M")
    small += make_entry("gpt2-rope", [4.2, 4.0, 4.1], size="0.25M")
    told = {"gpt2-rope - gpt2": "not distinguishable", "gpt2-rope - gpt2 at 0.8M": "better"}
    answer = "{gpt2}, {gpt2 at 0.8M}, {gpt2-rope - gpt2}, {gpt2-rope - gpt2 at 0.8M}"
    said = made_up(answer, small + pair(), told, sizes='["0.25M", "0.8M"]')
    assert "** 4.050 ± 0.124, 3.050 ± 0.124, +0.050 ± " in said
    assert "(three seeds at 0.25M, three seeds at 0.8M, 0.4M bytes each: " in said
    fewer = make_entry("gpt2", [4.0, 4.1, 4.05], base=None, size="0.25M", steps=100)
    said = made_up("{gpt2}, {gpt2 at 0.8M}", fewer + pair(), sizes='["0.25M", "0.8M"]')
    assert "(three seeds at 0.25M, 0.2M bytes each; three seeds at 0.8M, 0.4M bytes each: " in said


def test_a_power_law_and_what_it_says_of_full_size(made_up):
    """loss = 6 parameters^-0.08, but for seeds that differ by +0.004, -0.005 and 0.001."""
    runs = make_sizes("gpt2", 6.0, 0.08, base=None)
    three = '["0.25M", "0.8M", "2.7M"]'
    said = made_up("{extrapolated gpt2}; {extrapolated gpt2, by residuals}", runs, sizes=three)
    losses = [[run.loss for run in runs if run.study["size"] == size] for size in SIZES]
    law = scaling.fit(list(SIZES.values()), losses)
    loss = f"{6 * scaling.TARGET**-0.08:.3f}"
    low, high = law.between(scaling.TARGET)
    assert f"** {loss} ({low:.3f} to {high:.3f}); {loss} to {loss} (" in said
    assert low < float(loss) < high
    with pytest.raises(SystemExit, match="a power law needs 3 sizes"):
        made_up("{extrapolated gpt2}", runs, sizes='["0.25M", "0.8M"]')
    for wrong in ("llama", "gpt2, by residual"):
        with pytest.raises(SystemExit, match=f"results/x at 0.25M has no run of {wrong}"):
            made_up(f"{{extrapolated {wrong}}}", runs, sizes=three)


def test_learning_rates(made_up):
    runs = pair() + make_entry("gpt2", [2.5, 2.61, 2.54], base=None, rate=4.0)
    said = made_up("{gpt2 x4 - gpt2}", runs, {"gpt2 x4 - gpt2": "better"})
    assert "** -0.500 ± 0.025 (" in said
    said = made_up("{gpt2}, {gpt2-rope - gpt2}", runs, {"gpt2-rope - gpt2": "better"}, own_rate="true")
    assert "** 2.550 ± 0.138, -0.500 ± " in said  # the best rate of GPT-2
    with pytest.raises(SystemExit, match="gpt2 is compared with rate 1 only"):
        made_up("{gpt2 - gpt2 x4}", runs)


def test_two_that_are_no_bases_are_judged_among_all_pairs(made_up):
    """By the pairs' own p-value they differ at 5%, but not after a correction for all pairs."""
    near = [1.99, 2.10, 2.01]
    runs = pair() + make_entry("gpt2-relu2", near) + make_entry("gpt2-nobias", [2.02, 2.08, 2.05])
    assert verdicts.compare_losses(dict(enumerate(near)), dict(enumerate(ROPE))).p < 0.05
    place = "gpt2-relu2 - gpt2-rope"
    said = made_up(f"{{{place}}}", runs, {place: "not distinguishable"})
    assert "** -0.017 ± 0.014 (" in said
    far = made_up(f"{{{place}}}", pair() + make_entry("gpt2-relu2", [1.0, 1.1, 1.04]), {place: "better"})
    assert "** -1.003 ± " in far


# ----------------------------------------------------------------------------------------------------------


def budgets(entry, b, flops=1.6e6, ms=100.0, at_end=2.0, shifts=(0.0, 0.01, -0.02)):
    """Runs of an entry with 200 and with 800 steps, whose losses follow tokens^-b, and 8 for its pace."""
    found = {}
    for study, steps in (("rates", 200), ("architectures", 800), ("pace", 8)):
        losses = [(at_end + shift) * (steps / 800) ** -b for shift in shifts]
        base = None if entry == "gpt2" else "gpt2"
        found[study] = make_entry(entry, losses, base=base, study=study, steps=steps, size="0.25M",
                                  facts={"flops_per_token": flops},
                                  ms=ms if study == "pace" else 300.0)  # fmt: skip
    return found


def by_study(*entries):
    runs = {"architectures": [], "rates": [], "pace": []}
    for entry in entries:
        for study, of_study in entry.items():
            runs[study] += of_study
    return runs


def ranked(monkeypatch, *entries, more=()):
    runs = by_study(*entries)
    runs["architectures"] += more
    monkeypatch.setattr(findings.collection, "read", lambda path: runs[path.name])
    return findings.ranking()


def test_the_ranking_has_the_losses_at_equal_cost(monkeypatch):
    slow = budgets("rwkv", 0.1, flops=2.0e6, ms=250.0, at_end=1.9)
    said = ranked(monkeypatch, budgets("gpt2", 0.2), slow)
    made = rows(said)
    assert made["architecture"] == ["loss at 0.25M", "x gpt2's FLOPs per token", "x gpt2's tokens/s",
                                    "0.25M at gpt2's FLOPs", "0.25M in gpt2's time"]  # fmt: skip
    assert list(made)[2:] == ["rwkv", "gpt2"]  # by loss
    half = verdicts.half_interval([1.9, 1.91, 1.88])
    level = statistics.mean([1.9, 1.91, 1.88])
    assert made["rwkv"] == [
        f"{level:.3f} ± {half:.3f}", "1.25", "0.40",
        f"{level * 0.8**-0.1:.3f} ± {half * 0.8**-0.1:.3f}",
        f"{level * 0.4**-0.1:.3f} ± {half * 0.4**-0.1:.3f}",
    ]  # fmt: skip
    assert made["gpt2"][1:] == ["1.00", "1.00", made["gpt2"][0], made["gpt2"][0]]


def test_losses_at_equal_cost_in_an_answer(made_up):
    slow = budgets("rwkv", 0.1, flops=2.0e6, ms=250.0, at_end=1.9)
    runs = by_study(budgets("gpt2", 0.2), slow)
    fields = {"sizes": '["0.25M"]', "where": "results/architectures"}
    said = made_up("{rwkv, with gpt2's FLOPs} {rwkv - gpt2, in gpt2's time at 0.25M}", runs, **fields)
    losses = [1.9, 1.91, 1.88]
    alone = f"{statistics.mean(losses) * 0.8**-0.1:.3f} ± {verdicts.half_interval(losses) * 0.8**-0.1:.3f}"
    pairs = zip(losses, [2.0, 2.01, 1.98], strict=True)
    behind = [ours * 0.4**-0.1 - theirs for ours, theirs in pairs]
    assert f"{alone} {statistics.mean(behind):+.3f} ± {verdicts.half_interval(behind):.3f} (" in said
    untimed = by_study(budgets("gpt2", 0.2), slow | {"pace": []})
    with pytest.raises(SystemExit, match="loss of rwkv at gpt2's time can't be told"):
        made_up("{rwkv, in gpt2's time}", untimed, **fields)
    with pytest.raises(SystemExit, match="results/architectures at 0.25M has no run of llama"):
        made_up("{llama, in gpt2's time}", runs, **fields)
    faster = budgets("rwkv", 0.1)["architectures"]
    for each in faster:
        each.study["rate"] = 2.0  # and none with fewer tokens has it
    swept = by_study(budgets("gpt2", 0.2), slow, {"architectures": faster})
    with pytest.raises(SystemExit, match="loss of rwkv x2 at gpt2's FLOPs can't be told"):
        made_up("{rwkv x2, with gpt2's FLOPs}", swept, **fields)


def test_no_loss_at_the_time_of_another_machine(monkeypatch):
    slow = budgets("rwkv", 0.1, flops=2.0e6, ms=250.0, at_end=1.9)
    for run in slow["pace"]:
        run.machine = "another"
    unpaced = budgets("llama", 0.1) | {"pace": []}
    made = rows(ranked(monkeypatch, budgets("gpt2", 0.2), slow, unpaced))
    assert made["rwkv"][1:3] == ["1.25", "–"] and made["rwkv"][-1] == "–" != made["rwkv"][-2]
    assert made["llama"][1:3] == ["1.00", "–"] and made["llama"][-1] == "–" != made["llama"][-2]


def test_no_loss_is_read_off_far_from_what_was_run(monkeypatch):
    """A sixth of the tokens is within half as much again as the quarter that was run; a seventh isn't."""
    sixth = budgets("rwkv", 0.1, ms=600.0)
    seventh = budgets("mta", 0.1, ms=700.0)
    fast = budgets("llama", 0.1, ms=60.0)
    made = rows(ranked(monkeypatch, budgets("gpt2", 0.2), sixth, seventh, fast))
    assert made["rwkv"][-1].startswith(f"{statistics.mean([2.0, 2.01, 1.98]) * 6**0.1:.3f} ± ")
    assert made["mta"][-1] == "–" and made["mta"][-2] != "–"
    assert made["llama"][-1] == "–" and made["llama"][-2] != "–"
    alone = {"architectures": budgets("mta", 0.1)["architectures"]}  # with no run of fewer tokens
    assert rows(ranked(monkeypatch, budgets("gpt2", 0.2), alone))["mta"][-2:] == ["–", "–"]


def write_tables(tmp_path, monkeypatch, **options):
    """results/ngram.json about the made-up runs, but for these options."""
    monkeypatch.setattr(findings, "TABLES", tmp_path / "ngram.json")
    options = {"steps": 800, "batch_tokens": 2048, "block_size": 256, "val_tokens": 4096} | options
    kept = {"data": "f", "options": options, "losses": [3.0, 2.5, 1.95], "entries": [9, 1200, 3_400_000]}
    (tmp_path / "ngram.json").write_text(json.dumps(kept))


def test_tables_stand_between_the_architectures(monkeypatch, tmp_path):
    write_tables(tmp_path, monkeypatch)
    entries = budgets("gpt2", 0.2), budgets("rwkv", 0.1, at_end=1.9)
    made = rows(ranked(monkeypatch, *entries))
    two, three = "*2-gram table, 1.2k entries*", "*3-gram table, 3.4M entries*"
    assert list(made)[2:] == ["rwkv", three, "gpt2", two]
    assert made[three] == ["1.950", "–", "–", "–", "–"]
    for other in ({"steps": 400}, {"block_size": 128}, {"val_tokens": 2048}):  # on what these runs didn't see
        write_tables(tmp_path, monkeypatch, **other)
        assert "table" not in ranked(monkeypatch, *entries)
    (tmp_path / "ngram.json").write_text("{")
    with pytest.raises(SystemExit, match="ngram.json can't be read: "):
        ranked(monkeypatch, *entries)


def test_a_table_in_an_answer(made_up, monkeypatch, tmp_path):
    write_tables(tmp_path, monkeypatch, steps=200)
    assert "** 2.500, 1.2k (three seeds" in made_up("{table of 2}, {table of 2, entries}", pair())
    for answer in ("{table of 4}", "{table of two}", "{table of }"):
        with pytest.raises(SystemExit, match="ngram.json has no such table on what results/x at 0.8M saw"):
            made_up(answer, pair())


def test_what_is_lost_with_less_context(made_up, monkeypatch, tmp_path):
    monkeypatch.setattr(findings, "CONTEXTS", tmp_path / "context.json")
    kept = []
    # the last is of other runs
    for name, lost in (("gpt2-1", 0.02), ("gpt2-rope-2", 0.0304), ("llama-1", 0.9)):
        lengths = {"lengths": [2, 4, 8], "lost": [[0.5, 0.1], [lost, 0.1], [0.0, 0.0]]}
        kept.append({"run": f"ablations-0.8M-{name}"} | lengths)
    (tmp_path / "context.json").write_text(json.dumps(kept))
    assert "** 0.020 to 0.030 (three" in made_up("{lost with 4}", pair())
    with pytest.raises(SystemExit, match="context.json can't be read, or has no length 16"):
        made_up("{lost with 16}", pair())
    with pytest.raises(SystemExit, match="context.json has no run of results/x at 0.8M"):
        made_up("{lost with 4}", make_entry("gemma", GPT2, base=None))


def test_the_ranking_goes_by_the_largest_size_that_all_have(monkeypatch):
    more = make_entry("gpt2", [1.5, 1.5, 1.6], base=None, study="architectures", size="0.8M")
    own = make_entry("rwkv", [1.8, 1.8, 1.9], study="architectures", size="0.25M", rate=2.0, steps=800)
    made = rows(ranked(monkeypatch, budgets("gpt2", 0.2), budgets("rwkv", 0.1, at_end=1.9), more=more + own))
    assert made["architecture"][:3] == ["loss at 0.25M", "0.25M, own rate", "loss at 0.8M"]
    assert list(made)[2:] == ["rwkv", "gpt2"]
    assert made["rwkv"][1].endswith(" at x2") and made["rwkv"][2] == "–"
    assert made["gpt2"][1].endswith(" at x1")


def test_the_file_that_is_here_holds():
    """Words and runs of today go together."""
    said = findings.findings()
    assert said.count("*At full size:*") == said.count("`python -m tools.compare results/") >= 1
    assert "{" not in said
    assert (ROOT / "results/findings.toml").read_text().count("[[finding]]") == said.count("**") / 2
    topics = [findings.findings(topic) for topic in ("seven", "hybrids", "changes")]
    assert "\n".join(topics) == said and all(topics)


def test_a_run_of_no_study_is_no_evidence(monkeypatch):
    runs = [make_run("gpt2", 3.0, base=None)]
    runs[0].study = None
    monkeypatch.setattr(findings.collection, "read", lambda path: runs)
    with pytest.raises(SystemExit, match="there is no run"):
        findings.Evidence("results/x", "0.8M")


def test_a_narrow_interval_is_not_rounded_to_nothing():
    assert findings.with_half(0.02806, 0.00047) == "0.0281 ± 0.0005"
    assert findings.with_half(0.02806, 0.0012, sign="+") == "+0.028 ± 0.001"
    assert findings.with_half(1.5, 0.0) == "1.500 ± 0.000"
    assert findings.with_half(1.5, None) == "1.500"
