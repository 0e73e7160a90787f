"""What is known of models on disk, as REST, the command line and Python show it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from emb_model_provider.model_spec import HubName

if TYPE_CHECKING:
    from emb_model_provider.backends.base import BackendKind, Fidelity, ModelDescription
    from emb_model_provider.snapshots.snapshot import Snapshot

State = Literal["complete", "incomplete", "damaged", "unverified"]
"""complete: it has a manifest, and its files exist at their sizes. incomplete: a download or removal was interrupted.
damaged: files are missing or have wrong bytes. unverified: it is in a hub's cache without a manifest of ours, because
another program downloaded it."""
JobState = Literal["queued", "running", "done", "failed", "cancelled"]
JobKind = Literal["download", "transfer"]
JobPhase = Literal["resolve", "download", "transfer", "verify", "compile"]


class Record(BaseModel):
    """Base of all records that leave this package."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ScoreFidelityObject(BaseModel):
    """How close the logits of a reranker or classifier are to those at fp32."""

    max_difference: float = Field(description="Largest absolute difference of a logit.")
    relative_difference: float = Field(
        description="Largest difference, relative to the spread of the logits of the same query (or label)."
    )
    spearman: float = Field(
        description="Lowest rank correlation of the documents of a query (or the texts of a label)."
    )
    pairs: int = Field(description="How many pairs or texts were compared.")


class SparseFidelityObject(BaseModel):
    """How close sparse vectors are to those at fp32."""

    term_overlap: float = Field(description="Share of the 32 strongest terms that are also those at fp32, on average.")
    score_error: float = Field(description="Largest error of a dot product of two texts, relative to their lengths.")
    texts: int


class MultiVectorFidelityObject(BaseModel):
    """How close the vectors of tokens are to those at fp32."""

    min_cosine: float = Field(description="Lowest cosine of the vector of a token.")
    maxsim_error: float = Field(
        description="Largest difference of a MaxSim score, relative to that of the query itself."
    )
    texts: int


class FidelityObject(BaseModel):
    """How close a model's results are to those at fp32, measured before it was served."""

    min_cosine: float | None = Field(
        description="Lowest cosine of a vector to that of the same text at fp32. null: the model has no dense vectors."
    )
    mean_cosine: float | None
    top10_overlap: float | None = Field(
        description="Share of each text's ten nearest neighbors that are the same as at fp32, 0 to 1."
    )
    spearman: float | None = Field(description="Rank correlation of all pairs' similarities, -1 to 1.")
    texts: int = Field(description="How many texts or pairs were compared.")
    agreement: dict[str, float] = Field(
        description="How close each output of the model is to that at fp32, at most 1. The floors apply to these values."
    )
    scores: ScoreFidelityObject | None = None
    sparse: SparseFidelityObject | None = None
    multi_vector: MultiVectorFidelityObject | None = None

    @classmethod
    def of(cls, fidelity: Fidelity | None) -> FidelityObject | None:
        return cls.model_validate(fidelity, from_attributes=True) if fidelity is not None else None


class CachedArtifact(Record):
    """A compiled form of a snapshot."""

    key: str
    snapshot: str = Field(exclude=True)
    """Digest of the snapshot that it was compiled from."""
    precision: str = Field(description="Precision of the stored weights.")
    computed: str = Field(description="Precision of the computation.")
    size: int
    last_used: datetime
    fidelity: FidelityObject | None
    in_use: bool


class CachedModelRecord(Record):
    """The files of a model on disk, at one revision, from one hub."""

    id: str = Field(description="The name as one part of a path: `Qwen_Qwen3-0.6B` for `Qwen/Qwen3-0.6B`.")
    model_name: str = Field(description="The repository id on its hub, or a directory.")
    source: HubName
    asked_revision: str | None = Field(description="As it was requested; null: the hub's default branch.")
    revision: str | None = Field(description="Resolved; null if it is unknown.")
    path: str | None = Field(description="Directory of the files; null if there are none.")
    state: State
    size: int = Field(description="Size of its files and compiled forms.")
    files_size: int
    artifacts: list[CachedArtifact]
    fetched: datetime | None
    last_used: datetime | None
    in_use: bool = Field(description="Loaded, being loaded or being downloaded, by this or another program.")


class CachedFile(Record):
    """A file of a snapshot."""

    path: str
    size: int
    sha256: str


class Details(BaseModel):
    """What the files of a model, or its compiled form, declare. null: they do not declare it."""

    dimensions: int | None
    max_tokens: int | None = Field(description="Longest input.")
    pooling: str | None
    normalized: bool | None
    prompts: dict[str, str] | None
    default_prompt: str | None
    matryoshka: list[int] | Literal["any"] | None = Field(description="Smaller sizes that vectors can be cut to.")
    license: str | None
    mirror_of: str | None = Field(description="Repository and hub, if the directory is a mirror.")
    notes: list[str]
    files: list[CachedFile]


class Finding(Record):
    """A file that differs from its record."""

    path: str
    problem: Literal["missing", "size", "bytes", "unreadable", "extra"] = Field(
        description="extra: a mirror contains it, and its manifest does not."
    )


class Verification(CachedModelRecord):
    """A model whose files and compiled forms were all read and hashed again."""

    ok: bool
    findings: list[Finding]
    damaged_artifacts: list[str] = Field(description="Keys of compiled forms whose files have changed.")


class KeptModel(CachedModelRecord):
    """A model that was not removed."""

    reason: str


class Removal(Record):
    """What was removed; of a dry run, what would be."""

    models: list[CachedModelRecord] = Field(description="As they were.")
    artifacts: list[str] = Field(description="Keys of the compiled forms that were removed with them.")
    freed: int = Field(description="Bytes.")
    kept: list[KeptModel] = Field(description="Models that are in use.")


class DownloadRecord(Record):
    """A download, or a transfer to another hub, at one moment."""

    id: str
    kind: JobKind
    state: JobState
    model_name: str
    source: str = Field(description="The hub that is used; when it is done, the hub that the files came from.")
    asked_revision: str | None
    revision: str | None = Field(description="Resolved; null until it is done.")
    force: bool
    compile: bool
    precision: str | None = Field(description="Precision that it is compiled at; null if it is not compiled.")
    destination: str | None = Field(description="Where a transfer copies the model to; null for a download.")
    phase: JobPhase | None = Field(description="What it does, or did when it ended. Null before it begins.")
    done_bytes: int = Field(description="Of this phase. Decreases if a file is downloaded again.")
    total_bytes: int | None
    bytes_per_s: float | None = Field(description="Over the last seconds; null while nothing is transferred or read.")
    step_number: int | None = Field(description="Step of compiling, from 1; null in other phases.")
    step_count: int | None
    seconds_left: float | None = Field(description="Estimate of how long compiling takes from now on.")
    cancelling: bool = Field(description="It was cancelled, and ends as soon as it can.")
    error: str | None = Field(description="Why it failed, and what to do.")
    error_code: str | None
    created: datetime
    started: datetime | None
    ended: datetime | None
    path: str | None = Field(description="Directory of the files, when it is done.")
    notes: list[str] = Field(description="Notes on how it was compiled, or what was transferred.")

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledModel:
    """A model that can be loaded within seconds."""

    snapshot: Snapshot
    backend: BackendKind
    """`openvino` serves from a compiled artifact, `torch` from the snapshot itself."""
    size: int
    """Bytes on disk of what it is loaded from."""
    description: ModelDescription | None
    """Description of the artifact, with its fidelity; None for torch, which is described when it is loaded."""
    notes: tuple[str, ...]
    """Why it is not the expected backend."""
