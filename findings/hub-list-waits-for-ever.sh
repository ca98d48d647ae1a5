#!/usr/bin/env bash
# Guess: huggingface_hub has set_client_factory(), so with a client that has a time-out of two seconds its
#   calls give up on a hub that accepts a connection and never answers.
# What happens: the client's own time-out holds for none of HfApi's calls. Each passes timeout=None to its
#   request, which overrides it, so the call waits for as long as the connection stays open. dataset_info()
#   has a parameter timeout of its own; list_repo_tree(), with which a program begins that downloads a
#   dataset's files, has none. Only a limit around the call (a thread, an alarm) helps there.
# Versions: huggingface_hub 2.4.0 with httpx2 2.16.2, Python 3.11.
# Seen:
#   the client itself: gave up, ReadTimeout
#   dataset_info: still waiting after 10 s
#   dataset_info(timeout=2): gave up, ReadTimeout
#   list_repo_tree: still waiting after 10 s
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q huggingface_hub==2.4.0 httpx2==2.16.2
cat > "$folder/try.py" <<'PYTHON'
import os
import socket
import threading
import time

silent = socket.create_server(("127.0.0.1", 0))  # accepts, and never answers
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{silent.getsockname()[1]}"

import httpx2
from huggingface_hub import HfApi, get_session, set_client_factory

set_client_factory(lambda: httpx2.Client(timeout=2.0))
ADDRESS = os.environ["HF_ENDPOINT"] + "/api/datasets/some/data"
CALLS = {
    "the client itself": lambda: get_session().get(ADDRESS),
    "dataset_info": lambda: HfApi().dataset_info("some/data"),
    "dataset_info(timeout=2)": lambda: HfApi().dataset_info("some/data", timeout=2),
    "list_repo_tree": lambda: list(HfApi().list_repo_tree("some/data", repo_type="dataset")),
}


def outcome(call):
    said = []

    def run():
        try:
            call()
        except Exception as error:
            said.append(f"gave up, {type(error).__name__}")

    threading.Thread(target=run, daemon=True).start()
    end = time.monotonic() + 10
    while not said and time.monotonic() < end:
        time.sleep(0.1)
    return said[0] if said else "still waiting after 10 s"


for name, call in CALLS.items():
    print(f"{name}: {outcome(call)}", flush=True)
os._exit(0)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
the client itself: gave up, ReadTimeout
dataset_info: still waiting after 10 s
dataset_info(timeout=2): gave up, ReadTimeout
list_repo_tree: still waiting after 10 s
SEEN
