"""Prebuilt exports in a snapshot are used if the pipeline cannot be exported."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from emb_model_provider.artifacts.manifest import GRAPH, read_artifact
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.backends.pytorch.heads import Served
from emb_model_provider.compiler.export import Exporter, check_exportable, prebuilt_exporters
from emb_model_provider.errors import UnsupportedModelError
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.settings import HubSettings
from tests.artifacts.helpers import CompiledModels, compile_here
from tests.backends.helpers import TEXTS, cosines, embed_texts, reference
from tests.backends.small_tokenizers import wordpiece
from tests.compiler.exports import ONNX, OPENVINO, add_export
from tests.marks import mark_slow_except


def failing_export(*_: object) -> Any:
    raise RuntimeError("cannot be exported")


NO_EXPORTER: dict[str, Exporter] = {"torch.export": failing_export}


def copy_of(family: str, compiled: CompiledModels, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled.directory(family), tmp_path / "model"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bert-cls", OPENVINO),
        ("bert-prompts-excluded", OPENVINO),
        ("bert-dense", ONNX),
        ("bert-prompts-excluded", ONNX),
    ],
)
def test_a_prebuilt_export_is_extended_by_the_later_stages(
    family: str, name: str, compiled: CompiledModels, tmp_path: Path
) -> None:
    """Pooling, Dense and excluded prompts; the manifest names the file."""
    directory = copy_of(family, compiled, tmp_path)
    add_export(directory, name)
    result, _ = compile_here(directory, tmp_path / "artifact", exporters=NO_EXPORTER, precision="fp32")
    assert result.outcome == "done", result
    artifact = read_artifact(tmp_path / "artifact")
    assert artifact is not None
    assert artifact.made_by == name
    expected = reference(directory).encode(TEXTS, show_progress_bar=False)
    vectors = embed_texts(OpenVinoBackend(artifact.directory / GRAPH, artifact.description, cpus=2), TEXTS)
    assert cosines(vectors, expected).min() >= 0.9999


@pytest.mark.slow
def test_a_prebuilt_export_without_token_vectors_is_not_used(compiled: CompiledModels, tmp_path: Path) -> None:
    """The reason names the outputs that are required, and those that there are."""
    directory = copy_of("bert-cls", compiled, tmp_path)
    add_export(directory, output="logits", pooled=True)
    result, _ = compile_here(directory, tmp_path / "artifact", exporters=NO_EXPORTER, precision="fp32")
    assert result.outcome == "unsupported"
    assert "openvino/openvino_model.xml: it has none of the outputs token_embeddings" in result.reason
    assert "it has logits" in result.reason


@pytest.mark.parametrize("name", mark_slow_except([OPENVINO, ONNX], ONNX))
def test_a_prebuilt_export_is_part_of_the_snapshot(name: str, compiled: CompiledModels, tmp_path: Path) -> None:
    """It is hashed like the weights, so it changes the digest, and the compiler finds it."""
    directory = copy_of("bert-cls", compiled, tmp_path)
    spec, settings = ModelSpec(alias="a", name="a", path=directory), HubSettings(cache_dir=tmp_path / "cache")
    before = fetch_snapshot(spec, settings)
    assert prebuilt_exporters(before) == {}
    add_export(directory, name)
    after = fetch_snapshot(spec, settings)
    assert list(prebuilt_exporters(after)) == [name]
    assert after.digest != before.digest
    assert {file.path for file in after.files} >= {name, name.replace(".xml", ".bin")}


def test_static_embeddings_are_not_exportable() -> None:
    """The torch backend serves them."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = StaticEmbedding(wordpiece().backend_tokenizer, embedding_dim=24)
    pipeline = SentenceTransformer(modules=[static], device="cpu", local_files_only=True)
    with pytest.raises(UnsupportedModelError, match="nothing to compile"):
        check_exportable(Served(pipeline, ("sentence_embedding",)))
