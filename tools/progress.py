"""
How far a study is: its table, what is left of it, and the screen while it runs.
"""
import os
import statistics
import sys
import time

import torch

from fineweb import duration, say

MOST_COLUMNS = 6  # of losses in the table, which is 80 wide
SECONDS_BETWEEN_ESTIMATES = 600  # where the output is no terminal
# How much of a large matrix product's speed a step reaches, to guess with before anything is measured
EFFICIENCY = 0.4

# ==========================================================================
# What is left


def seconds_per_flop(jobs):
    """Measured over the jobs whose pace is known; None if none is."""
    measured = []
    for job in jobs:
        if job.seconds_per_step:
            measured.append(job.seconds_per_step / (job.flops_per_token * job.config.batch_tokens))
    return statistics.median(measured) if measured else None


def seconds_left(jobs, at_a_time, guess=None):
    """How long the jobs that are to come will take; None if nothing is known.

    A job whose entry has been measured takes as long as that, another one by its FLOPs. guess: seconds
    for a FLOP of a forward pass and its share of the backward pass, where nothing has been measured.
    """
    per_flop = seconds_per_flop(jobs) or guess
    if per_flop is None:
        return None
    paces = {}
    for job in jobs:
        if job.seconds_per_step:
            paces.setdefault(job.row, []).append(job.seconds_per_step)
    left = []
    for job in jobs:
        if job.state in ("to come", "in use", "running"):
            by_flops = per_flop * job.flops_per_token * job.config.batch_tokens
            pace = statistics.median(paces[job.row]) if job.row in paces else by_flops
            left.append(job.seconds(pace))
    return max(sum(left) / at_a_time, max(left, default=0))


def guessed_seconds_per_flop(jobs, args):
    """A guess for this machine by a large matrix product, or by the GPU's data sheet."""
    script = jobs[0].source.module
    if torch.cuda.is_available():
        peak = script.PEAK_FLOPS.get(torch.cuda.get_device_name(0), 100e12) * args.nproc_per_node
        return 3 / (peak * EFFICIENCY)
    n = 1024
    matrix = torch.rand(n, n)
    matrix @ matrix  # the first one also starts the threads
    began = time.perf_counter()
    matrix @ matrix
    rate = 2 * n**3 / (time.perf_counter() - began)
    return 3 * args.jobs / (rate * EFFICIENCY)


# ==========================================================================
# In words


def when(seconds):
    """A time from now, and the clock then: about 3.1h left, until 17:45."""
    ends = time.localtime(time.time() + seconds)
    far = "%a %H:%M" if seconds > 20 * 3600 else "%H:%M"
    return f"about {duration(seconds)} left, until {time.strftime(far, ends)}"


def cell(job):
    """A job's state in at most 8 letters."""
    if job.state == "done":
        return f"{job.loss:.4f}"
    if job.state == "running" or (job.state == "to come" and job.step):
        return f"{100 * job.step // job.config.max_steps}%"
    return {"to come": "–"}.get(job.state, job.state)


def label(rate):
    return "" if rate == 1 else f" x{rate:g}"


def table(jobs):
    """The lines of a table of what each job has come to, a size after the other."""
    lines = []
    for size in dict.fromkeys(job.place["size"] for job in jobs):
        here = [job for job in jobs if job.place["size"] == size]
        rates = list(dict.fromkeys(job.place["rate"] for job in here))
        seeds = list(dict.fromkeys(job.seed for job in here))
        split = len(rates) * len(seeds) > MOST_COLUMNS  # then each rate has rows of its own
        rows = {}
        columns = {}
        for job in here:
            rate = label(job.place["rate"])
            row = job.place["entry"] + (rate if split else "")
            column = f"seed {job.seed}" if split or len(seeds) > 1 else ""
            if not split and len(rates) > 1:
                column = f"{rate.strip() or 'x1'} {column}".replace(" seed ", " s").strip()
            rows.setdefault(row, {})[column or f"seed {job.seed}"] = job
            columns[column or f"seed {job.seed}"] = None
        width = max(len(size), *map(len, rows)) + 1
        if len(columns) > MOST_COLUMNS:
            lines += short_rows(size, rows, width)
            continue
        lines.append(size.ljust(width) + "".join(name.rjust(9) for name in columns))
        for row, cells in rows.items():
            line = row.ljust(width)
            for column in columns:
                line += (cell(cells[column]) if column in cells else "").rjust(9)
            lines.append(line.rstrip())
    return lines


def short_rows(size, rows, width):
    """A table's lines with counts in the place of single runs, where these are too many."""
    states = ("done", "running", "to come", "failed")
    lines = [size.ljust(width) + "".join(state.rjust(9) for state in states) + "mean loss".rjust(11)]
    for row, cells in rows.items():
        jobs = cells.values()
        line = row.ljust(width)
        for state in states:
            line += str(sum(job.state.replace("in use", "to come") == state for job in jobs)).rjust(9)
        losses = [job.loss for job in jobs if job.state == "done"]
        if losses:
            line += f"{statistics.mean(losses):11.4f}"
        lines.append(line)
    return lines


def summary(jobs, at_a_time):
    """How many jobs are done, and when the others will be."""
    done = sum(job.state == "done" for job in jobs)
    failed = sum(job.state == "failed" for job in jobs)
    line = f"{done} of {len(jobs)} runs done"
    if failed:
        line += f", {failed} failed"
    seconds = seconds_left(jobs, at_a_time)
    if seconds:
        line += ", " + when(seconds)
    return line


class Screen:
    """Shows how a study goes on: a table that is drawn anew on a terminal, else a line for each event."""

    def __init__(self, jobs, at_a_time):
        self.jobs = jobs
        self.at_a_time = at_a_time
        self.redraws = sys.stdout.isatty()
        self.drawn = 0  # lines of the table on the screen
        self.next = 0.0 if self.redraws else time.monotonic() + 60

    def event(self, line):
        self.clear()
        say(line)

    def tell(self, child, run):
        """The event that a run has ended."""
        job = child.job
        took = duration(time.monotonic() - child.began)
        if run:
            self.event(f"finished  {job.name}: loss {run.loss:.4f}, {took}")
        elif job.state == "failed":
            self.event(f"failed    {job.name}: {job.why}")
        elif job.state == "to come":
            self.event(f"stopped   {job.name} at step {job.step} of {job.config.max_steps}")
        if run and not self.redraws:
            self.event(summary(self.jobs, self.at_a_time))

    def clear(self):
        if self.drawn:
            sys.stdout.write(f"\x1b[{self.drawn}F\x1b[J")
            self.drawn = 0

    def refresh(self, running):
        """Draws the table, at most once a second; without a terminal a line every ten minutes."""
        if time.monotonic() < self.next:
            return
        lines = []
        for child in running:
            job = child.job
            loss = "" if job.loss is None else f"  loss {job.loss:.3f}"
            lines.append(f"{job.name}  {job.step}/{job.config.max_steps}{loss}")
        lines.append(summary(self.jobs, self.at_a_time))
        if not self.redraws:
            self.next = time.monotonic() + SECONDS_BETWEEN_ESTIMATES
            say("; ".join(lines))
            return
        self.next = time.monotonic() + 1
        columns, rows = os.get_terminal_size()
        whole = table(self.jobs)
        if len(whole) + len(lines) < rows:
            lines = whole + lines
        self.clear()
        for line in lines:
            print(line[: columns - 1])
        sys.stdout.flush()
        self.drawn = len(lines)
