"""Messages between the service and the compiler process: one JSON object per line, over its stdin and stdout."""

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

`done`: the directory contains an artifact. `refused`: it was made, but its vectors are not accurate enough.
`unsupported`: the pipeline cannot be exported. `broken`: the snapshot cannot be loaded by any backend.
`unable`: this machine cannot compile now, because a disk is full or a package cannot be imported.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileJob:
    """An artifact to compile."""

    spec: ModelSpec
    """Sent without its token, because nothing is downloaded."""
    snapshot: Snapshot
    recipe: Recipe
    directory: Path
    """An empty directory for its files."""
    threads: int
    """Number of threads for computing."""
    parent: int
    """Process id of the service; the compiler ends when it ends."""

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
    def from_json(cls, line: str) -> CompileJob:
        """Read what `to_json` returned.

        Raises:
            ValueError, KeyError, TypeError: The line is not a job.
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
class CompileStep:
    """The compiler began a step that takes a while."""

    name: str

    def to_json(self) -> str:
        return json.dumps({"phase": self.name})


@dataclass(frozen=True, slots=True)
class CompileResult:
    """The last message of the compiler."""

    outcome: Outcome
    reason: str = ""
    """Why there is no artifact, in one line."""

    def to_json(self) -> str:
        return json.dumps({"outcome": self.outcome, "reason": self.reason})


def reserve_stdout() -> TextIO:
    """Reserve stdout for messages: from now on, whatever a library prints goes to stderr.

    Returns:
        The stream for messages.
    """
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def read_event(line: str) -> CompileStep | CompileResult:
    """Read a message of the compiler.

    Raises:
        ValueError, KeyError, TypeError: The line is not a message.
    """
    values = json.loads(line)
    if "phase" in values:
        return CompileStep(str(values["phase"]))
    return CompileResult(values["outcome"], str(values["reason"]))


def _spec(values: Mapping[str, Any]) -> ModelSpec:
    dimensions = values["dimensions"]
    return ModelSpec(**{**values, "dimensions": tuple(dimensions) if isinstance(dimensions, list) else dimensions})


def _snapshot(values: Mapping[str, Any]) -> Snapshot:
    files = tuple(SnapshotFile(**file) for file in values["files"])
    return Snapshot(**{**values, "path": Path(values["path"]), "files": files})
