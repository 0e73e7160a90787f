"""Local hubs, which speak the protocols that the real clients expect, and can inject faults.

`HuggingFaceServer` and `ModelScopeServer` are context managers. Each listens on two loopback ports: that of the hub, and
that of the storage host that large files are redirected to. `requests` contains the received requests, `faults` the
faults to inject.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from ssl import SSLContext
    from typing import BinaryIO

LARGE_BYTES = 10_000
"""Files of at least this size are on the storage host, and listed with their sha256."""


@dataclass(frozen=True)
class Request:
    """A request that a server has received."""

    method: str
    path: str
    """Without the query, decoded."""
    query: dict[str, str]
    headers: dict[str, str]
    """Names in lower case."""
    storage: bool
    """Whether it was sent to the storage host."""
    body: bytes = b""


@dataclass
class Faults:
    """Faults to inject, by the path of a file."""

    status: int | None = None
    """Respond to everything with this status."""
    next_statuses: list[int] = field(default_factory=list)
    """Respond to the next requests with these statuses; `HubServer.NO_ANSWER` closes the connection."""
    retry_after: str | None = None
    """The Retry-After next to these statuses."""
    xet_url: str | None = None
    """The storage host of Xet that large files are announced to be on (Hugging Face)."""
    error_code: str | None = None
    """The X-Error-Code next to `status` (Hugging Face)."""
    wrong_bytes: dict[str, int] = field(default_factory=dict)
    """How many times to send other bytes of the same size."""
    drop_after: dict[str, list[int]] = field(default_factory=dict)
    """Send this many bytes, then close the connection; one number for each response."""
    hold_after: dict[str, int] = field(default_factory=dict)
    """Send this many bytes, then nothing until `release` is set."""
    listed_too: list[str] = field(default_factory=list)
    """Names in the listing without a file."""
    endless: set[str] = field(default_factory=set)
    """Files that are sent without a length, and do not end. `/tree/` is the listing."""
    sent: int = 0
    """Bytes of endless files that were sent."""
    endless_pages: bool = False
    """Each listing names a next page (Hugging Face)."""
    release: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def holding(self, file: str, sent: int) -> Iterator[None]:
        """Send only so many bytes of a file during the block, and the rest afterwards."""
        self.release.clear()
        self.hold_after[file] = sent
        try:
            yield
        finally:
            self.hold_after.clear()
            self.release.set()


@dataclass
class Answer:
    """A response."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: str | None = None
    """The path of the file in `body`, for the faults."""


def json_answer(content: object, status: int = 200, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **named})


class HubServer:
    """Base of both hubs: two ports, the received requests, tokens, ranges, and faults.

    `repos` maps a repository to its files; `revisions` are its branches and tags, which all have the same files.
    """

    revisions: tuple[str, ...] = ()
    NO_ANSWER = 599
    """The status of an answer that is not sent: the connection is closed."""

    def __init__(
        self,
        repos: Mapping[str, Mapping[str, bytes]],
        *,
        token: str | None = None,
        revisions: tuple[str, ...] | None = None,
        tls: SSLContext | None = None,
    ) -> None:
        self.repos = {name: dict(files) for name, files in repos.items()}
        self.token = token
        if revisions is not None:
            self.revisions = revisions
        self.faults = Faults()
        self.requests: list[Request] = []
        self._bodies: list[str] = []
        self._lock = threading.Lock()
        self._hub = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, storage=False))
        self._storage = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, storage=True))
        # The end of a test must not wait for a handler that is held.
        self._hub.daemon_threads = self._storage.daemon_threads = True
        self._hub.block_on_close = self._storage.block_on_close = False
        if tls is not None:
            for server in (self._hub, self._storage):
                # The handshake is left to the thread of the connection, because a client may refuse it.
                server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._hub.server_port}"
        self.storage_url = f"{scheme}://localhost:{self._storage.server_port}"
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            for server in (self._hub, self._storage)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.faults.release.set()
        for server in (self._hub, self._storage):
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()

    def bodies(self) -> Counter[str]:
        """Return how often each file was sent, without redirects and HEAD."""
        with self._lock:
            return Counter(self._bodies)

    def asked(self, ending: str) -> int:
        """Return how often a path with this ending was requested."""
        with self._lock:
            return sum(request.path.endswith(ending) for request in self.requests)

    def forget(self) -> None:
        """Reset the counts."""
        with self._lock:
            self.requests.clear()
            self._bodies.clear()

    def answer(self, request: Request) -> Answer:
        """Record a request, and return a fault or the response of the hub."""
        with self._lock:
            self.requests.append(request)
            next_status = self.faults.next_statuses.pop(0) if self.faults.next_statuses else None
        if next_status is not None:
            wait = {"Retry_After": self.faults.retry_after} if self.faults.retry_after else {}
            return json_answer({"Code": next_status, "Message": "fault"}, next_status, **wait)
        if self.faults.status is not None:
            code = {"X_Error_Code": self.faults.error_code} if self.faults.error_code else {}
            return json_answer({"Code": self.faults.status, "Message": "fault"}, self.faults.status, **code)
        if request.storage:
            _, repo, path = request.path.split("/@/")
            return Answer(body=self.repos[repo][path], file=path)
        return self.route(request)

    def route(self, request: Request) -> Answer:
        raise NotImplementedError

    def receive(self, handler: BaseHTTPRequestHandler) -> None:
        """Respond to an upload. These hubs accept none; see tests/transfer/servers.py."""
        handler.close_connection = True
        handler.send_error(405)

    def cut(self, body: bytes, start: int) -> bytes:
        """Return the bytes of a file from an offset."""
        return body[start:]

    def write(self, body: bytes, stream: BinaryIO) -> None:
        """Send the bytes of a response."""
        stream.write(body)

    def send_file(self, request: Request, repo: str, path: str, **headers: str) -> Answer:
        """Return a file, or a redirect to the storage host."""
        body = self.repos[repo][path]
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if len(body) >= LARGE_BYTES:
            location = f"{self.storage_url}/@/{quote(repo)}/@/{quote(path)}"
            return Answer(302, headers={"Location": location, **named})
        return Answer(body=body, headers=named, file=path)

    def spoil(self, file: str, body: bytes) -> bytes:
        """Return the bytes of a file, or other bytes if there is a fault."""
        with self._lock:
            self._bodies.append(file)
            if self.faults.wrong_bytes.get(file, 0) > 0:
                self.faults.wrong_bytes[file] -= 1
                return bytes(byte ^ 0xFF for byte in body)
        return body


