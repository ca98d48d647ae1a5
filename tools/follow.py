"""
A run's curves in TensorBoard, while it goes and after it.

    python -m tools.follow log/gpt2    # until Ctrl-C; and in another terminal
    tensorboard --logdir log

Adds what is logged to TensorBoard's event files in the run's folder. What a
resumed run did again takes the place of what it had done before.
"""
import contextlib
import dataclasses
import json
import time
from pathlib import Path

from tyro.conf import Positional

import fineweb
from tools.common import parse


@dataclasses.dataclass
class Args:
    runs: Positional[tuple[Path, ...]]  # their folders


def scalars(event, batch_tokens):
    """{tag: value} of an event of a log."""
    kind = event.get("event")
    if kind == "train":
        figures = {f"train/{name}": event[name] for name in ("loss", "lr", "norm")}
        return figures | {"train/tokens per second": 1000 * batch_tokens / event["ms"]}
    if kind == "score":
        name = f"{event['task']} {event['convention']}"
        return {f"{name}/{figure}": event[figure] for figure in ("acc", "acc_norm")}
    return {"validation/loss": event["loss"]} if kind == "val" else {}


def follow(folder, SummaryWriter):
    """A generator that at each step writes what a run's log has got since."""
    with fineweb.one_line(f"{folder} has no log that can be read"):
        log = open(folder / "log.jsonl", "rb")
    rest, writer, last = b"", None, {}  # last: tag -> its last step
    while True:
        *lines, rest = (rest + log.read()).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):  # half a line of a killed run
                event = json.loads(line)
                # an --eval, perhaps beside the training, is of steps that are there
                if event["event"] == "run" and not event["config"]["eval"]:
                    first = event["first_step"]
                    batch_tokens = event["config"]["batch_tokens"]
                    if writer:
                        writer.close()
                    writer = SummaryWriter(folder, purge_step=first)  # hides what there is from this step on
                    last = {tag: min(step, first - 1) for tag, step in last.items()}
                for tag, value in scalars(event, batch_tokens).items() if writer else ():
                    if value is not None and event["step"] > last.get(tag, -1):
                        writer.add_scalar(tag, value, event["step"])
                        last[tag] = event["step"]
        if writer:
            writer.flush()
        yield


def main():
    args = parse(Args, "tools.follow", __doc__)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        fineweb.fail("this needs TensorBoard: pip install tensorboard")
    runs = [follow(folder, SummaryWriter) for folder in args.runs]
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            for run in runs:
                next(run)
            time.sleep(2)


if __name__ == "__main__":
    main()
