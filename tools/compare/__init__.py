"""
Which model is better, by how much, and is it significant?

    python -m tools.compare log/*    # -> report/leaderboard.md, pictures
    python -m tools.compare results/controls log/mine    # and a collection
    python -m tools.compare results/controls --only rwkv llama    # of these alone
    python -m tools.compare log/mine-? --collect results/mine   # one file
    python -m tools.compare results/b --before results/a   # what a change did

Reads each run's log.jsonl and its predictions, and collections, which
tools.study makes: many runs in one runs.jsonl. Runs of the same script, to the
letter, that differ in the seed only are seeds of one model. Models are ranked
together only if they saw the same tokens in the same windows, were validated
on the same ones, trained by the same recipe and started from the same weights;
the others get a table of their own, with the reason. What a model's own paper
prescribes doesn't set it apart, but is in its row.

Verdicts go by the final validation loss over seeds, in pairs of the same seed,
and are corrected for the number of comparisons. The runs of a study are
compared with their bases as well.
"""
