"""Repositories that have an ONNX file, or an export to OpenVINO, and no weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
from onnxruntime import quantization
from tokenizers import Tokenizer

from emb_model_provider.artifacts.manifest import GRAPH, read_artifact
from emb_model_provider.artifacts.prepare import BackendPreparer
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.errors import LoadError
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.settings import FidelitySettings, HubSettings, TrustSettings
from tests.artifacts.helpers import CompiledModels, compile_here
from tests.backends.helpers import TEXTS, cosines, embed_texts, reference
from tests.compiler.exports import ONNX, OPENVINO, export_decoder, export_only, remove_modules
from tests.marks import mark_slow_except
from tests.models import bundled_directory, snapshot_of, spec_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from emb_model_provider.artifacts.manifest import Artifact

NOTE = "there are no weights to compare its vectors with"


def copy_of(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "model"))


def compile_export(directory: Path, tmp_path: Path, **spec: Any) -> Artifact:
    result, _ = compile_here(directory, tmp_path / "artifact", **{"precision": "fp32", **spec})
    assert result.outcome == "done", result
    artifact = read_artifact(tmp_path / "artifact")
    assert artifact is not None
    return artifact


def vectors_of(artifact: Artifact, texts: list[str] = TEXTS) -> NDArray[np.float32]:
    return embed_texts(OpenVinoBackend(artifact.directory / GRAPH, artifact.description, cpus=2), texts)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bert-mean-normalize", ONNX),
        pytest.param("bert-mean-normalize", OPENVINO, marks=pytest.mark.slow),
        pytest.param("bert-dense", ONNX, marks=pytest.mark.slow),
        pytest.param("bert-prompts-excluded", "model_O2.onnx", marks=pytest.mark.slow),
    ],
)
def test_an_export_without_weights_is_served(family: str, name: str, compiled: CompiledModels, tmp_path: Path) -> None:
    """Its token vectors are pooled, projected and normalized as those of the model are. A note says what it is."""
    expected = reference(compiled.directory(family)).encode(TEXTS, show_progress_bar=False)
    directory = export_only(copy_of(compiled.directory(family), tmp_path), name)
    artifact = compile_export(directory, tmp_path)
    assert cosines(vectors_of(artifact), expected).min() >= 0.9999
    assert artifact.made_by == name
    description = artifact.description
    assert description.fidelity is None
    assert f"served from {name}: {NOTE}" in description.notes
    ours = compiled(family).description
    for value in ("dimension", "max_length", "vocab_size", "tokenizer_json", "pooling", "normalize", "pad_token_id"):
        assert getattr(description, value) == getattr(ours, value)
    assert sorted(path.name for path in artifact.directory.iterdir()) == [
        "manifest.json", "model.bin", "model.xml", "tokenizer.json",
    ]  # fmt: skip


@pytest.mark.slow
def test_precisions_below_fp32_are_compared_with_the_export_at_fp32(compiled: CompiledModels, tmp_path: Path) -> None:
    directory = export_only(copy_of(compiled.directory("bert-mean-normalize"), tmp_path))
    description = compile_export(directory, tmp_path, precision="int8").description
    assert description.precision == "int8"
    assert description.fidelity is not None
    assert 0.9 < description.fidelity.min_cosine < 1


@pytest.mark.slow
def test_a_decoder_gets_the_positions_of_its_tokens(compiled: CompiledModels, tmp_path: Path) -> None:
    """Padding on the left does not count. The weights of the file are in another file."""
    directory = copy_of(compiled.directory("qwen3-left"), tmp_path)
    expected = reference(directory).encode(TEXTS, show_progress_bar=False)
    export_decoder(directory)
    assert (directory / "model.onnx.data").exists()
    assert cosines(vectors_of(compile_export(directory, tmp_path)), expected).min() >= 0.9999


@pytest.mark.slow
def test_a_quantized_file_is_served_with_a_note(compiled: CompiledModels, tmp_path: Path) -> None:
    """Its activations are quantized with a scale for the whole batch, so a vector depends on the rest of the batch."""
    directory = copy_of(compiled.directory("bert-mean-normalize"), tmp_path)
    expected = reference(directory).encode(TEXTS, show_progress_bar=False)
    export_only(directory, "model.onnx")
    quantization.quantize_dynamic(directory / "model.onnx", directory / "model_quantized.onnx")
    (directory / "model.onnx").unlink()
    artifact = compile_export(directory, tmp_path)
    assert cosines(vectors_of(artifact), expected).min() >= 0.98
    assert any("depends on the other texts of its batch" in note for note in artifact.description.notes)


@pytest.mark.slow
def test_pooled_vectors_are_used_as_they_are(compiled: CompiledModels, tmp_path: Path) -> None:
    """If nothing declares another pooling. Without a guess there is no note on one."""
    expected = reference(compiled.directory("bert-cls")).encode(TEXTS, show_progress_bar=False)
    directory = copy_of(compiled.directory("bert-cls"), tmp_path)
    export_only(directory, output="sentence_embedding", pooled=True)
    remove_modules(directory)
    artifact = compile_export(directory, tmp_path)
    assert cosines(vectors_of(artifact), expected).min() >= 0.9999
    assert (artifact.description.pooling, artifact.description.notes) == ("-", (f"served from {ONNX}: {NOTE}",))


@pytest.mark.slow
def test_pooled_vectors_cannot_be_pooled_again(compiled: CompiledModels, tmp_path: Path) -> None:
    """The repository declares a pooling, and the export has no token vectors."""
    directory = copy_of(compiled.directory("bert-cls"), tmp_path)
    export_only(directory, output="sentence_embedding", pooled=True)
    result, _ = compile_here(directory, tmp_path / "artifact")
    assert result.outcome == "broken"
    assert "onnx/model.onnx returns one vector per text, to which the pooling cls cannot be applied" in result.reason


@pytest.mark.slow
def test_an_export_needs_the_configuration_of_its_model(compiled: CompiledModels, tmp_path: Path) -> None:
    directory = export_only(copy_of(compiled.directory("bert-cls"), tmp_path))
    (directory / "config.json").unlink()
    result, _ = compile_here(directory, tmp_path / "artifact")
    assert result.outcome == "broken"
    assert "has no config.json" in result.reason


@pytest.mark.slow
def test_a_configuration_of_another_size_is_a_reason(compiled: CompiledModels, tmp_path: Path) -> None:
    """Not noise, although the graph could be run."""
    directory = export_only(copy_of(compiled.directory("bert-cls"), tmp_path))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    result, _ = compile_here(directory, tmp_path / "artifact")
    assert result.outcome in ("unsupported", "broken")
    assert "48 values" in result.reason or "32" in result.reason


@pytest.mark.parametrize("values", [{"backend": "torch"}, {"device": "cuda"}])
def test_torch_cannot_serve_an_export(values: dict[str, str], tmp_path: Path) -> None:
    """The message names the file and both settings."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.onnx").write_bytes(b"")
    (directory / "config.json").write_text('{"model_type": "bert"}')
    preparer = BackendPreparer(HubSettings(cache_dir=tmp_path / "cache"), FidelitySettings(), TrustSettings())
    with pytest.raises(
        LoadError, match=r"only model\.onnx.*`--backend`, or EMB_PROVIDER_BACKEND.*`--device`, or EMB_PROVIDER_DEVICE"
    ):
        preparer.prepare(spec_of(**values), snapshot_of(directory))


