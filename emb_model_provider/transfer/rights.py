"""Whether a repository may be copied: its license, and whether it is gated or private."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from emb_model_provider.errors import LicenseRequiredError, PermissionRequiredError
from emb_model_provider.formatting import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from emb_model_provider.transfer.repository import RepositoryInfo

_UNNAMED = frozenset({"", "unknown", "none", "other"})
"""Values that name no license."""
_NON_COMMERCIAL = re.compile(
    r"(?<![a-z])nc(?![a-z])|non-?_? ?commercial|research|academic|evaluation|amlr", re.IGNORECASE
)
_LICENSE_FILES = re.compile(r"(licen[cs]e|copying|notice)(\.(md|txt|rst))?", re.IGNORECASE)
_MAX_TEXT_CHARS = 2000


def find_license(declared: str | None, requested: str | None, source: str) -> str:
    """Return the license of the copy.

    Raises:
        LicenseRequiredError: The source names no license, and none was requested. ModelScope would label the copy
            Apache-2.0.
    """
    license_id = requested or declared or ""
    if license_id.strip().lower() in _UNNAMED and requested is None:
        raise LicenseRequiredError(
            f"{source} names no license. Find out under which license it may be copied, and add --license ID, for example "
            "--license mit."
        )
    return license_id.strip()


def require_permission(
    info: RepositoryInfo, license_id: str, source: str, files: Iterable[str], read_text: Callable[[str], str]
) -> None:
    """Stop before a gated or non-commercial repository is copied, and show its license.

    Args:
        info: What the source's hub says.
        license_id: The license of the copy.
        source: The name of the source, for the message.
        files: The paths of the source's files.
        read_text: Returns the text of a file.

    Raises:
        PermissionRequiredError: It is gated, or the license restricts its use. The message contains the license.
    """
    reasons = ["is gated"] if info.gated else []
    restricted = [each for each in {info.license, license_id} if each and _NON_COMMERCIAL.search(each)]
    if restricted:
        reasons.append(f"has a license that does not allow every use ({restricted[0]})")
    if not reasons:
        return
    name = min((path for path in files if _LICENSE_FILES.fullmatch(path)), key=len, default=None)
    text = f"The license is {license_id}; the repository has no license file."
    if name is not None:
        content = printable(read_text(name).replace("\r\n", "\n"))
        more = " …" if len(content) > _MAX_TEXT_CHARS else ""
        text = f"{name}:\n\n{content[:_MAX_TEXT_CHARS].strip()}{more}"
    raise PermissionRequiredError(
        f"{source} {' and '.join(reasons)}: nothing was transferred. If the license and the owner allow you to copy it, "
        f"run the command again with --i-have-permission.\n{text}"
    )


def require_private(destination: RepositoryInfo, source: RepositoryInfo, names: tuple[str, str]) -> None:
    """Refuse to copy a private or gated repository into one that everyone can read.

    Raises:
        PermissionRequiredError: The destination exists and is public.
    """
    if (source.private or source.gated) and not destination.private:
        kind = "private" if source.private else "gated"
        raise PermissionRequiredError(
            f"{names[0]} is {kind}, but {names[1]} is public: nothing was transferred. Make the destination private, or "
            "run the command again with --i-have-permission."
        )
