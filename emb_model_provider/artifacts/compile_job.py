"""What the compile process is told, and what it tells: one JSON object a line, over its stdin and stdout."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from emb_model_provider.artifacts.recipe import Recipe
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile

if TYPE_CHECKING:
    from collections.abc import Mapping

Outcome = Literal["done", "refused", "unsupported", "broken", "unable"]
"""How a compile ended.

`done`: the directory holds an artifact. `refused`: it was made, and its vectors are not true enough.
`unsupported`: the pipeline cannot be exported. `broken`: the snapshot gives no pipeline, on any backend.
`unable`: this machine cannot compile now, since a disk is full or a package cannot be imported.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One artifact to make."""

    spec: ModelSpec
    """Without a token: nothing is fetched."""
    snapshot: Snapshot
    recipe: Recipe
    directory: Path
    """An empty directory to make it in."""
    threads: int
    """How many threads may compute."""
    parent: int
    """The process that asked; the child ends with it."""

    def to_json(self) -> str:
        """Return the job as one line."""
        spec = asdict(replace(self.spec, token=None, cache_dir=None, endpoint=None))
        return json.dumps(
            {
                "spec": {**spec, "path": None},
                "snapshot": {**asdict(self.snapshot), "path": str(self.snapshot.path)},
                "recipe": asdict(self.recipe),
                "directory": str(self.directory),
                "threads": self.threads,
                "parent": self.parent,
            }
        )

    @classmethod
    def from_json(cls, line: str) -> Job:
        """Read what `to_json` wrote.

        Raises: ValueError, KeyError or TypeError for anything else.
        """
        values = json.loads(line)
        return cls(
            spec=_spec(values["spec"]),
            snapshot=_snapshot(values["snapshot"]),
            recipe=Recipe(**{**values["recipe"], "compute": tuple(values["recipe"]["compute"])}),
            directory=Path(values["directory"]),
            threads=int(values["threads"]),
            parent=int(values["parent"]),
        )


@dataclass(frozen=True, slots=True)
class Phase:
    """The child began something that takes a while."""

    name: str

    def to_json(self) -> str:
        return json.dumps({"phase": self.name})


@dataclass(frozen=True, slots=True)
class Result:
    """The child's last line."""

    outcome: Outcome
    reason: str = ""
    """Why there is no artifact, in one line."""

    def to_json(self) -> str:
        return json.dumps({"outcome": self.outcome, "reason": self.reason})


def own_stdout() -> TextIO:
    """Return this process's stdout for events alone: whatever a library prints goes to stderr from now on."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def read_event(line: str) -> Phase | Result:
    """Read a line of the child's.

    Raises: ValueError, KeyError or TypeError where it is none.
    """
    values = json.loads(line)
    if "phase" in values:
        return Phase(str(values["phase"]))
    return Result(values["outcome"], str(values["reason"]))


def _spec(values: Mapping[str, Any]) -> ModelSpec:
    dimensions = values["dimensions"]
    return ModelSpec(
        **{**values, "dimensions": tuple(dimensions) if isinstance(dimensions, list) else dimensions}
    )


def _snapshot(values: Mapping[str, Any]) -> Snapshot:
    files = tuple(SnapshotFile(**file) for file in values["files"])
    return Snapshot(**{**values, "path": Path(values["path"]), "files": files})
