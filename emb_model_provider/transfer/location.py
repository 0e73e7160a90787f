"""Where a repository is transferred from or to: a hub with the id of a repository, or a directory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from emb_model_provider.errors import InvalidTransferError
from emb_model_provider.model_spec import parse_address

Site = Literal["huggingface", "modelscope", "directory"]

_PREFIXES: Final[dict[str, Site]] = {
    "hf": "huggingface",
    "huggingface": "huggingface",
    "ms": "modelscope",
    "modelscope": "modelscope",
    "dir": "directory",
}
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[\w./-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Location:
    """A repository on a hub, or a directory."""

    site: Site
    name: str
    """`owner/name`, or the absolute path of the directory."""
    revision: str | None = None
    """Branch, tag or commit; None: the default branch."""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision is not None else ""
        return f"{self.site}:{self.name}{revision}"


def parse_source(text: str) -> Location:
    """Return the location that `[hf:|ms:]owner/name[@REV]`, or a URL of a hub, names.

    Without a prefix it is on Hugging Face.

    Raises:
        InvalidTransferError: The text is not a location.
    """
    site, name = _split(text, "huggingface")
    if site == "directory":
        raise InvalidTransferError(f"{text!r}: a directory cannot be the source. Use hf:owner/name or ms:owner/name.")
    repository, at, revision = name.partition("@")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InvalidTransferError(f"{text!r}: {revision!r} is not a branch, tag or commit.")
    return Location(site, _checked(repository, text), revision or None)


def parse_destination(text: str, source: Location) -> Location:
    """Return the location that `[hf:|ms:]owner/name` or `dir:PATH` names.

    Without a prefix it is on ModelScope, or on Hugging Face if the source is on ModelScope.

    Raises:
        InvalidTransferError: The text is not a location, or it is the source.
    """
    site, name = _split(text, "huggingface" if source.site == "modelscope" else "modelscope")
    if site == "directory":
        if not name:
            raise InvalidTransferError(f"{text!r}: write the path of the directory after dir:")
        return Location(site, str(Path(name).expanduser().absolute()))
    if "@" in name:
        raise InvalidTransferError(f"{text!r}: files are committed to the default branch. Remove the revision.")
    destination = Location(site, _checked(name, text))
    if (destination.site, destination.name) == (source.site, source.name):
        raise InvalidTransferError(f"{text!r} is both the source and the destination.")
    return destination


def _split(text: str, default: Site) -> tuple[Site, str]:
    try:
        address = parse_address(text)
    except ValueError as error:
        raise InvalidTransferError(f"{error}.") from None
    if address is not None:
        return address.source, address.name if address.revision is None else f"{address.name}@{address.revision}"
    prefix, colon, rest = text.strip().partition(":")
    if not colon:
        return default, prefix
    if prefix not in _PREFIXES:
        raise InvalidTransferError(f"{text!r}: unknown prefix {prefix!r}. Use hf:, ms: or dir:.")
    return _PREFIXES[prefix], rest


def _checked(name: str, text: str) -> str:
    if not _ID.fullmatch(name) or ".." in name:
        raise InvalidTransferError(
            f"{text!r} is not the id of a repository. Write owner/name, such as BAAI/bge-small-zh-v1.5."
        )
    return name