class HuggingFaceServer(HubServer):
    """The part of Hugging Face's protocol that its client needs to download a model."""

    revisions = ("main",)

    def commit(self, repo: str) -> str:
        """Return the present commit of a repository."""
        content = sorted((path, hashlib.sha1(body).hexdigest()) for path, body in self.repos[repo].items())  # noqa: S324 - the hash of git
        return hashlib.sha1(repr(content).encode()).hexdigest()  # noqa: S324 - the hash of git

    def route(self, request: Request) -> Answer:
        if self.token is not None and request.headers.get("authorization") != f"Bearer {self.token}":
            return json_answer({"error": "Invalid username or password."}, 401, X_Error_Code="GatedRepo")
        api, path = "/api/models/", request.path
        if path == "/api/models":
            text = request.query.get("search", "")
            return json_answer([{"id": repo} for repo in self.repos if text.casefold() in repo.casefold()])
        if path == "/xet" and self.faults.xet_url is not None:
            headers = {
                "X_Xet_Cas_Url": self.faults.xet_url,
                "X_Xet_Access_Token": "t",
                "X_Xet_Token_Expiration": "9" * 10,
            }
            return json_answer({}, **headers)
        for verb in ("/revision/", "/tree/", "/refs", "/resolve/"):
            if verb in path:
                repo, _, rest = path.removeprefix(api).removeprefix("/").partition(verb)
                break
        else:
            return json_answer({"error": "what?"}, 404)
        if repo not in self.repos:
            return json_answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if verb == "/refs":
            refs = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": self.commit(repo)}
                for name in self.revisions
            ]
            return json_answer({"branches": refs, "tags": [], "converts": []})
        revision, _, file = rest.partition("/")
        if revision not in (*self.revisions, self.commit(repo)):
            return json_answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        if verb == "/revision/":
            return json_answer({"id": repo, "modelId": repo, "sha": self.commit(repo), "siblings": []})
        if verb == "/tree/":
            names = [*self.repos[repo], *self.faults.listed_too]
            following = {"Link": f'<{self.url}{path}>; rel="next"'} if self.faults.endless_pages else {}
            return json_answer([self._listed(repo, name) for name in names], **following)
        if file not in self.repos[repo]:
            return json_answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        body = self.repos[repo][file]
        sha256 = hashlib.sha256(body).hexdigest()
        large = {"X_Linked_ETag": f'"{sha256}"', "X_Linked_Size": str(len(body))}
        if self.faults.xet_url is not None:
            large |= {"X_Xet_Hash": sha256, "X_Xet_Refresh_Route": f"{self.url}/xet"}
        headers = large if len(body) >= LARGE_BYTES else {"ETag": f'"{git_sha1(body)}"'}
        return self.send_file(request, repo, file, X_Repo_Commit=self.commit(repo), **headers)

    def _listed(self, repo: str, name: str) -> dict[str, object]:
        body = self.repos[repo].get(name, b"?")
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(body), "oid": git_sha1(body)}
        if len(body) >= LARGE_BYTES:
            entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
        return entry