@pytest.mark.slow
@pytest.mark.parametrize("precision", mark_slow_except(["fp32", "auto"], "fp32"))
def test_the_bundled_model_equals_onnx_runtime(precision: str, tmp_path: Path) -> None:
    """Exported to ONNX, with mean pooling and normalization by numpy."""
    directory = export_only(copy_of(bundled_directory(), tmp_path), "model.onnx")
    texts = [*TEXTS, "word " * 600]
    expected = onnx_runtime_vectors(directory, texts)
    spec, hubs = spec_of(path=directory, precision=precision), HubSettings(cache_dir=tmp_path / "cache")
    preparer = BackendPreparer(hubs, FidelitySettings(), TrustSettings())
    prepared = preparer.prepare(spec, fetch_snapshot(spec, hubs))
    backend = prepared.load()
    assert cosines(embed_texts(backend, texts), expected).min() >= 0.9999
    assert (prepared.backend, backend.description.normalize, backend.description.max_length) == ("openvino", True, 256)


def onnx_runtime_vectors(directory: Path, texts: list[str]) -> NDArray[np.float32]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    vectors = []
    for text in texts:
        ids = np.asarray([tokenizer.encode(text).ids], dtype=np.int64)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        (tokens,) = session.run(None, inputs)
        mean = tokens[0].mean(axis=0)
        vectors.append(mean / np.linalg.norm(mean))
    return np.stack(vectors)
