"""A server that answers as the Hugging Face Hub does to what its library asks: repositories in memory, for tests."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """`repositories[name][branch]` is a commit, `commits[commit]` its files. What was asked is in `asked`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repositories: dict[str, dict[str, str]] = {}
        self.private: set[str] = set()
        self.commits: dict[str, Files] = {}
        self.large: Files = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.breaks_off_after: int | None = None  # bytes of the next file that has more, once
        self.stalls_after: int | None = None  # bytes of the next file of weights; the rest does not come
        self.stalled, self.released = threading.Event(), threading.Event()
        self.ignores_ranges = False  # and sends the whole
        self.spoils = 0  # the next files of weights, by a bit of the last byte
        self.served = 0  # bytes of files
        self.slow = 0.0  # seconds before a file of weights is sent
        self.address = f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str, files: Files, branch: str = "main") -> str:
        number = hashlib.sha1(repr((name, branch, len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[number] = files
        self.repositories.setdefault(name, {})[branch] = number
        return number

    def paths(self, verb: str) -> list[str]:
        return [path for asked, path, _ in self.asked if asked == verb]


@contextmanager
def serving() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
        for verb, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and verb in (self.command, "GET" if self.command == "HEAD" else ""):
                return answer(self, *found.groups(), body)
        return self._error(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    # -- reading -------------------------------------------------------------------------------------------

    def _files(self, name: str, revision: str) -> tuple[str, Files] | None:
        branches = self.server.repositories.get(name)
        closed = name in self.server.private and self.headers.get("Authorization") != "Bearer secret"
        if branches is None or closed:
            return self._error(404, "RepoNotFound")
        commit = branches.get(revision, revision)
        if commit not in self.server.commits:
            return self._error(404, "RevisionNotFound")
        return commit, self.server.commits[commit]

    def _about(self, name: str, revision: str, _: bytes) -> None:
        if found := self._files(name, revision):
            self._json({"id": name, "sha": found[0], "siblings": [{"rfilename": path} for path in found[1]]})

    def _tree(self, name: str, revision: str, _: bytes) -> None:
        if found := self._files(name, revision):
            self._json([_entry(path, content) for path, content in found[1].items()])

    def _resolve(self, name: str, revision: str, path: str, _: bytes) -> None:
        if not (found := self._files(name, revision)):
            return None
        commit, files = found
        if path not in files:
            return self._error(404, "EntryNotFound")
        content, start = files[path], 0
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and not self.server.ignores_ranges:
            start = int(asked[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_digest(path, content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if _is_large(path):
            time.sleep(self.server.slow)
            if self.server.spoils:
                self.server.spoils -= 1
                content = content[:-1] + bytes([content[-1] ^ 1])
        limit = self.server.breaks_off_after
        if limit is not None and len(content) - start > limit:
            self.server.breaks_off_after = None
            self._send(content[start : start + limit])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return None
        limit = self.server.stalls_after
        if limit is not None and _is_large(path):
            self.server.stalls_after = None
            self._send(content[start : start + limit])
            self.wfile.flush()
            self.server.stalled.set()
            self.server.released.wait(60)
            self.close_connection = True
            return None
        self._send(content[start:])
        return None

    def _send(self, content: bytes) -> None:
        self.wfile.write(content)
        self.server.served += len(content)

    # -- writing -------------------------------------------------------------------------------------------

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repositories:
            return self._json({"error": "exists", "url": f"{self.server.address}/{name}"}, 409)
        self.server.commit(name, {".gitattributes": b""})
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(name)
        return self._json({"url": f"{self.server.address}/{name}"})

    def _branch(self, name: str, branch: str, _: bytes) -> None:
        self.server.repositories[name].setdefault(branch, self.server.repositories[name]["main"])
        self._json({})

    def _preupload(self, name: str, revision: str, body: bytes) -> None:
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = [{"path": path, "uploadMode": "lfs" if _is_large(path) else "regular"} for path in files]
        self._json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def _batch(self, name: str, body: bytes) -> None:
        objects = [
            {**part, "actions": {"upload": {"href": f"{self.server.address}/put/{part['oid']}"}}}
            for part in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _put(self, oid: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self._json({})

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        files = dict(self.server.commits[self.server.repositories[name][branch]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        number = self.server.commit(name, files, branch)
        self._json({"commitUrl": f"{self.server.address}/{name}/commit/{number}", "commitOid": number})

    def _valid(self, _: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    # -- answers -------------------------------------------------------------------------------------------

    def _json(self, data: object, code: int = 200, kind: str = "application/json") -> None:
        content = json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _error(self, code: int, name: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", name)
        self.send_header("Content-Length", "0")
        self.end_headers()


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", _Answers._about),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", _Answers._tree),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Answers._resolve),
    ("POST", r"/api/repos/create", _Answers._create),
    ("POST", r"/api/validate-yaml", _Answers._valid),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Answers._branch),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Answers._preupload),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Answers._commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Answers._batch),
    ("PUT", r"/put/(\w+)", _Answers._put),
)


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _digest(path: str, content: bytes) -> str:
    if _is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": _digest(path, content)}
    if _is_large(path):
        entry["lfs"] = {"oid": _digest(path, content), "size": len(content), "pointerSize": 130}
    return entry
