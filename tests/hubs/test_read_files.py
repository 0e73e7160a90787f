"""The libraries read no file that is not in the snapshot: without all others, a model has the same vectors."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.settings import HubSettings
from tests.backends.small_tokenizers import wordpiece
from tests.hubs.conftest import spec
from tests.hubs.helpers import write_files
from tests.models import bert, save_st

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WEIGHTS, BIN = "model.safetensors", "pytorch_model.bin"
TEXTS = ["hello", "the weather in Berlin is fine", ""]


def other_weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.flip(0).contiguous() for name, tensor in load_file(directory / WEIGHTS).items()}


def add_variant_and_torch(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / BIN)
    save_file(other_weights(directory), directory / "model.fp16.safetensors", metadata={"format": "pt"})
    (directory / WEIGHTS).unlink()


def add_other_torch(directory: Path) -> None:
    torch.save(other_weights(directory), directory / BIN)


def add_stale_indexes(directory: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    for name in (f"{WEIGHTS}.index.json", f"{BIN}.index.json"):
        (directory / name).write_text(json.dumps(index))
    save_file(other_weights(directory), directory / "model-00001-of-00002.safetensors", metadata={"format": "pt"})


def add_adapter_folder(directory: Path) -> None:
    write_files(directory / "lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"?"})


def link_pooling(directory: Path) -> None:
    elsewhere = directory.with_name("elsewhere")
    shutil.move(directory / "1_Pooling", elsewhere)
    (directory / "1_Pooling").symlink_to(elsewhere)


@pytest.mark.parametrize(
    "change", [add_variant_and_torch, add_other_torch, add_stale_indexes, add_adapter_folder, link_pooling]
)
def test_vectors_depend_on_selected_files_only(tmp_path: Path, change: Callable[[Path], None]) -> None:
    from sentence_transformers import SentenceTransformer

    directory = save_st(tmp_path / "model", bert, wordpiece(), pooling="cls")
    change(directory)
    snapshot = fetch_snapshot(spec("x", path=directory), HubSettings(cache_dir=tmp_path / "cache"))
    for file in snapshot.files:
        (tmp_path / "only" / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(directory / file.path, tmp_path / "only" / file.path)
    vectors = [
        SentenceTransformer(str(each), device="cpu", local_files_only=True).encode(TEXTS)
        for each in (directory, tmp_path / "only")
    ]
    np.testing.assert_array_equal(*vectors)
