"""
A small loopback imitation of the Hugging Face Hub, for tests that must run without internet.

It serves dataset repositories kept in memory or on disk, so that the real huggingface_hub client runs
unmodified in a child process whose environment points it here:

    with HubServer({"org/name": {"data/000.parquet": path, "README.md": b"..."}}) as hub:
        hub.faults.append({"path": r"000\\.parquet$", "truncate": 1000, "times": 2})
        subprocess.run([sys.executable, "script.py"], env=hub.env(), check=True)
        assert hub.faults == []  # every fault happened

The variables must be set before huggingface_hub is imported, hence the child process.
"""
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# /api/datasets/REPO[/revision/REV]
# /api/datasets/REPO/tree/REV[/FOLDER]
# /datasets/REPO/resolve/REV/FILE
HUB_PATH = re.compile(
    r"(/api)?/datasets/(?P<repo>[^/]+(/[^/]+)??)"
    r"(/(?P<kind>revision|tree|resolve)/(?P<rev>[^/]+)(/(?P<path>.*))?)?"
)
CHUNK = 1 << 18


class HubServer:
    """Serves repos {id: {file name: content}} as Hub datasets, and plain {name: content} below /plain/.

    requests lists the (method, path) of every request so far; paths are percent-decoded and without
    their query.

    faults may be changed at any time. Each is a dict with "path", a regex that is searched in that
    decoded path, optionally "times" (1; float("inf") for ever) and "method" ("GET"), and one of
        "status": answer with that code
        "truncate": announce the whole body, but hang up after that many bytes
        "drop": True: hang up without an answer
        "flip": change the byte at this place
        "body": answer with these bytes, as a login page in the way would
        "stall": send nothing for so many seconds, or until the server stops; then hang up
    The first that matches applies; it leaves the list once it is used up.
    """

    def __init__(self, repos, plain=None):
        self.repos = {}
        for repo, files in repos.items():
            self.repos[repo] = {name: _File(files[name]) for name in sorted(files)}
        self.plain = {name: _File(content) for name, content in (plain or {}).items()}
        self.requests = []
        self.faults = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def __enter__(self):
        self._home = tempfile.TemporaryDirectory(prefix="hub-home-", ignore_cleanup_errors=True)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        serve = self._server.serve_forever
        self._thread = threading.Thread(target=serve, args=(0.02,), daemon=True)
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
        env = {}
        for name, value in os.environ.items():
            if not name.startswith(("HF_", "HUGGING")):
                env[name] = value
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": self._home.name}
        env |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        # Xet storage speaks another protocol, and telemetry would show up in requests.
        return env | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def sha(self, repo):
        """The commit id of a repository: 40 hex digits that change just when a name or content does."""
        contents = [(name, file.etag) for name, file in self.repos[repo].items()]
        return _sha1(json.dumps(contents))

    def _record(self, method, path):
        """Notes a request and returns the fault to inject into the answer ({} for none)."""
        with self._lock:
            self.requests.append((method, path))
            for i, fault in enumerate(self.faults):
                if fault.get("method", "GET") == method and re.search(fault["path"], path):
                    left = fault.get("times", 1) - 1
                    # Replaced, not modified: several tests may share the caller's dict.
                    self.faults[i : i + 1] = [{**fault, "times": left}] if left > 0 else []
                    return fault
        return {}


class _File:
    """Something to serve. etag: the content's SHA-256, which the Hub sends for large (LFS) files."""

    def __init__(self, content):
        self.content = content  # bytes, or a path
        self.size = 0
        digest = hashlib.sha256()
        with self.open() as f:
            while chunk := f.read(CHUNK):
                digest.update(chunk)
                self.size += len(chunk)
        self.etag = digest.hexdigest()

    def open(self):
        if isinstance(self.content, bytes):
            return io.BytesIO(self.content)
        return open(self.content, "rb")


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
        url = urlsplit(self.path)
        path = unquote(url.path)
        fault = self.server.hub._record(self.command, path)
        if "stall" in fault:
            self.server.hub._stopped.wait(fault["stall"])
        if fault.get("drop") or "stall" in fault:
            return
        if "body" in fault:
            status = 200
            headers = {"Content-Type": "text/html"}
            body = fault["body"]
        elif "status" in fault:
            status = fault["status"]
            headers = {"X-Error-Message": "injected fault"}
            body = b"injected fault"
        else:
            status, headers, body = self._answer(path, parse_qs(url.query))
        file = body if isinstance(body, _File) else _File(body)
        start = 0
        end = file.size
        # Ranges of any other form are ignored, which HTTP allows.
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if status == 200 and wanted:
            start = min(int(wanted[1]), file.size)
            end = min(int(wanted[2] or file.size) + 1, file.size)
            if start < end:
                status = 206
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
            else:
                status = 416
                headers["Content-Range"] = f"bytes */{file.size}"
        headers["Content-Length"] = str(end - start)
        headers["ETag"] = f'"{file.etag}"'
        headers["Accept-Ranges"] = "bytes"
        headers["Connection"] = "close"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self._send(file, start, min(end - start, fault.get("truncate", end)), fault.get("flip"))

    do_HEAD = do_GET

    def _send(self, file, start, n_bytes, flip=None):
        with file.open() as f:
            f.seek(start)
            while n_bytes > 0 and (chunk := f.read(min(n_bytes, CHUNK))):
                if flip is not None and start <= flip < start + len(chunk):
                    chunk = bytearray(chunk)
                    chunk[flip - start] ^= 255
                self.wfile.write(chunk)
                start += len(chunk)
                n_bytes -= len(chunk)

    def _answer(self, path, query):
        """(status, headers, body) of the answer to a request that no fault befalls."""
        hub = self.server.hub
        binary = {"Content-Type": "application/octet-stream"}
        if path.startswith("/plain/") and path[7:] in hub.plain:
            return 200, binary, hub.plain[path[7:]]
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
            return 200, headers | binary, files[where]
        answer = None
        if match["kind"] == "tree":
            answer = _tree(files, where, query.get("recursive") == ["true"])
        elif match["kind"] in (None, "revision"):
            siblings = [{"rfilename": name} for name in files]
            answer = {"id": match["repo"], "sha": sha, "private": False, "tags": []}
            answer["siblings"] = siblings
        if not answer:
            return 404, headers | {"X-Error-Code": "EntryNotFound"}, b"Entry not found"
        return 200, headers | {"Content-Type": "application/json"}, json.dumps(answer).encode()


def _tree(files, folder, recursive):
    """Lists a folder in the form of the Hub's tree endpoint; an empty list if there is no such folder."""
    prefix = folder.rstrip("/") + "/" if folder else ""
    entries = {}
    for name, file in files.items():
        if not name.startswith(prefix):
            continue
        parts = name[len(prefix) :].split("/")
        depths = len(parts) if recursive else 1
        for depth in range(1, depths + 1):
            path = prefix + "/".join(parts[:depth])
            entry = {"type": "directory", "path": path, "size": 0, "oid": _sha1(path)}
            if path == name:
                lfs = {"oid": file.etag, "size": file.size, "pointerSize": 134}
                entry |= {"type": "file", "size": file.size, "oid": _sha1(file.etag), "lfs": lfs}
            entries[path] = entry
    return list(entries.values())


def _sha1(text):
    return hashlib.sha1(text.encode()).hexdigest()
