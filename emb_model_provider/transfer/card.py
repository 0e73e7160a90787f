"""The card of a repository: README.md with its front matter, which a hub reads."""

from __future__ import annotations

import re

from emb_model_provider.formatting import printable

README = "README.md"
CONFIGURATION = "configuration.json"
"""What ModelScope reads to run a model, next to the front matter of README.md."""

_FRONT_MATTER = re.compile(rb"\A(?:\xef\xbb\xbf)?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_LICENSE = re.compile(r"^license:[ \t]*(?:\r?\n[ \t]*-[ \t]+)?[\"']?([^\"'#\r\n]+)", re.MULTILINE)
_LICENSE_LINES = re.compile(rb"^license(_name|_link)?:.*\n([ \t]*-[ \t].*\n)*", re.MULTILINE)
_LICENSE_NAME = re.compile(r"^license_name:[ \t]*[\"']?([^\"'#\r\n]+)", re.MULTILINE)


def license_in(readme: bytes) -> str | None:
    """Return the license in the front matter of a README, the first one of several; None if there is none."""
    match = _FRONT_MATTER.match(readme)
    if match is None:
        return None
    text = match[1].decode(errors="replace")
    return license_of(*(found[1] if (found := each.search(text)) else None for each in (_LICENSE, _LICENSE_NAME)))


def license_of(license_id: str | None, name: str | None) -> str | None:
    """Return the license that a card names: its id, or its name if the id is `other`."""
    named = name if license_id == "other" and name else license_id
    return printable((named or "").strip()) or None


def keep_front_matter(readme: bytes, own: bytes) -> bytes:
    """Return the text of `readme` with the front matter of `own`, if that has one."""
    kept = _FRONT_MATTER.match(own)
    if kept is None:
        return readme
    replaced = _FRONT_MATTER.match(readme)
    return kept[0] + (readme[replaced.end() :] if replaced is not None else readme)


def set_license(readme: bytes, license_id: str) -> bytes:
    """Return a README whose front matter names a license, for a hub that reads it there."""
    line = f"license: {license_id}\n".encode()
    match = _FRONT_MATTER.match(readme)
    if match is None:
        return b"---\n" + line + b"---\n" + readme
    return readme[: match.start(1)] + line + _LICENSE_LINES.sub(b"", match[1]) + readme[match.end(1) :]
