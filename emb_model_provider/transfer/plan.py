"""The plan of a transfer: both repositories are listed once, and compared."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from emb_model_provider.errors import InvalidTransferError, RepositoryNotFoundError, TransferError
from emb_model_provider.formatting import printable
from emb_model_provider.transfer import card, rights
from emb_model_provider.transfer.repository import checked_listing
from emb_model_provider.transfer.session import identify_content
from emb_model_provider.transfer.verify import Comparison, compare

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from emb_model_provider.hubs.transfer import RemoteFile
    from emb_model_provider.transfer.repository import RepositoryInfo
    from emb_model_provider.transfer.session import Session

_LICENSE_ID = re.compile(r"[\w.+ -]{1,100}", re.ASCII)
_OWN_FILES = (".gitattributes",)
"""Files that each hub writes itself: they say which files it keeps in LFS."""


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file that the destination lacks, or has with other bytes."""

    file: RemoteFile
    """As the source lists it; with its content, if that is another one."""
    content: bytes | None = None
    """The bytes to send instead of those of the source, for a card that is merged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a transfer will do. Immutable."""

    revision: str
    """Commit, branch or tag of the source."""
    info: RepositoryInfo
    """What the hub says about the source."""
    license: str | None
    """The license of the copy."""
    creates: bool
    """Whether the destination does not exist yet."""
    files: tuple[PlannedFile, ...]
    """The files to commit."""
    missing: frozenset[str]
    """The sha256 of those whose bytes no repository of the destination's hub has, as far as it was asked."""
    comparison: Comparison
    """Of all files of the source with the destination before the transfer; those that are kept count as the same."""
    kept: tuple[str, ...]
    """Files whose own version, or front matter, the destination keeps."""
    extra: tuple[str, ...]
    """Files that only the destination has. They are kept."""

    @property
    def send_bytes(self) -> int:
        """Bytes to send at most."""
        large = {each.file.sha256: each.file.size for each in self.files if each.file.sha256 in self.missing}
        others = sum(each.file.size for each in self.files if each.file.sha256 is None)
        return sum(large.values()) + others


def make_plan(session: Session, *, checks_rights: bool = True) -> Plan:
    """List both repositories and return what is to be done. Changes nothing.

    Args:
        session: The two repositories.
        checks_rights: Whether to stop before a repository that must not be copied without permission.

    Raises:
        RepositoryNotFoundError: The source does not exist.
        PermissionRequiredError: The source is gated, non-commercial or private.
        LicenseRequiredError: The destination has to be created, and no license is known.
    """
    session.begin("resolve")
    source, destination, options = session.source_location, session.destination_location, session.options
    info = session.ask_source(session.source.describe, f"looking up {source}")
    if info is None:
        raise RepositoryNotFoundError(
            f"There is no repository {source}, or it is private. Check the name and the token."
        )
    session.revision = info.revision
    listed = session.ask_source(lambda: session.source.list_files(session.revision), f"listing {source}")
    files = checked_listing((file for path, file in listed.items() if path not in _OWN_FILES), str(source))
    if not files:
        raise TransferError(f"{source} is empty. Check the name and the revision.")
    if info.license is None and card.README in files:
        info = replace(info, license=card.license_in(session.read_file(files[card.README])))
    existing = session.ask_destination(session.destination.describe, f"looking up {destination}")
    if options.license is not None and not _LICENSE_ID.fullmatch(options.license):
        raise InvalidTransferError(
            f"{options.license!r} is not the id of a license. Use an id such as mit or apache-2.0."
        )
    license_id = options.license or info.license
    if checks_rights:
        if existing is None and destination.site != "directory":
            license_id = rights.find_license(info.license, options.license, str(source))
        if not options.has_permission:
            names = (str(source), str(destination))
            rights.require_permission(info, license_id or "", names[0], files, lambda path: _text(session, files[path]))
            if existing is not None:
                rights.require_private(existing, info, names)
    present: Mapping[str, RemoteFile] = {}
    if existing is not None:
        present = session.ask_destination(
            lambda: session.destination.list_files(session.destination.branch), f"listing {destination}"
        )
    keeps_card = existing is not None and not options.overwrite_card and not session.journal.has_created
    return _compare(session, files, present, info, license_id, creates=existing is None, keeps_card=keeps_card)


