"""Loads a repository that has an ONNX file, or an export to OpenVINO, and no weights for torch.

Tokenizer, configuration and the modules after the transformer are loaded as those of any other model. In the place of
the weights of the transformer there is a file of zeros, because sentence-transformers loads the rest only with them.
Only the export computes.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoConfig, AutoModel, MT5EncoderModel, T5EncoderModel, UMT5EncoderModel

from emb_model_provider.backends.pytorch.description import describe
from emb_model_provider.backends.pytorch.heads import serve_pipeline
from emb_model_provider.backends.pytorch.pipeline import explain_error, load_pipeline
from emb_model_provider.backends.pytorch.view import open_view
from emb_model_provider.backends.repository import Repository
from emb_model_provider.compiler.export import has_token_vectors
from emb_model_provider.errors import LoadError, UnsupportedModelError
from emb_model_provider.snapshots.snapshot import SnapshotFile

if TYPE_CHECKING:
    from pathlib import Path

    from sentence_transformers.base.model import BaseModel

    from emb_model_provider.backends.base import ModelDescription
    from emb_model_provider.backends.pipeline_plan import PipelinePlan
    from emb_model_provider.snapshots.snapshot import Snapshot

_ENCODERS = {"t5": T5EncoderModel, "mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}
"""Model types of which sentence-transformers loads the encoder only."""
_WEIGHTS = "model.safetensors"
_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}
_GUESS = "the repository does not say how its vectors are made"
"""Beginning of the note of a plan that guesses the pooling, which an export with pooled vectors does not need."""


def load_prebuilt(
    plan: PipelinePlan, snapshot: Snapshot, export: str, *, trust_remote_code: bool
) -> tuple[BaseModel, ModelDescription]:
    """Load a pipeline whose transformer has zeros as weights, and describe it for the export.

    Args:
        plan: The plan of the pipeline.
        snapshot: The files of the repository.
        export: The path of the export among them.
        trust_remote_code: Whether code of the repository may run.

    Returns:
        The pipeline, without a Pooling if the export returns pooled vectors only, and its description.

    Raises:
        LoadError: The repository cannot be loaded, or the export does not fit its configuration.
    """
    repository = Repository.of(snapshot, plan.route)
    if not repository.config:
        raise UnsupportedModelError(
            f"{repository.name} has no config.json, which says what {export} computes. Copy the config.json of the model "
            "that it was made from next to it."
        )
    with open_view(repository, snapshot.digest) as directory:
        try:
            _write_zeros(directory / repository.folder, trust_remote_code=trust_remote_code)
        except Exception as error:
            raise explain_error(error, repository.name, str(directory)) from error
        stand_in = replace(snapshot, path=directory, files=_files_of(directory), dependencies=())
        pipeline, plan = load_pipeline(
            plan, stand_in, precision="fp32", device="cpu", trust_remote_code=trust_remote_code
        )
    if plan.kind != "dense":
        raise UnsupportedModelError(
            f"{repository.name} has no weights, only {export}, from which only dense vectors are served."
        )
    served = serve_pipeline(pipeline, plan, repository)
    description = describe(pipeline, served, plan, repository.name, precision="fp32", device="cpu", backend="openvino")
    note = f"served from {export}: there are no weights to compare its vectors with"
    description = replace(description, notes=(*description.notes, note))
    if not has_token_vectors(snapshot.path / export):
        description = _without_pooling(pipeline, description, repository, plan, export)
    return pipeline, description


def _without_pooling(
    pipeline: BaseModel, description: ModelDescription, repository: Repository, plan: PipelinePlan, export: str
) -> ModelDescription:
    """Remove the Pooling from a pipeline in place, because the export pools; LoadError if the files declare another one."""
    poolings = [index for index, module in enumerate(pipeline) if isinstance(module, Pooling)]
    if poolings and (repository.has_modules or plan.pooling is not None):
        raise UnsupportedModelError(
            f"{repository.name}: {export} returns one vector per text, to which the pooling {description.pooling} cannot "
            "be applied. Export the model with its token vectors (last_hidden_state)."
        )
    for index in reversed(poolings):
        del pipeline[index]
    notes = tuple(note for note in description.notes if not note.startswith(_GUESS))
    return replace(description, pooling="-", excludes_prompt=False, notes=notes)


def _files_of(directory: Path) -> tuple[SnapshotFile, ...]:
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return tuple(SnapshotFile(path.relative_to(directory).as_posix(), path.stat().st_size, "") for path in paths)


def _write_zeros(directory: Path, *, trust_remote_code: bool) -> None:
    """Write weights of zeros for the configuration in a directory. The file is sparse: it takes no space on disk."""
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(directory, **local)
    model_class: Any = _ENCODERS.get(config.model_type, AutoModel)
    with torch.device("meta"):
        if model_class is AutoModel:
            from_config: Any = AutoModel.from_config  # untyped in transformers
            model = from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        else:
            model = model_class(config)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in model.state_dict().items():
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            raise LoadError(f"the weight {name} has the unexpected type {tensor.dtype}")
        start, end = end, end + math.prod(tensor.shape) * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (directory / _WEIGHTS).open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        stream.truncate(stream.tell() + end)
