"""Rerankers, sparse and multi-vector models in a Python program: the engine from text to result, with the torch backend."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer

from emb_model_provider import Embedder
from emb_model_provider.backends.output_types import range_of
from emb_model_provider.errors import RequestError, UnsupportedTaskError
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.registry import Registry, RegistryConfig
from emb_model_provider.serving.engine import EmbedOptions
from emb_model_provider.settings import Settings
from tests.kind_checks import DOCUMENTS, QUERY
from tests.kind_models import RERANKERS, SPARSE, save_bge_m3

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from emb_model_provider.backends.base import ModelDescription
    from emb_model_provider.serving.results import Embeddings


def embedder(directory: Path, cache: Path, **keys: Any) -> Embedder:
    mapping = {"model": {"name": "model", "path": str(directory), "backend": "torch", "device": "cpu", **keys}}
    return Embedder("model", settings=Settings.from_values(cache_dir=cache, model_mapping=mapping))


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RERANKERS["bert"](tmp_path_factory.mktemp("reranker") / "model")


@pytest.fixture(scope="module")
def reference(reranker: Path) -> CrossEncoder:
    return CrossEncoder(str(reranker), device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def loaded(reranker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedder]:
    with embedder(reranker, tmp_path_factory.mktemp("cache")) as model:
        yield model


def test_documents_are_ranked_like_by_a_cross_encoder(loaded: Embedder, reference: CrossEncoder) -> None:
    """Scores have the activation of the model, unless logits are asked for."""
    short = [text for text in DOCUMENTS if len(text) < 60]
    for raw, activation in ((False, None), (True, torch.nn.Identity())):
        expected = reference.predict(
            [(QUERY, text) for text in short], activation_fn=activation, show_progress_bar=False
        )
        found = loaded.rerank(QUERY, short, raw=raw)
        assert [each.index for each in found] == np.argsort(-expected, kind="stable").tolist()
        assert [each.document for each in found] == [short[each.index] for each in found]
        assert np.allclose([each.score for each in found], np.sort(expected)[::-1], atol=1e-3)
    assert [each.index for each in loaded.rerank(QUERY, short, top_n=2)] == [each.index for each in found[:2]]


def test_a_long_document_has_the_score_of_its_best_window(loaded: Embedder, reference: CrossEncoder) -> None:
    """The windows overlap, and together they have all tokens of the document. The query is always whole."""
    document = "settings password reset account menu button phone email number window house garden river train " * 6
    tokenizer = reference.tokenizer
    query, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (QUERY, document))
    head, end = [tokenizer.cls_token_id, *query, tokenizer.sep_token_id], [tokenizer.sep_token_id]
    room = 48 - len(head) - len(end)
    assert len(ids) > 2 * room
    starts = [*range(0, len(ids) - room, room - room // 4), len(ids) - room]
    windows = torch.tensor([head + ids[start : start + room] + end for start in starts])
    types = torch.zeros_like(windows)
    types[:, len(head) :] = 1
    with torch.no_grad():
        expected = reference.model(input_ids=windows, token_type_ids=types).logits
    [found] = loaded.rerank(QUERY, [document], raw=True)
    assert found.score == pytest.approx(expected.max().item(), abs=1e-3)
    assert expected.argmax().item() > 0, "the first window is the best one, so that the others prove nothing"


def test_long_documents_can_be_cut(reranker: Path, reference: CrossEncoder, tmp_path: Path) -> None:
    document = "settings password reset " * 40
    cut = {"text": {"truncation": "only_second"}}
    [expected] = reference.predict(
        [(QUERY, document)], activation_fn=torch.nn.Identity(), show_progress_bar=False, processing_kwargs=cut
    )
    with embedder(reranker, tmp_path, long_documents="cut", raw_scores=True) as model:
        [found] = model.rerank(QUERY, [document])
    assert found.score == pytest.approx(expected, abs=1e-3)


def test_ranked_documents_have_indexes_scores_and_texts(loaded: Embedder) -> None:
    """Equal documents keep their order, and more are asked for than there are."""
    found = loaded.rerank(QUERY, ["same", "same", "same"], top_n=9)
    assert [each.index for each in found] == [0, 1, 2]
    assert all(isinstance(each.score, float) and 0 < each.score < 1 for each in found)
    assert {each.document for each in found} == {"same"}
    assert loaded.rerank(QUERY, []) == []
    with pytest.raises(TypeError, match=r"documents\[1\] must be a str"):
        loaded.rerank(QUERY, ["a document", 3])  # type: ignore[list-item]


def test_an_alias_has_its_own_form_of_scores(reranker: Path, reference: CrossEncoder, tmp_path: Path) -> None:
    entry = {"name": "model", "path": str(reranker), "backend": "torch", "device": "cpu"}
    mapping = {"model": entry, "logits": {**entry, "raw_scores": True}}
    settings = Settings.from_values(cache_dir=tmp_path, model_mapping=mapping)
    documents = ["Open the settings and choose reset.", "reset"]
    for alias, activation in (("model", None), ("logits", torch.nn.Identity())):
        expected = reference.predict(
            [(QUERY, text) for text in documents], activation_fn=activation, show_progress_bar=False
        )
        with Embedder(alias, settings=settings) as model:
            found = {each.index: each.score for each in model.rerank(QUERY, documents)}
        assert [found[index] for index in range(len(documents))] == pytest.approx(expected, abs=1e-3)


def test_a_query_without_room_for_documents_is_an_error(loaded: Embedder) -> None:
    with pytest.raises(RequestError, match=r"The query is too long.*leaves \d+ of them for documents\[0\]") as caught:
        loaded.rerank("reset the password " * 20, ["a document " * 40])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "query")


def test_a_model_is_only_asked_for_what_it_can_do(loaded: Embedder) -> None:
    for call in (loaded.embed, loaded.embed_sparse, loaded.embed_multi_vector):
        with pytest.raises(
            UnsupportedTaskError, match=r"`model` does not support .*kind is 'reranker'.*\['rerank'\]"
        ) as caught:
            call(["a text"])
        assert caught.value.code == "unsupported_task"


def test_one_model_has_dense_sparse_and_multi_vector_embeddings(tmp_path: Path) -> None:
    """As BGE-M3. The number of weights can be limited."""
    directory = save_bge_m3(tmp_path / "model")
    dense = SentenceTransformer(str(directory), device="cpu").encode(DOCUMENTS, show_progress_bar=False)
    with embedder(directory, tmp_path / "cache") as model:
        assert np.allclose(model.embed(DOCUMENTS), dense, atol=1e-3)
        whole, largest = model.embed_sparse(DOCUMENTS), model.embed_sparse(DOCUMENTS, top_k=2)
        vectors = model.embed_multi_vector(DOCUMENTS)
        with pytest.raises(UnsupportedTaskError):
            model.rerank(QUERY, DOCUMENTS)
    assert len(whole) == len(vectors) == len(DOCUMENTS)
    for every, some in zip(whole, largest, strict=True):
        assert np.sort(some.values).tolist() == np.sort(every.values)[-2:].tolist()
        assert set(some.indices.tolist()) <= set(every.indices.tolist())
    assert all(each.shape[1] == 48 for each in vectors)


# --- types of the values of dense vectors -------------------------------------------------------------------------


def request_all(directory: Path, cache: Path, texts: list[str], **keys: Any) -> tuple[Embeddings, ModelDescription]:
    """Load a model as the service does, and return the outputs of one request with the description of the model."""
    entry = {"name": "model", "path": str(directory), "device": "cpu", "precision": "fp32", **keys}
    settings = Settings.from_values(cache_dir=cache, model_mapping={"model": entry})
    config = RegistryConfig(batching=settings.batching, limits=settings.limits, memory=settings.memory)

    async def request() -> tuple[Embeddings, ModelDescription]:
        registry = Registry(settings.served_models(), ModelManager(settings), config)
        try:
            async with registry.lease("model") as engine:
                outputs = EmbedOptions(outputs=("dense", "sparse", "multi_vector"))
                return await engine.embed(texts, outputs), engine.description
        finally:
            await registry.stop()

    return asyncio.run(request())


@pytest.mark.parametrize("runtime", ["torch", pytest.param("openvino", marks=pytest.mark.slow)])
def test_dense_vectors_of_bge_m3_have_all_types(runtime: str, tmp_path: Path) -> None:
    """With ranges that are stored with the compiled model, or with what torch has measured."""
    directory = save_bge_m3(tmp_path / "model")
    vectors = SentenceTransformer(str(directory), device="cpu").encode(DOCUMENTS, show_progress_bar=False)
    together, description = request_all(directory, tmp_path / "cache", DOCUMENTS, backend=runtime)
    assert description.backend == runtime
    assert description.calibration is not None
    assert set(description.calibration.top10_overlap) == {"float16", "int8", "uint8", "binary", "ubinary"}
    value_range = range_of(description.calibration, 48, normalized=True)
    expected = np.clip(np.rint(vectors * 127 / value_range), -127, 127)
    integers = together.as_type("int8")
    assert (integers.dtype, integers.shape) == (np.int8, (len(DOCUMENTS), 48))
    assert np.abs(integers - expected).max() <= 1  # a value between two integers
    assert np.abs(expected).max() > 100  # the range is used
    assert np.abs(together.as_type("uint8").astype(int) - 128 - integers).max() == 0
    signs = np.unpackbits(together.as_type("ubinary"), axis=1)
    clear = np.abs(vectors) > 1e-4
    assert (signs[clear] == (vectors > 0)[clear]).all()
    assert together.as_type("binary").tolist() == (together.as_type("ubinary").astype(int) - 128).tolist()
    assert together.sparse is not None
    assert together.multi_vector is not None

    (path,) = [*tmp_path.glob("cache/artifacts/*/manifest.json"), *tmp_path.glob("cache/fidelity/*.json")]
    stored = json.loads(path.read_text())
    measured = stored["description"]["fidelity"] if runtime == "openvino" else stored
    assert measured["calibration"]["spread"] == description.calibration.spread
    alone, again = request_all(directory, tmp_path / "cache", DOCUMENTS[:1], backend=runtime)
    assert again.calibration == description.calibration
    assert np.abs(alone.as_type("int8")[0].astype(int) - integers[0]).max() <= 1


def test_models_without_dense_vectors_have_no_ranges(tmp_path: Path) -> None:
    """Nothing is measured for them, at fp32 with torch."""
    with embedder(SPARSE["bert"](tmp_path / "model"), tmp_path / "cache") as model:
        assert model.description.calibration is None
    assert not (tmp_path / "cache" / "fidelity").exists()
