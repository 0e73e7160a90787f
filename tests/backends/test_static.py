"""Static embeddings without torch have the vectors of sentence-transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Normalize

from emb_model_provider.artifacts.prepare import BackendPreparer
from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.errors import InferenceError, LoadError
from emb_model_provider.settings import FidelitySettings, HubSettings, TrustSettings
from tests.backends.helpers import TEXTS, embed_texts, load_torch, reference
from tests.backends.test_routes import embed, static_query
from tests.models import save_static, snapshot_of, spec_of

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from emb_model_provider.artifacts.prepare import PreparedBackend
    from emb_model_provider.backends.base import Backend

FILLED = [text for text in TEXTS if text.strip()]
FP32 = {"rtol": 0, "atol": 1e-6}
"""The values of the vectors are about 1."""
WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "sentence_transformers", "openvino", "nncf"):
    sys.modules[name] = None  # makes its import fail
import numpy as np
from emb_model_provider import Embedder
from emb_model_provider.settings import Settings

directory, cache, texts, result = sys.argv[1:]
settings = Settings.from_values(cache_dir=cache, offline=True)
with Embedder(directory, source="local", settings=settings) as embedder:
    assert embedder.description.backend == "numpy", embedder.description
    np.save(result, embedder.embed(open(texts, encoding="utf-8").read().split("\\n")))
"""


def prepare(directory: Path, **spec: Any) -> PreparedBackend:
    """Prepare a directory as the service does."""
    hubs = HubSettings(cache_dir=directory.with_name("cache"))
    preparer = BackendPreparer(hubs, FidelitySettings(), TrustSettings())
    return preparer.prepare(spec_of(**spec), snapshot_of(directory))


def load(directory: Path, **spec: Any) -> Backend:
    """Load a directory, which must not need torch."""
    prepared = prepare(directory, **spec)
    assert prepared.backend == "numpy"
    return prepared.load()


def encode(directory: Path, texts: list[str], **options: Any) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = reference(directory, **options).encode(texts, show_progress_bar=False)
    return vectors


def rewrite(directory: Path, table: str = "embeddings", **tensors: NDArray[Any]) -> NDArray[np.float32]:
    """Replace the tensors of a model by its table under another name, and other tensors; return the table."""
    values = load_file(directory / "model.safetensors")["embedding.weight"]
    save_file({table: values, **tensors}, directory / "model.safetensors")
    return values


@pytest.mark.parametrize("following", [(), (Normalize(),)])
def test_vectors_equal_sentence_transformers(following: tuple[Any, ...], tmp_path: Path) -> None:
    """For texts of one to hundreds of tokens, in one batch and alone."""
    directory = save_static(tmp_path / "model", *following)
    backend, expected = load(directory), encode(directory, FILLED)
    assert backend.description.normalize is bool(following)
    np.testing.assert_allclose(embed_texts(backend, FILLED), expected, **FP32)
    np.testing.assert_allclose(np.concatenate([embed_texts(backend, [text]) for text in FILLED]), expected, **FP32)
    assert np.abs(expected).mean() > 0.05


def test_a_text_of_many_tokens_is_added_up_in_parts(tmp_path: Path) -> None:
    """So that rounding does not add up, as it does in sentence-transformers."""
    directory = save_static(tmp_path / "model")
    backend, text = load(directory), " ".join(FILLED) * 200
    (ids,) = Tokenization(backend.description).encode([text]).ids
    assert len(ids) > 100_000
    table = load_file(directory / "model.safetensors")["embedding.weight"]
    exact = table[ids].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(embed_texts(backend, [text])[0], exact, **FP32)
    assert np.abs(encode(directory, [text])[0] - exact).max() > 1e-5


def test_the_description_equals_that_of_the_torch_backend(tmp_path: Path) -> None:
    """Except for the name of the backend, and the measured ranges."""
    directory = save_static(
        tmp_path / "model", Normalize(), prompts={"query": "query: "}, default_prompt_name="query", truncate_dim=16
    )
    ours, theirs = load(directory).description, load_torch(directory).description
    changed = {name for name in ours.__slots__ if getattr(ours, name) != getattr(theirs, name)}
    assert changed == {"backend", "own_calibration"}
    assert ours.calibration is not None


def test_vectors_are_truncated_after_they_were_normalized(tmp_path: Path) -> None:
    """As in sentence-transformers; with the key `normalize` they have length 1."""
    directory = save_static(tmp_path / "model", Normalize(), truncate_dim=16)
    backend, expected = load(directory), encode(directory, FILLED)
    assert expected.shape == (len(FILLED), 16)
    np.testing.assert_allclose(embed_texts(backend, FILLED), expected, **FP32)
    units = embed_texts(load(directory, normalize=True), FILLED)
    np.testing.assert_allclose(units, expected / np.linalg.norm(expected, axis=1, keepdims=True), **FP32)


def test_normalization_can_be_switched_off(tmp_path: Path) -> None:
    directory = save_static(tmp_path / "model", Normalize())
    plain = encode(save_static(tmp_path / "plain"), FILLED)
    np.testing.assert_allclose(embed_texts(load(directory, normalize=False), FILLED), plain, **FP32)


