"""Local hubs that also accept uploads, as far as the real clients need for a transfer, and can inject faults in them.

Large files can be generated: they have a size and a seed, and no bytes in memory. The hubs keep what a complete upload
sends, and do not compare it with the announced hash, so that the tests see every wrong byte that a client sends.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from tests.hubs.servers import LARGE_BYTES, Answer, HuggingFaceServer, ModelScopeServer, Request, git_sha1, json_answer

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator
    from http.server import BaseHTTPRequestHandler
    from typing import BinaryIO

BLOCK = 1 << 20


class GeneratedFile(bytes):
    """A file of random bytes that is never in memory as a whole. It is an empty `bytes` for code that does not know it."""

    def __new__(cls, size: int, seed: int = 0) -> GeneratedFile:
        file = super().__new__(cls)
        file.size, file.seed = size, seed
        return file

    size: int
    seed: int

    def __len__(self) -> int:
        return self.size

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        # One random block for all, with the number of the block in front: fast, and every block differs.
        block = random.Random(self.seed).randbytes(BLOCK - 8)  # noqa: S311 - bytes that do not compress
        for offset in range(start - start % BLOCK, self.size, BLOCK):
            content = (offset.to_bytes(8, "big") + block)[: self.size - offset]
            yield content[max(0, start - offset) :]

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block)
        return digest.hexdigest()


class RestOfFile(bytes):
    """A generated file from an offset."""

    def __new__(cls, file: GeneratedFile, start: int) -> RestOfFile:
        rest = super().__new__(cls)
        rest.file, rest.start = file, start
        return rest

    file: GeneratedFile
    start: int

    def __len__(self) -> int:
        return self.file.size - self.start

    def blocks(self) -> Iterator[bytes]:
        return self.file.blocks(self.start)


@dataclass
class StoredBlob:
    """What an upload sent: its hash, and its bytes unless they are many."""

    size: int
    sha256: str
    body: bytes | None


@dataclass
class UploadFaults:
    """Faults of uploads, by what they hit."""

    statuses: dict[str, list[tuple[int, dict[str, str]]]] = field(default_factory=dict)
    """Statuses and headers to respond with, one for each request, by a part of `METHOD path`. A status of 0 closes the
    connection after the request was carried out."""
    drop_put_after: dict[str, list[int]] = field(default_factory=dict)
    """By sha256: close the connection of a PUT after this many bytes; one number for each upload."""
    hold_put: threading.Event | None = None
    """If set, uploads wait for the event after their first block."""


class _Uploads:
    """What both hubs share: stored blobs, counted bytes, and faults."""

    keep_bytes = 64 * BLOCK
    """Uploads that are larger are only hashed."""

    def prepare_uploads(self) -> None:
        self.blobs: dict[str, StoredBlob] = {}
        self.uploads = UploadFaults()
        self.fault_body = ""
        """The body of responses with a fault; empty: a short JSON."""
        self.commits: list[dict[str, Any]] = []
        self.received_bytes = 0
        """Bytes of all PUT bodies and of all content in commits."""
        self.put_counts: Counter[str] = Counter()

    def cut(self, body: bytes, start: int) -> bytes:
        return RestOfFile(body, start) if isinstance(body, GeneratedFile) else body[start:]

    def write(self, body: bytes, stream: BinaryIO) -> None:
        if not isinstance(body, GeneratedFile | RestOfFile):
            stream.write(body)
            return
        stream.writelines(body.blocks())

    def fault(self, request: Request) -> Answer | None:
        line = f"{request.method} {request.path}"
        for part, statuses in self.uploads.statuses.items():
            if part in line and statuses:
                status, headers = statuses.pop(0)
                body = self.fault_body or json.dumps({"Code": status, "Message": "fault"})
                return Answer(status, body.encode(), dict(headers))
        return None

    def receive(self, handler: BaseHTTPRequestHandler) -> None:
        """Store the body of a PUT under the sha256 in its path, if it arrives completely."""
        url = urlsplit(handler.path)
        sha256 = unquote(url.path).rpartition("/")[2]
        length = int(handler.headers.get("Content-Length", -1))
        request = Request(
            "PUT", unquote(url.path), {}, {k.lower(): v for k, v in handler.headers.items()}, storage=True
        )
        self.requests.append(request)  # type: ignore[attr-defined]
        self.put_counts[sha256] += 1
        digest, size, kept = hashlib.sha256(), 0, bytearray()
        drops = self.uploads.drop_put_after.get(sha256)
        limit = drops.pop(0) if drops else None
        while size < length:
            block = handler.rfile.read(min(1 << 16, length - size))
            if not block:  # the client ended the connection
                handler.close_connection = True
                return
            size += len(block)
            self.received_bytes += len(block)
            digest.update(block)
            if length <= self.keep_bytes:
                kept += block
            if self.uploads.hold_put is not None:
                self.uploads.hold_put.wait(60)
            if limit is not None and size >= limit:
                handler.close_connection = True
                return
        fault = self.fault(request)
        status = fault.status if fault is not None else 200
        answer = b"" if fault is None else fault.body
        if status == 200:
            body = bytes(kept) if length <= self.keep_bytes else None
            self.blobs[sha256] = StoredBlob(size, digest.hexdigest(), body)
        handler.send_response(status)
        for name, value in {
            **(fault.headers if fault else {}),
            "ETag": f'"{sha256}"',
            "Content-Length": str(len(answer)),
        }.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(answer)

    def store(self, repo: str, path: str, body: bytes) -> None:
        self.repos[repo][path] = body  # type: ignore[attr-defined]

    def wrong_blobs(self) -> list[str]:
        """Return the announced hashes of uploads whose bytes have another hash."""
        return [sha256 for sha256, blob in self.blobs.items() if blob.sha256 != sha256]

    def link(self, repo: str, path: str, sha256: str, size: int) -> None:
        """Add a file whose bytes were uploaded. The listing shows the announced hash, like an LFS pointer."""
        blob = self.blobs.get(sha256)
        announced = LinkedFile(sha256, size, blob)
        self.repos[repo][path] = announced  # type: ignore[attr-defined]


class LinkedFile(bytes):
    """A file that was committed by its hash. Its bytes are those of the stored blob."""

    def __new__(cls, sha256: str, size: int, blob: StoredBlob | None) -> LinkedFile:
        file = super().__new__(cls, blob.body if blob is not None and blob.body is not None else b"")
        file.sha256, file.size, file.blob = sha256, size, blob
        return file

    sha256: str
    size: int
    blob: StoredBlob | None

    @property
    def is_right(self) -> bool:
        """Whether the stored bytes are those that were announced."""
        return self.blob is not None and (self.blob.sha256, self.blob.size) == (self.sha256, self.size)


def listed_sha256(body: bytes) -> str:
    return body.sha256 if isinstance(body, GeneratedFile | LinkedFile) else hashlib.sha256(body).hexdigest()


def size_of(body: bytes) -> int:
    return body.size if isinstance(body, GeneratedFile | LinkedFile) else len(body)


class SourceServer(_Uploads, HuggingFaceServer):
    """Hugging Face with licenses, gated and private repositories, generated files, and uploads with LFS."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.prepare_uploads()
        self.info: dict[str, dict[str, Any]] = {}
        """More fields of the description of a repository, such as `gated`."""
        self.refused: dict[str, tuple[int, str]] = {}
        """Repositories that are not readable: the status and X-Error-Code."""
        self.license = "mit"
        """The license of repositories that `info` does not describe."""
        self._commits: dict[tuple[object, ...], str] = {}
        self.tree_names: dict[str, str] = {}
        """Names to list instead of those of files."""

    def commit(self, repo: str) -> str:
        key = (repo, *self.repos[repo], *map(id, self.repos[repo].values()))
        if key not in self._commits:
            content = sorted((path, listed_sha256(body)) for path, body in self.repos[repo].items())
            self._commits[key] = hashlib.sha1(repr(content).encode()).hexdigest()  # noqa: S324 - the hash of git
        return self._commits[key]

    def route(self, request: Request) -> Answer:
        if (answer := self.fault(request)) is not None:
            return answer
        path = request.path
        for repo, (status, code) in self.refused.items():
            if repo in path:
                return json_answer({"error": "refused"}, status, X_Error_Code=code)
        if path == "/api/whoami-v2":
            return json_answer({"name": "tester", "type": "user"})
        if request.method == "POST":
            return self._write(request)
        if path.startswith("/api/models/") and path.removeprefix("/api/models/") in self.repos:
            request = Request(request.method, f"{path}/revision/main", request.query, request.headers, storage=False)
        elif path.startswith("/api/models/") and path.count("/") == 4:
            return json_answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        answer = super().route(request)
        if "/revision/" in request.path and answer.status == 200:
            described = json.loads(answer.body)
            license_id = None if self.license == "" else self.license
            extra = self.info.get(described["id"], {"cardData": {"license": license_id}})
            return json_answer({**described, "private": False, "gated": False, **extra})
        return answer

    def _listed(self, repo: str, name: str) -> dict[str, object]:
        body = self.repos[repo].get(name, b"?")
        size = size_of(body)
        entry: dict[str, object] = {"type": "file", "path": self.tree_names.get(name, name), "size": size}
        if size >= LARGE_BYTES or isinstance(body, LinkedFile):
            return {**entry, "oid": "0" * 40, "lfs": {"oid": listed_sha256(body), "size": size, "pointerSize": 134}}
        return {**entry, "oid": git_sha1(body)}

    def _write(self, request: Request) -> Answer:
        path = request.path
        body = json.loads(request.body) if "/commit/" not in path else {}
        if path == "/api/repos/create":
            repo = f"{body['organization']}/{body['name']}"
            if repo in self.repos:
                return json_answer({"error": "exists"}, 409)
            self.repos[repo] = {".gitattributes": b"*.bin filter=lfs\n"}
            self.info[repo] = {"private": body.get("visibility") == "private"}
            return json_answer({"url": f"{self.url}/{repo}"})
        if path == "/api/validate-yaml":
            match = re.search(r"^license: (.*)$", body["content"], re.MULTILINE)
            if match and " " in match[1]:
                return json_answer({"errors": [{"message": '"license" must be one of [apache-2.0, …]'}]}, 400)
            return json_answer({"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE_BYTES else "regular",
                    "shouldIgnore": False,
                }
                for file in body["files"]
            ]
            return json_answer({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            known = {listed_sha256(each) for files in self.repos.values() for each in files.values()} | set(self.blobs)
            objects = []
            for each in body["objects"]:
                actions = {"upload": {"href": f"{self.storage_url}/upload/{each['oid']}"}}
                objects.append(each if each["oid"] in known else {**each, "actions": actions})
            return json_answer({"transfer": "basic", "objects": objects})
        repo = path.removeprefix("/api/models/").partition("/commit/")[0]
        lines = [json.loads(line) for line in request.body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                self.received_bytes += len(content)
                self.store(repo, value["path"], content)
            elif line["key"] == "lfsFile":
                self.link(repo, value["path"], value["oid"], value["size"])
        self.commits.append({"repo": repo, "message": lines[0]["value"]["summary"], "files": len(lines) - 1})
        return json_answer({"commitUrl": f"{self.url}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40})


class DestinationServer(_Uploads, ModelScopeServer):
    """ModelScope with accounts, repositories that can be created, and uploads."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.prepare_uploads()
        self.info: dict[str, dict[str, Any]] = {repo: {"private": False} for repo in self.repos}
        """Visibility and license of each repository."""
        self.denied: set[str] = set()
        """Repositories that the user may not write."""
        self.lists_hashes = True
        self.validated: list[int] = []
        """Number of objects in each request for missing blobs."""

    def route(self, request: Request) -> Answer:
        if (answer := self.fault(request)) is not None:
            if answer.status:
                return answer
            self._route(request)
            return Answer(self.NO_ANSWER)
        return self._route(request)

    def _route(self, request: Request) -> Answer:
        path = request.path
        if path.startswith("/openapi/v1/"):
            return self._openapi(request, path.removeprefix("/openapi/v1/"))
        if path == "/api/v1/models" and request.method == "POST":
            return self._create(request)
        if path.startswith("/api/v1/repos/models/"):
            owner, name, rest = path.removeprefix("/api/v1/repos/models/").split("/", 2)
            return self._repository(request, f"{owner}/{name}", rest)
        if request.method == "GET" and path.startswith("/api/v1/models/") and path.count("/") == 5:
            repo = path.removeprefix("/api/v1/models/")
            if repo not in self.repos:
                return json_answer({"Code": 10010205001, "Success": False, "Message": "模型不存在"}, 404)
        return super().route(request)

    def _authorized(self, request: Request) -> bool:
        return self.token is None or request.headers.get("authorization") == f"Bearer {self.token}"

    def _openapi(self, request: Request, path: str) -> Answer:
        if path == "users/me":
            if not request.headers.get("authorization") or not self._authorized(request):
                return json_answer({"success": False, "code": "InvalidAuthentication", "message": "invalid token"}, 401)
            return json_answer({"success": True, "data": {"username": "tester"}})
        repo = path.removeprefix("models/")
        if repo not in self.repos:
            return json_answer({"success": False, "code": "ResourceNotFound", "message": "not found"}, 404)
        return json_answer({"success": True, "data": {"id": repo, "gated": False, **self.info.get(repo, {})}})

    def _create(self, request: Request) -> Answer:
        if not self._authorized(request):
            return json_answer({"Code": 401, "Success": False, "Message": "user not logged in"}, 401)
        body = json.loads(request.body)
        repo = f"{body['Path']}/{body['Name']}"
        if repo in self.denied:
            return json_answer({"Code": 403, "Success": False, "Message": "no permission"}, 403)
        if repo in self.repos:
            return json_answer({"Code": 10010101001, "Success": False, "Message": "已存在"}, 400)
        # Like the real hub, which writes a card into each new repository.
        self.repos[repo] = {
            ".gitattributes": b"*.bin filter=lfs\n",
            "README.md": f"---\nlicense: {body['License']}\n---\n# generated\n".encode(),
            "configuration.json": b"{}",
        }
        self.info[repo] = {"private": body["Visibility"] == 1, "license": body["License"]}
        return json_answer({"Code": 200, "Success": True, "Data": {"Name": body["Name"], "Path": body["Path"]}})

    def _repository(self, request: Request, repo: str, rest: str) -> Answer:
        if not self._authorized(request):
            return json_answer({"Code": 401, "Success": False, "Message": "user not logged in"}, 401)
        if repo not in self.repos:
            return json_answer({"Code": 10010205001, "Success": False, "Message": "模型不存在"}, 404)
        if repo in self.denied:
            return json_answer({"Code": 403, "Success": False, "Message": "no permission"}, 403)
        body = json.loads(request.body)
        if rest == "info/lfs/objects/batch":
            self.validated.append(len(body["objects"]))
            missing = [
                {**each, "actions": {"upload": {"href": f"{self.storage_url}/upload/{each['oid']}?signature=s3cret"}}}
                for each in body["objects"]
                if each["oid"] not in self.blobs
            ]
            return json_answer({"Code": 200, "Success": True, "Data": {"objects": missing}})
        assert rest == "commit/master", rest
        return self._commit(repo, body)

    def _commit(self, repo: str, body: dict[str, Any]) -> Answer:
        actions = body["actions"]
        if len(actions) > 2000:
            return json_answer({"Code": 400, "Success": False, "Message": "too many actions"}, 400)
        inline = {"README.md", "config.json", "configuration.json"}
        for action in actions:
            is_lfs = action["type"] == "lfs"
            if is_lfs and (action["path"].rpartition("/")[2] in inline or action["sha256"] not in self.blobs):
                return json_answer({"Code": 400, "Success": False, "Message": f"invalid {action['path']}"}, 400)
        for action in actions:
            if action["type"] == "lfs":
                self.link(repo, action["path"], action["sha256"], action["size"])
            else:
                content = base64.b64decode(action["content"])
                assert len(content) == action["size"]
                self.received_bytes += len(content)
                self.store(repo, action["path"], content)
        self.commits.append({"repo": repo, "message": body["commit_message"], "files": len(actions)})
        return json_answer({"Code": 200, "Success": True, "Data": {"CommitId": "2" * 40}})

    def _listed(self, repo: str, name: str) -> dict[str, object]:
        body = self.repos[repo].get(name, b"?")
        size, sha256 = size_of(body), listed_sha256(body)
        return {
            "Path": name,
            "Name": name.rpartition("/")[2],
            "Type": "blob",
            "Size": size,
            "Sha256": sha256 if self.lists_hashes else "",
            "IsLFS": isinstance(body, LinkedFile),
        }

    def wrong_files(self, repo: str, source: dict[str, bytes]) -> list[str]:
        """Return the files of a repository whose stored bytes are not those of the source, or not those listed."""
        stored = self.repos[repo]
        broken = {path for path, body in stored.items() if isinstance(body, LinkedFile) and not body.is_right}
        common = (stored.keys() & source.keys()) - {".gitattributes"}
        return sorted(broken | {path for path in common if listed_sha256(stored[path]) != listed_sha256(source[path])})
