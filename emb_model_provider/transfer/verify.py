"""Compares the destination of a transfer with what it should contain, by the hashes that the hubs list."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from emb_model_provider.hubs.transfer import RemoteFile
    from emb_model_provider.transfer.session import Session


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of comparing files with a listing."""

    same: tuple[RemoteFile, ...] = ()
    """With the hashes that were compared."""
    different: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.different and not self.missing


def compare(session: Session, expected: Iterable[RemoteFile], listing: Mapping[str, RemoteFile]) -> Comparison:
    """Compare files of the source, or of a plan, with a listing of the destination.

    A file is read only if its size is right and the hubs list different kinds of hashes of it: from the source, and from
    the destination if that lists no hash.
    """
    same: list[RemoteFile] = []
    different: list[str] = []
    missing: list[str] = []
    present = []
    for file in expected:
        if file.path in listing:
            present.append(file)
        else:
            missing.append(file.path)
    for file, checked in zip(
        present, session.map(lambda file: _check(session, file, listing[file.path]), present), strict=True
    ):
        if checked is None:
            different.append(file.path)
        else:
            same.append(checked)
    return Comparison(tuple(same), tuple(different), tuple(missing))


def agree(file: RemoteFile, listed: RemoteFile) -> bool | None:
    """Return whether two listings describe the same bytes; None if they have no hash in common."""
    if file.size != listed.size:
        return False
    if file.sha256 and listed.sha256:
        return file.sha256 == listed.sha256
    if file.git_sha1 and listed.git_sha1:
        return file.git_sha1 == listed.git_sha1
    return None


def _check(session: Session, file: RemoteFile, listed: RemoteFile) -> RemoteFile | None:
    """Return the file with the hash that was compared, or None if the destination has other bytes."""
    known = session.journal.complete(file)
    verdict = agree(known, listed)
    if verdict is None and (listed.sha256 or listed.git_sha1):
        known = session.identify(file)
        verdict = agree(known, listed)
    if verdict is None:
        with session.read_destination(replace(listed, sha256=None, git_sha1=None)) as reader:
            reader.drain()
            listed = replace(listed, sha256=reader.sha256, git_sha1=reader.git_sha1)
        verdict = agree(known, listed)
    return known if verdict else None