def test_a_text_without_tokens_has_a_zero_vector(tmp_path: Path) -> None:
    """Its token is not one of the model: requests with token ids cannot use others."""
    backend = load(save_static(tmp_path / "model", Normalize()))
    size = backend.description.vocab_size
    assert embed_texts(backend, ["hello", "", " \n"]).any(axis=1).tolist() == [True, False, False]
    assert Tokenization(backend.description).encode([""]).ids == [[size]]
    with pytest.raises(InferenceError, match="token id"):
        backend.run(TokenBatch(ids=[[size + 1]], prompt_lengths=[0]))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_tables_of_other_types(dtype: str, tmp_path: Path) -> None:
    """A table at half precision stays so in memory, and is added up at fp32."""
    directory = save_static(tmp_path / "model")
    table = load_file(directory / "model.safetensors")["embedding.weight"].astype(dtype)
    save_file({"embedding.weight": table}, directory / "model.safetensors")
    expected = embed_texts(load_torch(directory, precision="fp32"), FILLED)
    backend = load(directory)
    np.testing.assert_allclose(embed_texts(backend, FILLED), expected, **FP32)
    whole = load(save_static(tmp_path / "whole"))
    assert (whole.memory_bytes - backend.memory_bytes > 0.4 * table.size * 4) is (dtype == "float16")


@pytest.mark.parametrize("normalize", [True, False])
def test_a_model2vec_directory(normalize: bool, tmp_path: Path) -> None:
    """Its config.json says whether vectors are normalized, and its table can have rows and factors for tokens."""
    whole, bare = save_static(tmp_path / "model"), tmp_path / "model2vec"
    bare.mkdir()
    for name in ("tokenizer.json", "model.safetensors"):
        shutil.copy(whole / name, bare)
    rows = len(load_file(bare / "model.safetensors")["embedding.weight"])
    rng = np.random.default_rng(5)
    mapping, weights = rng.integers(0, rows, rows), rng.uniform(0.1, 2.0, rows)
    table = rewrite(bare, mapping=mapping, weights=weights)
    config = {"model_type": "model2vec", "architectures": ["StaticModel"], "normalize": normalize}
    (bare / "config.json").write_text(json.dumps(config))
    folded = (table[mapping] * weights[:, np.newaxis]).astype(np.float32)
    save_file({"embedding.weight": folded}, whole / "model.safetensors")
    expected = encode(whole, FILLED)
    if normalize:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    backend = load(bare)
    assert backend.description.normalize is normalize
    np.testing.assert_allclose(embed_texts(backend, FILLED), expected, **FP32)


def test_a_static_route_needs_no_torch(tmp_path: Path) -> None:
    """The other route is served by another backend, which the description of the model names."""
    directory = static_query(tmp_path / "model")
    routed = load(directory, route="query")
    expected = reference(directory).encode(FILLED, task="query", prompt="", show_progress_bar=False)
    np.testing.assert_allclose(embed_texts(routed, FILLED, prompt=""), expected, **FP32)
    hubs = HubSettings(cache_dir=tmp_path / "cache")
    preparer = BackendPreparer(hubs, FidelitySettings(measure_fidelity=False), TrustSettings())
    spec, snapshot = spec_of(backend="torch"), snapshot_of(directory)
    both = preparer.prepare(spec, snapshot).load()
    np.testing.assert_allclose(embed(both, ["query"] * len(FILLED), FILLED), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("following", "spec"), [((Dense(24, 8),), {}), ((), {"backend": "torch"}), ((), {"device": "cuda"})]
)
def test_torch_serves_other_pipelines(following: tuple[Any, ...], spec: dict[str, str], tmp_path: Path) -> None:
    """Those with modules that compute, and those for which torch or another device is requested."""
    assert prepare(save_static(tmp_path / "model", *following), **spec).backend == "torch"


def test_bf16_is_served_at_fp32_with_a_note(tmp_path: Path) -> None:
    prepared = prepare(save_static(tmp_path / "model"), precision="bf16")
    assert (prepared.backend, prepared.load().description.precision) == ("numpy", "fp32")
    assert [note for note in prepared.notes if "fp32" in note]


def test_damaged_files_are_errors_that_name_the_model(tmp_path: Path) -> None:
    directory = save_static(tmp_path / "model")
    rewrite(directory, mapping=np.array([10**9]))
    with pytest.raises(LoadError, match=r"table of its token vectors.*Download the model again"):
        load(directory)
    (save_static(tmp_path / "other") / "tokenizer.json").write_text("{}")
    with pytest.raises(LoadError, match=r"tokenizer\.json"):
        load(tmp_path / "other")


def test_torch_and_openvino_are_not_needed(tmp_path: Path) -> None:
    """From the files to the vectors of a request."""
    directory = save_static(tmp_path / "model", Normalize())
    texts = tmp_path / "texts"
    lines = [text for text in FILLED if "\n" not in text]
    texts.write_text("\n".join(lines), encoding="utf-8")
    arguments = [str(directory), str(tmp_path / "cache"), str(texts), str(tmp_path / "vectors.npy")]
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), encode(directory, lines), **FP32)