class ModelScopeServer(HubServer):
    """The part of ModelScope's protocol that its client needs to download a model."""

    revisions = ("master",)

    def route(self, request: Request) -> Answer:
        prefix, path = "/api/v1/models/", request.path
        if path == "/openapi/v1/models":
            text = request.query.get("search", "")
            models = [{"id": repo} for repo in self.repos if text.casefold() in repo.casefold()]
            return json_answer({"success": True, "data": {"models": models, "total_count": len(models)}})
        if not path.startswith(prefix):
            return json_answer({"Code": 404, "Success": False, "Message": "not found"}, 404)
        owner, name, rest = path.removeprefix(prefix).split("/", 2)
        repo = f"{owner}/{name}"
        if self.token is not None:
            cookie = f"m_session_id={self.token}"
            bearer = request.headers.get("authorization") == f"Bearer {self.token}"
            if not bearer or cookie not in request.headers.get("cookie", ""):
                return json_answer({"Code": 401, "Success": False, "Message": "user not logged in"}, 401)
        if repo not in self.repos:
            return json_answer({"Code": 10010205001, "Success": False, "Message": "模型不存在"}, 404)
        if rest == "revisions":
            names = [{"Revision": revision} for revision in self.revisions]
            return json_answer({"Code": 200, "Data": {"RevisionMap": {"Branches": names, "Tags": []}}})
        revision = request.query.get("Revision")
        if rest == "repo/files":
            # Like the real hub, which returns an empty listing for an unknown revision.
            names = [*self.repos[repo], *self.faults.listed_too] if revision in self.revisions else []
            files = [self._listed(repo, name) for name in names] or None
            return json_answer({"Code": 200, "Success": True, "Data": {"Files": files, "LatestCommitter": {}}})
        file = request.query.get("FilePath", "")
        if rest != "repo" or file not in self.repos[repo] or revision not in self.revisions:
            return json_answer({"Code": 404, "Success": False, "Message": "not found"}, 404)
        return self.send_file(request, repo, file)

    def _listed(self, repo: str, name: str) -> dict[str, object]:
        body = self.repos[repo].get(name, b"?")
        return {
            "Path": name,
            "Name": name.rpartition("/")[2],
            "Type": "blob",
            "Size": len(body),
            "Sha256": hashlib.sha256(body).hexdigest(),
            "IsLFS": len(body) >= LARGE_BYTES,
            "Revision": "0" * 40,
        }


def git_sha1(body: bytes) -> str:
    """Return the id of these bytes as a git blob."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()  # noqa: S324 - the hash of git


def _handler(server: HubServer, *, storage: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else a response waits 40 ms for the acknowledgment of its headers

        def log_message(self, *args: object) -> None: ...

        def do_HEAD(self) -> None:
            self._serve()

        def do_GET(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def do_PUT(self) -> None:
            server.receive(self)

        def _serve(self, received: bytes = b"") -> None:
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, unquote(url.path), query, headers, storage, received)
            answer = server.answer(request)
            if answer.status == server.NO_ANSWER:
                self.close_connection = True
                return
            body, status = answer.body, answer.status
            extra = dict(answer.headers)
            if answer.file is not None and self.command == "GET":
                body = server.spoil(answer.file, body)
                start = headers.get("range", "").removeprefix("bytes=").partition("-")[0]
                if start.isdigit() and 0 < int(start) < len(body):
                    status, total = 206, len(body)
                    extra["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
                    body = server.cut(body, int(start))
            if self.command == "GET" and (answer.file or urlsplit(self.path).path) in server.faults.endless:
                self._send_endlessly(extra)
                return
            self.send_response(status)
            for name, value in {**extra, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if answer.file is not None and self._misbehave(answer.file, body):
                return
            server.write(body, self.wfile)

        def _send_endlessly(self, headers: dict[str, str]) -> None:
            self.send_response(200)
            for name, value in {**headers, "Connection": "close"}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):
                while not server.faults.release.is_set():
                    server.faults.sent += self.wfile.write(b" " * 2**20)
            self.close_connection = True

        def _misbehave(self, file: str, body: bytes) -> bool:
            faults = server.faults
            if drops := faults.drop_after.get(file):
                self.wfile.write(body[: drops.pop(0)])
                self.close_connection = True
                return True
            if file in faults.hold_after and not faults.release.is_set():
                cut = faults.hold_after[file]
                self.wfile.write(body[:cut])
                self.wfile.flush()
                faults.release.wait(60)
                try:
                    self.wfile.write(body[cut:])
                except OSError:  # the client was killed
                    self.close_connection = True
                return True
            return False

    return Handler
