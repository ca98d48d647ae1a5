"""
Many runs, one command: trains what is missing of a study.

    python -m tools.study --list                            # what there is
    python -m tools.study architectures --size w0.8M        # run it
    python -m tools.study gpt2-rope --size 0.25M            # with its base
    python -m tools.study ablations --size w0.8M --jobs 2   # two at a time
    python -m tools.study architectures --size 124M --nproc_per_node 8
    python -m tools.study hybrids --dry                     # commands alone

Kill it whenever you like, and run it again: finished runs are kept, the others
resume where they were. A run that fails is named, and the others go on. Each
run is log/STUDY-SIZE-RUN-SEED, what it printed is in report/STUDY/out/, and
each finished one is added to report/STUDY/runs.jsonl, or --collect DIR, which
tools.compare reads. What is in there counts as done, so a study can be
continued on another machine from that one file. --reuse DIR takes those runs
of another study's collection that are to the letter the same: script, options,
seed and data.

--rates and --inits say how far an answer depends on the learning rate and on
the scale of the initial weights: multiples of the size's rate, and of the
initial matrices and embeddings. Each is varied with the other at 1. A run from
scaled weights is an entry of its own, as gpt2-init0.5, and its base is gpt2.

A study is a file of tools/study/studies/, or any file in that form by its
path: NAME.toml has its question and runs, sizes.toml what the sizes mean.
"""
