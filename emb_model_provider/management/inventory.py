"""What is on the disk: manifests, markers and artifacts, put together as the models that they are of."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from emb_model_provider.artifacts.store import Stock
from emb_model_provider.errors import NotCachedError
from emb_model_provider.hubs.caches import all_in, cache_root
from emb_model_provider.management.types import CachedSnapshot, DerivedArtifact
from emb_model_provider.snapshots import journal as markers
from emb_model_provider.snapshots.files import size_of
from emb_model_provider.snapshots.locks import SnapshotHolds, is_held
from emb_model_provider.snapshots.manifest import Manifest, Question, manifest_files

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from emb_model_provider.artifacts.store import StockedArtifact
    from emb_model_provider.management.types import Completeness
    from emb_model_provider.model_spec import HubName
    from emb_model_provider.settings import Settings
    from emb_model_provider.snapshots.journal import Pending

CLIENTS: tuple[HubName, ...] = ("huggingface", "modelscope")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A model on disk, and what speaks for it."""

    entry: CachedSnapshot
    manifests: Sequence[tuple[Question, Manifest]] = ()
    """Every question that led to this directory, with its answer."""
    pending: Sequence[Pending] = ()

    @property
    def digests(self) -> set[str]:
        return {found.snapshot.digest for _, found in self.manifests}

    @property
    def place(self) -> tuple[str, str, Path | None]:
        return self.entry.hub, self.entry.name, self.entry.path

    def is_same(self, other: Record) -> bool:
        """Whether it is the same model at the same place, perhaps further on its way."""
        if self.place[:2] != other.place[:2]:
            return False
        return self.entry.path == other.entry.path or not set(self.questions).isdisjoint(other.questions)

    @property
    def questions(self) -> list[Question]:
        return [question for question, _ in self.manifests] + [each.question for each in self.pending]