def _compare(
    session: Session,
    files: Mapping[str, RemoteFile],
    present: Mapping[str, RemoteFile],
    info: RepositoryInfo,
    license_id: str | None,
    *,
    creates: bool,
    keeps_card: bool,
) -> Plan:
    planned: dict[str, PlannedFile] = {}
    kept: list[str] = []
    own: list[RemoteFile] = []
    compared = dict(files)
    if keeps_card and card.CONFIGURATION in compared and card.CONFIGURATION in present:
        own.append(present[card.CONFIGURATION])
        kept.append(card.CONFIGURATION)
        del compared[card.CONFIGURATION]
    readme = _merged_readme(session, files, present, keeps_card=keeps_card)
    if readme is not None:
        compared.pop(card.README, None)
        merged = identify_content(card.README, readme)
        if keeps_card:
            kept.append(card.README)
        if compare(session, [merged], present).ok:
            own.append(merged)
        else:
            planned[card.README] = PlannedFile(merged, readme)
    comparison = compare(session, compared.values(), present)
    for path in (*comparison.missing, *comparison.different):
        planned[path] = PlannedFile(session.journal.complete(files[path]))
    different = (*comparison.different, *(path for path in planned if path not in compared and path in present))
    missing = (*comparison.missing, *(path for path in planned if path not in compared and path not in present))
    return Plan(
        revision=info.revision,
        info=info,
        license=license_id,
        creates=creates,
        files=tuple(planned[path] for path in sorted(planned)),
        missing=find_missing(session, planned.values(), exists=not creates),
        comparison=Comparison((*comparison.same, *own), different, missing),
        kept=tuple(kept),
        extra=tuple(
            sorted(printable(path) for path in present if path not in files and path not in (*_OWN_FILES, *planned))
        ),
    )


def find_missing(session: Session, planned: Iterable[PlannedFile], *, exists: bool) -> frozenset[str]:
    """Return the sha256 of the planned files whose bytes have to be sent, as far as they are known.

    Of files that are sent within a commit these are all. The hub cannot be asked before the repository exists.
    """
    blobs: list[RemoteFile] = []
    inline: set[str] = set()
    for each in planned:
        if each.file.sha256 is None:
            continue
        if each.content is not None or session.destination.is_inline(each.file.path, each.file.size):
            inline.add(each.file.sha256)
        else:
            blobs.append(each.file)
    if not exists:
        return frozenset(inline | {file.sha256 for file in blobs if file.sha256 is not None})
    if not blobs:
        return frozenset(inline)
    what = f"asking which files {session.destination_location} lacks"
    return session.ask_destination(lambda: session.destination.find_missing(blobs), what) | inline


def _merged_readme(
    session: Session, files: Mapping[str, RemoteFile], present: Mapping[str, RemoteFile], *, keeps_card: bool
) -> bytes | None:
    """Return the README to send if it is not that of the source, else None."""
    if keeps_card and card.README in files and card.README in present:
        with session.read_destination(present[card.README]) as reader:
            own = reader.read()
        merged = card.keep_front_matter(session.read_file(files[card.README]), own)
        return merged if card.keep_front_matter(b"", own) else None
    requested = session.options.license
    if session.destination_location.site == "huggingface" and requested is not None:
        # Hugging Face reads the license in the README.
        return card.set_license(session.read_file(files[card.README]) if card.README in files else b"", requested)
    return None


def _text(session: Session, file: RemoteFile) -> str:
    return session.read_file(file).decode(errors="replace")
