"""The specification of a model to serve, and the types of its fields."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

HubName = Literal["huggingface", "modelscope", "local", "bundled"]
Source = Literal["auto", "huggingface", "modelscope", "local", "bundled"]
Precision = Literal["auto", "fp32", "fp16", "bf16", "int8", "int4"]
BackendName = Literal["auto", "openvino", "torch"]
Pooling = Literal["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
TokenInput = Literal["auto", "reject", "model", "cl100k"]
Truncate = Literal["NONE", "START", "END"]
Kind = Literal["dense", "reranker", "classifier", "sparse", "multi-vector", "bge-m3"]
"""What a model computes. `bge-m3` computes dense, sparse and multi-vector embeddings in one pass."""
LongDocuments = Literal["windows", "cut"]

BUNDLED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
BUNDLED_REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
"""Commit of the official repository from which the bundled files were taken."""
MIRROR_MANIFEST = "mirror-manifest.json"
"""The manifest in the directory of a mirror (snapshots/mirror.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestDefaults:
    """What requests get that use an alias and do not say otherwise. They do not change how the model is loaded."""

    input_type: str | None = None
    """The `input_type` of requests for embeddings."""
    raw_scores: bool = False
    """Whether scores are logits. False: the activation of the model is applied."""
    long_documents: LongDocuments = "windows"
    """What a reranker does with a document that does not fit next to the query: the best score of overlapping windows
    counts, or the document is cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model to serve.

    None selects the value of the repository, the hub or the service-wide settings. Any other value takes precedence.
    """

    alias: str
    """Name that requests use."""
    name: str
    """Repository id on a hub, or a directory."""
    defaults: RequestDefaults = field(default_factory=RequestDefaults)
    """Those of requests that use the alias."""
    more_aliases: Mapping[str, RequestDefaults] = field(default_factory=dict)
    """Further aliases of the model, each with those of its requests."""
    source: Source = "auto"
    path: Path | None = None
    """Local directory of the model. Takes precedence over any hub."""
    revision: str | None = None
    """Branch, tag or commit. None: the default branch of the hub."""

    endpoint: str | None = None
    """Base URL of the hub, if it differs from the service-wide one."""
    token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    """Cache directory of the hub's client for this model."""
    trust_remote_code: bool | None = None

    precision: Precision = "auto"
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    backend: BackendName = "auto"

    kind: Kind | None = None
    """What the model computes. None: as its files say."""
    route: str | None = None
    """The route of an asymmetric model to load; None for all of them. Not a setting."""
    pooling: Pooling | None = None
    normalize: bool | None = None
    max_length: int | None = None
    """Longest input in tokens, special tokens included."""
    prompts: Mapping[str, str] | None = None
    """Prompts by name, in addition to those of the repository. A prompt is put before each input."""
    dimensions: tuple[int, ...] | Literal["any"] | None = None
    """Sizes to which requests may truncate vectors, in addition to those that the model declares."""
    token_input: TokenInput = "auto"
    """Tokenizer of token ids in requests: that of OpenAI's embedding models, or that of the model. auto: that of OpenAI, but
    ids that look like those of the model are rejected."""
    truncate: Truncate | None = None
    """Side from which inputs that are too long are cut, if the request sets none. NONE: they are rejected. None: the side
    that the tokenizer of the model declares, which is nearly always END."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """All aliases of the model. The first one names it in logs and metrics."""
        return self.alias, *self.more_aliases

    def defaults_of(self, name: str) -> RequestDefaults:
        """Return the defaults of requests that use a name.

        For a name that is not an alias, they are those of the first alias without its `input_type`.
        """
        if name == self.alias:
            return self.defaults
        return self.more_aliases.get(name) or replace(self.defaults, input_type=None)


@dataclass(frozen=True, slots=True)
class RepositoryAddress:
    """The repository that a web page of a hub shows."""

    source: Literal["huggingface", "modelscope"]
    name: str
    revision: str | None


_HOSTS: Mapping[str, Literal["huggingface", "modelscope"]] = {
    "huggingface.co": "huggingface",
    "hf.co": "huggingface",
    "hf-mirror.com": "huggingface",
    "modelscope.cn": "modelscope",
    "modelscope.ai": "modelscope",
}
_DEFAULT_BRANCHES = {"huggingface": "main", "modelscope": "master"}
_OTHER_PAGES = ("datasets", "spaces", "studios", "collections", "papers", "docs", "blog", "learn", "organization")
_REVISION_PAGES = ("tree", "blob", "resolve", "raw", "commit", "commits")
"""Parts of a path that are followed by a revision, which has its slashes escaped."""


def parse_address(text: str) -> RepositoryAddress | None:
    """Return the repository of a URL of a hub, with or without its scheme, or None if a text is not a URL of a hub.

    Raises:
        ValueError: It is another URL, or the hub's page of something else, such as a dataset.
    """
    ssh = re.fullmatch(r"git@([\w.-]+):(.+)", text.strip())
    scheme, separator, rest = (f"{ssh[1]}/{ssh[2]}" if ssh is not None else text.strip()).rpartition("://")
    try:
        url = urlsplit(f"//{rest}")
    except ValueError:
        if separator:
            raise
        return None
    source = _HOSTS.get((url.hostname or "").removeprefix("www."))
    if source is None and not separator:
        return None
    if source is None or scheme.lower() not in ("", "http", "https"):
        raise ValueError(f"{text} is not the URL of a model on {', '.join(_HOSTS)}: write owner/name")
    parts = [unquote(part) for part in url.path.split("/") if part]
    if source == "modelscope" and parts[:1] == ["models"]:
        del parts[0]
    if not parts or parts[0] in _OTHER_PAGES:
        raise ValueError(f"{text} is not the page of a model: open that page, and copy its URL, or write owner/name")
    length = 2 if len(parts) > 1 and parts[1] not in _REVISION_PAGES else 1  # a few old repositories have no owner
    name, _, revision = "/".join(parts[:length]).partition("@")
    page, query = parts[length:], parse_qs(url.query)
    if not revision and len(page) > 1 and page[0] in _REVISION_PAGES and page[1] != _DEFAULT_BRANCHES[source]:
        revision = page[1]
    if not revision:
        revision = next((query[key][0] for key in ("revision", "Revision", "version") if key in query), "")
    return RepositoryAddress(source, name.removesuffix(".git"), revision or None)


_CACHED = re.compile(
    r"/models--([\w.-]+?)--([\w.-]+)(?:/snapshots/[^/]+)?$|/models/([\w.-]+?)--([\w.-]+)/snapshots/[^/]+$", re.ASCII
)
"""Directories of one model in the caches of Hugging Face's and ModelScope's clients."""


def name_of_directory(directory: Path) -> str:
    """Return the name of the model in a directory.

    It is that of the original if the directory is a mirror, the id of the repository in the caches of the hubs' clients,
    whose directories have the names of commits and branches, and else the name of the directory.
    """
    try:
        name = json.loads((directory / MIRROR_MANIFEST).read_bytes())["name"]
    except (OSError, ValueError, KeyError, TypeError):  # an invalid manifest is an error when the model is loaded
        name = None
    is_valid = isinstance(name, str) and bool(name) and name == name.strip() and name.isprintable()
    if is_valid:
        return str(name)
    path = directory.absolute()
    snapshot = _CACHED.search(path.as_posix())
    return "/".join(filter(None, snapshot.groups())) if snapshot is not None else path.resolve().name
