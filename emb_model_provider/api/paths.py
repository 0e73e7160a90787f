"""Paths: the spellings that clients use, the API that a path belongs to, and who may request it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

Dialect = Literal["openai", "ollama", "tei", "cohere", "dashscope"]
"""The API that a path belongs to, which decides the form of its errors."""

EMBEDDINGS: Final = "/v1/embeddings"
FILES: Final = "/v1/files"
DASHSCOPE_RERANK: Final = "/services/rerank/text-rerank/text-rerank"

_OLLAMA: Final = frozenset(
    f"/api/{name}" for name in ("embed", "embeddings", "ps", "show", "tags", "version")
)  # fmt: skip
"""Ollama's routes, to which the rules for the other routes below `/api` do not apply: they change nothing."""
_TEI: Final = frozenset(
    {"/embed", "/embed_all", "/embed_sparse", "/info", "/predict", "/rerank", "/similarity", "/tokenize"}
)
_COHERE: Final = frozenset({"/v1/embed", "/v2/embed", "/v2/rerank"})
_AZURE: Final = "/openai/deployments/"
_PUBLIC: Final = frozenset({"/docs", "/health", "/metrics", "/openapi.json", "/ready"})
"""Paths that require no API key, besides `GET /` and the files of `/docs`."""

CONSOLE: Final = "/console"
CONSOLE_SIGN_IN: Final = "/console/sign-in"
_CONSOLE_STATIC: Final = "/console/static/"

_BASE = r"(?:/+(?:(?:api|openai|compatible-(?:mode|api)|engines(?:/+[^/]+)?)/+)?v[1-3])*"
"""Any number of base URLs of OpenAI-compatible services: /v1, /v2, /v3, /api/v1, /api/v3, /openai/v1, /engines/v1, ..."""
_SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), path)
    for pattern, path in (
        (rf"(?:{_BASE}/+embeddings)+/*", EMBEDDINGS),
        (rf"{_BASE}/+models/*", "/v1/models"),
        (rf"{_BASE}/+(files|batches)/*", r"/v1/\1"),
        (rf"{_BASE}/+(files|batches)/+([^/]+)/*", r"/v1/\1/\2"),
        (rf"{_BASE}/+files/+([^/]+)/+content/*", r"/v1/files/\1/content"),
        (rf"{_BASE}/+batches/+([^/]+)/+cancel/*", r"/v1/batches/\1/cancel"),
        (r"(?:/+v[12])*/+v2/+rerank/*", "/v2/rerank"),
        (r"(?:/+rerank)+/*", "/rerank"),
        (rf"(?:{_BASE}/+reranks?)+/*", "/v1/rerank"),
        (rf"{_BASE}/+(score|classify)/*", r"/v1/\1"),
        (r"(?:/+v1)+/+similarity/*", "/v1/similarity"),
        (rf"{_BASE}/+services/+rerank/+text-rerank/+text-rerank/*", DASHSCOPE_RERANK),
        # The id is not changed, because it can be a directory: /v1/models//data/model
        (rf"{_BASE}/+models/(.+)", r"/v1/models/\1"),
        (r"(?:/+v1)*/+(v[12])/+embed/*", r"/\1/embed"),
        (r"(?:/+(?:v1|api))*/+api/+(embed|embeddings|ps|show|tags|version)/*", r"/api/\1"),
        (r"(?:/+(?:openai|v1))*/+deployments/+([^/].*)/embeddings/*", r"/openai/deployments/\1/embeddings"),
        (r"(?:/+v1)?/+engines/+([^/].*)/embeddings/*", r"/openai/deployments/\1/embeddings"),
        (r"/+(embed|embed_all|embed_sparse|embedding|info|predict|similarity|tokenize)/*", r"/\1"),
    )
)
"""Patterns of paths that users and clients send, and the paths of the routes. The first match counts.

No pattern matches a route for management or monitoring, and no replacement is one: each of them has exactly one
spelling, so that the rule of a proxy for its path cannot be bypassed.
"""


class PathMiddleware:
    """Replaces the path of a request by that of its route, before access rules and limits look at it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = normalize_path(scope["path"])
            if path != scope["path"]:
                scope = {**scope, "path": path}
        await self._app(scope, receive, send)


def normalize_path(path: str) -> str:
    """Return the path of the route that a path (percent-decoded) means, or the same path if it means no other one."""
    if path == EMBEDDINGS:
        return path
    for pattern, replacement in _SPELLINGS:
        if match := pattern.fullmatch(path):
            return match.expand(replacement)
    return path


def is_admin_path(path: str) -> bool:
    """Return whether a path (percent-decoded) belongs to the routes that can change the service."""
    return (path == "/api" or path.startswith("/api/")) and path not in _OLLAMA


def is_console_path(path: str) -> bool:
    """Return whether a path (percent-decoded) belongs to the web console."""
    return path == CONSOLE or path.startswith(f"{CONSOLE}/")


def is_public_console_path(path: str) -> bool:
    """Return whether a path of the console can be requested before signing in: the form for this, and the assets."""
    return path == CONSOLE_SIGN_IN or path.startswith(_CONSOLE_STATIC)


def is_public_path(method: str, path: str) -> bool:
    """Return whether a request requires no API key: the routes for monitoring and for documentation."""
    if path == "/":
        return method in ("GET", "HEAD")
    return path in _PUBLIC or path.startswith("/docs/")


def is_upload(method: str, path: str) -> bool:
    """Return whether the body of a request is a file, which goes to the disk while it arrives."""
    return method == "POST" and path == FILES


def is_inference_request(method: str, path: str) -> bool:
    """Return whether a request asks for vectors or scores, in any dialect."""
    if method != "POST":
        return False
    return path in _INFERENCE_PATHS or (path.startswith(_AZURE) and path.endswith("/embeddings"))


def dialect_of(method: str, path: str) -> Dialect:
    """Return the API that a request belongs to."""
    if path in _OLLAMA:
        return "ollama"
    if path in _TEI or (path == "/" and method == "POST"):
        return "tei"
    if path == DASHSCOPE_RERANK:
        return "dashscope"
    return "cohere" if path in _COHERE else "openai"


_INFERENCE_PATHS = frozenset(
    {
        EMBEDDINGS, "/v1/classify", "/v1/rerank", "/v1/score", "/v1/similarity", "/", "/api/embed", "/api/embeddings",
        "/embedding", DASHSCOPE_RERANK, *_COHERE, *(_TEI - {"/info", "/tokenize"}),
    }
)  # fmt: skip