class Inventory:
    """Looks at the disk anew each time it is asked. Changes nothing."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        hubs = settings.hubs()
        self.manifest_dir = hubs.cache_dir / "snapshots"
        self.stock = Stock(hubs.cache_dir)
        self.holds = SnapshotHolds(hubs.cache_dir)

    def roots(self, hub: HubName) -> tuple[Path, ...]:
        """The caches of a hub's client that the settings name."""
        if hub not in CLIENTS:
            return ()
        hubs = self._settings.hubs()
        common = hubs.hf_cache_dir if hub == "huggingface" else hubs.modelscope_cache_dir
        own = [spec.cache_dir for spec in self._settings.models().specs if spec.cache_dir is not None]
        return tuple(dict.fromkeys(cache_root(hub, directory) for directory in (common, *own)))

    def records(self, *, everything: bool = False) -> list[Record]:
        """Return all models, by name, hub and revision; `everything`: those, too, that others left in the clients' caches."""
        artifacts: dict[str, list[StockedArtifact]] = {}
        for artifact in self.stock.artifacts():
            artifacts.setdefault(artifact.snapshot, []).append(artifact)
        answered: dict[tuple[str, str], list[tuple[Question, Manifest]]] = {}
        for question, found in manifest_files(self.manifest_dir):
            answered.setdefault((question.hub, str(found.snapshot.path)), []).append((question, found))
        unfinished = self._markers()
        records = [self._record(found, unfinished, artifacts) for found in answered.values()]
        done = {question for record in records for question, _ in record.manifests}
        records += [self._unfinished(each) for each in unfinished if each.question not in done]
        if everything:
            known = {record.entry.path for record in records}
            records += [Record(entry=entry) for entry in self._unverified() if entry.path not in known]
        return sorted(
            records, key=lambda r: (r.entry.name.lower(), r.entry.hub, r.entry.asked_revision or "")
        )

    def record_of(self, entry: CachedSnapshot) -> Record:
        """Return what speaks for a model now. Raises: NotCachedError where it is gone."""
        place = (entry.hub, entry.name, entry.path)
        everything = entry.state == "unverified"
        for record in self.records(everything=everything):
            if record.place == place:
                return record
        raise NotCachedError(f"{entry.name} is not on this machine any more (`emb-provider list`).")

    # --- putting together -------------------------------------------------------------------------------

    def _record(
        self,
        found: Sequence[tuple[Question, Manifest]],
        unfinished: Sequence[Pending],
        artifacts: dict[str, list[StockedArtifact]],
    ) -> Record:
        # All that serving needs, at the default branch, stands for a directory that several questions led to.
        found = sorted(found, key=lambda each: (_has_patterns(each[0]), each[0].revision or ""))
        question, first = found[0]
        snapshot = first.snapshot
        sizes = {file.path: file.size for _, each in found for file in each.snapshot.files}
        derived = [
            self._derived(artifact)
            for digest in dict.fromkeys(each.snapshot.digest for _, each in found)
            for artifact in artifacts.get(digest, [])
        ]
        path = snapshot.path
        questions = {each for each, _ in found}
        entry = CachedSnapshot(
            name=question.repository,
            hub=question.hub,
            endpoint=question.endpoint,
            asked_revision=question.revision,
            revision=snapshot.revision,
            path=path,
            state=_state(path, sizes, [each for _, each in found]),
            size=sum(sizes.values()),
            fetched=_latest(each.fetched for _, each in found),
            last_used=_latest(_mtime(each.manifest_path(self.manifest_dir)) for each in questions),
            digest=snapshot.digest,
            artifacts=tuple(derived),
            in_use=self._in_use(question, path) or any(artifact.in_use for artifact in derived),
        )
        own = [each for each in unfinished if each.question in questions]
        return Record(entry=entry, manifests=found, pending=own)

    def _unfinished(self, pending: Pending) -> Record:
        question = pending.question
        left = markers.leftovers(pending, [])
        path = pending.path or _common_snapshot(pending, left)
        size = size_of(pending.path) if pending.path is not None else sum(map(_bytes, left))
        entry = CachedSnapshot(
            name=question.repository,
            hub=question.hub,
            endpoint=question.endpoint,
            asked_revision=question.revision,
            revision=None,
            path=path,
            state="incomplete",
            size=size,
            fetched=None,
            last_used=_latest([pending.touched]),
            digest=None,
            artifacts=(),
            in_use=self._in_use(question, path),
        )
        return Record(entry=entry, pending=[pending])

    def _markers(self) -> list[Pending]:
        """The markers of fetches and removals in caches that the settings name: no other place is looked into."""
        return [
            pending
            for pending in markers.load_all(self.manifest_dir)
            if {place.root for place in pending.places} <= {*self.roots(pending.question.hub)}
        ]

    def _unverified(self) -> Iterable[CachedSnapshot]:
        for hub in CLIENTS:
            for root in self.roots(hub):
                for found in all_in(hub, root):
                    yield CachedSnapshot(
                        name=found.repository,
                        hub=hub,
                        endpoint=None,
                        asked_revision=None,
                        revision=found.revision,
                        path=found.path,
                        state="unverified",
                        size=size_of(found.path),
                        fetched=None,
                        last_used=None,
                        digest=None,
                        artifacts=(),
                        in_use=False,
                    )

    def _derived(self, artifact: StockedArtifact) -> DerivedArtifact:
        return DerivedArtifact(
            key=artifact.key,
            snapshot=artifact.snapshot,
            precision=artifact.weights,
            computed=artifact.computed,
            size=artifact.size,
            last_used=datetime.fromtimestamp(artifact.last_used, UTC),
            fidelity=artifact.fidelity,
            in_use=self.stock.is_held(artifact.key),
        )

    def _in_use(self, question: Question, path: Path | None) -> bool:
        if is_held(question.lock_path(self.manifest_dir)):
            return True
        return path is not None and self.holds.is_held(path)


def _state(path: Path, sizes: dict[str, int], manifests: Sequence[Manifest]) -> Completeness:
    if any(each.distrusted for each in manifests):
        return "damaged"
    try:
        whole = all((path / name).stat().st_size == size for name, size in sizes.items())
    except OSError:
        return "damaged"
    return "complete" if whole else "damaged"


def _has_patterns(question: Question) -> bool:
    return bool(question.include or question.exclude)


def _common_snapshot(pending: Pending, left: Sequence[Path]) -> Path | None:
    """The directory of the snapshot that a fetch had begun, where it got so far."""
    for place in pending.places:
        for file in left:
            if file.is_relative_to(place.path) and not place.locks:
                parts = file.relative_to(place.path).parts
                if parts[0] == "snapshots" and len(parts) > 2:
                    return place.path / "snapshots" / parts[1]
    return None


def _bytes(path: Path) -> int:
    """Of a file, not of what it links to; nothing once it is gone: a fetch renames what it has brought."""
    try:
        return 0 if path.is_symlink() else path.lstat().st_size
    except OSError:
        return 0


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _latest(times: Iterable[float | None]) -> datetime | None:
    known = [each for each in times if each is not None]
    return datetime.fromtimestamp(max(known), UTC) if known else None
