"""
A small loopback imitation of the Hugging Face Hub, for tests that must run without internet.

It serves dataset repositories, so that the real huggingface_hub client runs unmodified in a child process
whose environment points it here:

    with HubServer({"org/name": {"data/000.parquet": b"...", "README.md": b"..."}}) as hub:
        hub.faults.append({"path": r"000\\.parquet$", "truncate": 1000, "times": 2})
        subprocess.run([sys.executable, "script.py"], env=hub.env(), check=True)
        assert hub.faults == []  # every fault happened

The variables must be set before huggingface_hub is imported, hence the child process.
"""
import hashlib
import json
import os
import re
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

# /api/datasets/REPO[/tree/REV[/FOLDER]]
# /datasets/REPO/resolve/REV/FILE
HUB_PATH = re.compile(
    r"(/api)?/datasets/(?P<repo>[^/]+(/[^/]+)??)"
    r"(/(?P<kind>tree|resolve)/(?P<rev>[^/]+)(/(?P<path>.*))?)?"
)


class HubServer:
    """Serves repos {id: {file name: content}} as Hub datasets, and plain {name: content} below /plain/.

    faults may be changed at any time. Each is a dict with "path", a regex that is searched in the decoded
    path without its query, optionally "times" (1) and "method" ("GET"), and one of
        "status": answer with that code
        "truncate": announce the whole body, but hang up after that many bytes
        "flip": change the byte at this place
        "body": answer with these bytes, as a login page in the way would
        "stall": send nothing for so many seconds, or until the server stops; then hang up
    The first that matches applies; it leaves the list once it is used up.
    """

    def __init__(self, repos, plain=None):
        self.repos = {repo: dict(sorted(files.items())) for repo, files in repos.items()}
        self.plain = plain or {}
        self.faults = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def __enter__(self):
        self._home = tempfile.TemporaryDirectory(prefix="hub-home-", ignore_cleanup_errors=True)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()  # from here on connections to url are refused
        self._home.cleanup()

    def env(self):
        """A whole environment for a child process: this one's, with every Hub setting replaced."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": self._home.name}
        env |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        # Xet storage speaks another protocol, and telemetry would show up in requests.
        return env | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def sha(self, repo):
        """The commit id of a repository: 40 hex digits that change just when a name or content does."""
        contents = [(name, _etag(content)) for name, content in self.repos[repo].items()]
        return _etag(json.dumps(contents).encode())[:40]

    def _fault(self, method, path):
        """The fault to inject into the answer to a request ({} for none)."""
        with self._lock:
            for i, fault in enumerate(self.faults):
                if fault.get("method", "GET") == method and re.search(fault["path"], path):
                    left = fault.get("times", 1) - 1
                    # Replaced, not modified: several tests may share the caller's dict.
                    self.faults[i : i + 1] = [{**fault, "times": left}] if left > 0 else []
                    return fault
        return {}


def _etag(content):
    """The content's SHA-256, which the Hub sends for large (LFS) files."""
    return hashlib.sha256(content).hexdigest()


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # the default, 5, stalls clients that open many connections at once

    def handle_error(self, request, client_address):
        """Keeps quiet when a client goes away in mid-answer: tests kill clients on purpose."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        # One request per connection, so that none stays open when the server stops.
        self.close_connection = True
        path = unquote(urlsplit(self.path).path)
        fault = self.server.hub._fault(self.command, path)
        if "stall" in fault:
            self.server.hub._stopped.wait(fault["stall"])
            return
        if "body" in fault:
            status, headers, body = 200, {"Content-Type": "text/html"}, fault["body"]
        elif "status" in fault:
            status, headers, body = fault["status"], {}, b"injected fault"
        else:
            status, headers, body = self._answer(path)
        size = len(body)
        start = 0
        # Ranges of any other form are ignored, which HTTP allows.
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if status == 200 and wanted:
            start = min(int(wanted[1]), size)
            status, part = (206, f"{start}-{size - 1}") if start < size else (416, "*")
            headers["Content-Range"] = f"bytes {part}/{size}"
        headers |= {"Content-Length": str(size - start), "ETag": f'"{_etag(body)}"'}
        headers |= {"Accept-Ranges": "bytes", "Connection": "close"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            sent = bytearray(body)
            if "flip" in fault:
                sent[fault["flip"]] ^= 255
            self.wfile.write(sent[start:][: fault.get("truncate")])

    do_HEAD = do_GET

    def _answer(self, path):
        """(status, headers, body) of the answer to a request that no fault befalls."""
        hub = self.server.hub
        if path.startswith("/plain/") and path[7:] in hub.plain:
            return 200, {}, hub.plain[path[7:]]
        match = HUB_PATH.fullmatch(path)
        # The client chooses its exception type by X-Error-Code.
        if not match or match["repo"] not in hub.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"Repository not found"
        files = hub.repos[match["repo"]]
        sha = hub.sha(match["repo"])
        where = match["path"] or ""
        if match["rev"] not in (None, "main", sha):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"Invalid rev id"
        headers = {"X-Repo-Commit": sha}
        if match["kind"] == "resolve" and where in files:
            return 200, headers, files[where]
        answer = None
        if match["kind"] == "tree":
            answer = _tree(files, where)
        elif match["kind"] is None:
            answer = {"id": match["repo"], "sha": sha, "private": False, "tags": [], "siblings": []}
        if not answer:
            return 404, headers | {"X-Error-Code": "EntryNotFound"}, b"Entry not found"
        return 200, headers | {"Content-Type": "application/json"}, json.dumps(answer).encode()


def _tree(files, folder):
    """Lists a folder in the form of the Hub's tree endpoint; an empty list if there is no such folder."""
    prefix = folder.rstrip("/") + "/" if folder else ""
    entries = {}
    for name, content in files.items():
        if name.startswith(prefix):
            path = prefix + name[len(prefix) :].split("/")[0]
            entries[path] = {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
            if path == name:
                lfs = {"oid": _etag(content), "size": len(content), "pointerSize": 134}
                entries[path] |= {"type": "file", "size": len(content), "lfs": lfs}
    return list(entries.values())
