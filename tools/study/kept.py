"""What is there of a study's runs: in its collection, in log/, in the collections of other studies."""
import dataclasses
import functools
import hashlib
import os
import platform

import numpy as np

import fineweb
from fineweb import fail
from tools.compare import runs


def differing(asked, logged):
    """The names of the options in which a run's config is not what a job's asks for."""
    fixed = {name: value for name, value in vars(asked).items() if name not in runs.VARYING_FIELDS}
    return [name for name, value in fixed.items() if logged.get(name) != value]


def why_other(job, facts, fingerprint, where):
    """Why the run of a job's name is another, in a line that doesn't name it; "" if it is the job's.

    facts: of the run; fingerprint: of the job's data, or None if they aren't here.
    """
    cure = "choose another --collect, or move it away"
    for name in differing(job.config, facts["config"]):
        ours, theirs = getattr(job.config, name), facts["config"].get(name)
        return f"the run of that name in {where} has --{name} {theirs}, but the study asks for {ours}: {cure}"
    if fingerprint and facts["data"]["fingerprint"] not in ("", fingerprint):
        return f"the run in {where} has seen other data than those in {job.config.data_dir}: {cure}"
    return ""


@functools.cache
def bytes_per_token(data_dir, block_size, val_tokens, tokenizer):
    """Bytes of text to a token, of the validation tokens that runs are scored on. <|endoftext|> has none.

    None if the data or the vocabulary aren't here any more: a finished run counts without them.
    """
    try:
        windows = fineweb.Windows(data_dir, "val", block_size, max_tokens=val_tokens)
        encoding = fineweb.get_tokenizer(tokenizer, data_dir)
    except (OSError, SystemExit):
        return None
    ids = windows.rows(np.arange(len(windows)))[:, 1:].ravel()
    text = encoding.decode(ids[ids != encoding.eot_token].tolist())
    return len(text.encode()) / len(ids)


def finished_run(job):
    """The runs.Run of a job that has finished, or None.

    The final loss is logged before the final scores and samples, and the last checkpoint saved after
    them: so a run that was killed between is not finished. If all checkpoints are gone, the log tells.
    """
    try:
        run = runs.read_run(job.folder)
    except runs.Unreadable:
        return None
    if not run.finished or job.last_checkpoint() not in (None, run.steps):
        return None
    # by the machine's name a report knows whose times can be compared; the host's isn't told
    host = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    machine = f"{host}, {os.cpu_count()} cores"
    config = job.config
    data = run.facts["data"]
    ratio = bytes_per_token(config.data_dir, config.block_size, config.val_tokens, data["tokenizer"])
    return dataclasses.replace(run, study=job.place, machine=machine, bytes_per_token=ratio)


def last_start(folder):
    """The facts of a run's last start that trained, or None if there is no log that tells."""
    try:
        return runs.training_starts(*runs.read_log(folder / "log.jsonl"))[-1]
    except (OSError, IndexError):  # a run that was killed at once; --resume decides
        return None


def set_done(job, run):
    job.state = "done"
    job.loss = run.loss
    job.step = job.config.max_steps


def read(collection):
    """{name: Run} of a collection, empty if it isn't there. Raises runs.Unreadable."""
    found = runs.read_collection(collection) if runs.file_of(collection).is_file() else []
    return {run.folder.name: run for run in found}


def look_up(jobs, fingerprints, args):
    """Finds out which jobs are done, and which can't be, and adds to the collection what it lacks.

    fingerprints: of the data folders. Returns the names of those whose script is another text now.
    """
    collected = read(args.collect)
    missing = []
    outdated = []
    for job in jobs:
        run = collected.get(job.name) or finished_run(job)
        facts = run.facts if run else last_start(job.folder)
        job.step = job.last_checkpoint() or 0
        if facts:
            where = args.collect if job.name in collected else "log/"
            job.why = why_other(job, facts, fingerprints[job.config.data_dir], where)
        if job.why:
            job.state = "failed"
        elif run:
            set_done(job, run)
            missing += [run] * (job.name not in collected)
            outdated += [job.name] * (run.script_hash not in (None, job.source.hash))
    if missing and not args.dry:
        runs.add_to_collection(args.collect, missing)
    return outdated


def reuse(jobs, fingerprints, path, args):
    """Takes what jobs to come would only repeat, to the letter, out of another collection. Returns how many.

    They are added to the collection as runs of this study.
    """
    if not runs.file_of(path).is_file():
        fail(f"--reuse {path}: is no collection")
    taken = []
    others = read(path).values()
    for job in jobs:
        if job.state != "to come" or job.folder.exists():
            continue
        data = fingerprints[job.config.data_dir]
        for run in others:
            same = run.seed == job.config.seed and run.script_hash == job.source.hash and not run.changed
            if same and run.facts["data"]["fingerprint"] == data and not differing(job.config, run.config):
                taken.append(dataclasses.replace(run, folder=job.folder, study=job.place))
                set_done(job, run)
                break
    if taken and not args.dry:
        runs.add_to_collection(args.collect, taken)
    return len(taken)
