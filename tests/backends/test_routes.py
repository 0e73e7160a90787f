"""Asymmetric models: each input takes the route of its task, and has the vector of sentence-transformers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding

from emb_model_provider.artifacts.prepare import BackendPreparer
from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.repository import Repository
from emb_model_provider.backends.routes import routes_of
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.errors import UnsupportedModelError
from emb_model_provider.settings import FidelitySettings, HubSettings, TrustSettings
from tests.backends.helpers import TEXTS, assert_same, cosines, load_torch, reference
from tests.backends.small_tokenizers import byte_bpe, wordpiece
from tests.models import bert, modernbert, save_bare, snapshot_of, spec_of

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import Backend


def transformer(directory: Path) -> Transformer:
    return Transformer(str(save_bare(directory, bert, wordpiece())), max_seq_length=48)


def save(directory: Path, *modules: torch.nn.Module, **options: Any) -> Path:
    SentenceTransformer(modules=list(modules), device="cpu", **options).save(str(directory), create_model_card=False)
    return directory


def static_query(directory: Path, **options: Any) -> Path:
    """Save a model that looks queries up in a table, and reads documents with a transformer."""
    torch.manual_seed(2)
    static = StaticEmbedding(byte_bpe().backend_tokenizer, embedding_dim=48)
    document = [transformer(directory.with_name("document")), Pooling(48, "cls")]
    router = Router.for_query_document(query_modules=[static], document_modules=document, **options)
    return save(directory, router, Normalize(), prompts={"query": "query: ", "document": "passage: "})


def dense_by_task(directory: Path) -> Path:
    """Save a model whose routes begin after its pooling."""
    torch.manual_seed(2)
    router = Router.for_query_document(query_modules=[Dense(48, 16)], document_modules=[Dense(48, 16)])
    return save(directory, transformer(directory.with_name("shared")), Pooling(48, "mean"), router)


def two_transformers(directory: Path) -> Path:
    torch.manual_seed(2)
    other = Transformer(str(save_bare(directory.with_name("query"), modernbert, byte_bpe())), max_seq_length=40)
    query = [other, Pooling(48, "mean")]
    document = [transformer(directory.with_name("document")), Pooling(48, "cls"), Normalize()]
    return save(directory, Router.for_query_document(query_modules=query, document_modules=document))


MODELS = {"static query": static_query, "dense by task": dense_by_task, "two transformers": two_transformers}


def load(directory: Path, cache: Path, **spec: Any) -> Backend:
    """Load a directory as the service does, by default with the torch backend, and with any accuracy at int8."""
    fidelity = FidelitySettings(fidelity_floors={"int8": 0.0})
    preparer = BackendPreparer(HubSettings(cache_dir=cache), fidelity, TrustSettings())
    return preparer.prepare(spec_of(**{"backend": "torch", **spec}), snapshot_of(directory)).load()


def embed(backend: Backend, tasks: list[str], texts: list[str]) -> NDArray[np.float32]:
    """Embed texts in one batch, each with the tokenizer and the normalization of its route."""
    routes = backend.description.routes
    encoded = [Tokenization(routes[task]).encode([text]) for task, text in zip(tasks, texts, strict=True)]
    batch = TokenBatch(
        ids=[each.ids[0] for each in encoded], prompt_lengths=[each.prompt_lengths[0] for each in encoded], tasks=tasks
    )
    vectors = backend.run(batch).dense
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    normalized = np.array([[routes[task].normalize] for task in tasks])
    return np.where(normalized, units, vectors).astype(np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_each_task_takes_its_route(name: str, tmp_path: Path) -> None:
    """Also if queries and documents are in one batch."""
    directory = MODELS[name](tmp_path / "model")
    backend, model = load(directory, tmp_path / "cache"), reference(directory)
    texts = [text for text in TEXTS if text.strip()]
    for task in ("query", "document"):
        expected = np.asarray(model.encode(texts, task=task, prompt="", show_progress_bar=False))
        assert_same(embed(backend, [task] * len(texts), texts), expected)
    tasks = ["query", "document"] * len(texts)
    mixed = embed(backend, tasks, [text for text in texts for _ in range(2)])
    queries = np.asarray(model.encode(texts, task="query", prompt="", show_progress_bar=False))
    assert_same(mixed[::2], queries)
    assert cosines(mixed[1::2], queries).min() < 0.9
    backend.close()


def test_the_description_is_that_of_the_default_route(tmp_path: Path) -> None:
    """With those of all routes, and the prompts of the model."""
    described = load(static_query(tmp_path / "model"), tmp_path / "cache").description
    assert (described.default_route, described.pooling, described.backend) == ("document", "cls", "torch")
    assert {task: each.pooling for task, each in described.routes.items()} == {"query": "-", "document": "cls"}
    assert described.prompts == {"query": "query: ", "document": "passage: "}
    backend = load(static_query(tmp_path / "again"), tmp_path / "cache")
    ids = Tokenization(backend.description).encode(["hello"]).ids
    default = backend.run(TokenBatch(ids=ids, prompt_lengths=[0])).dense
    named = backend.run(TokenBatch(ids=ids, prompt_lengths=[0], tasks=["document"])).dense
    assert (default == named).all()


def test_int8_does_not_apply_to_a_static_route(tmp_path: Path) -> None:
    """The other route is quantized."""
    described = load(static_query(tmp_path / "model"), tmp_path / "cache", precision="int8").description
    assert {task: each.precision for task, each in described.routes.items()} == {"query": "fp32", "document": "int8"}


@pytest.mark.slow
def test_routes_are_compiled_like_models(tmp_path: Path) -> None:
    """Those that can be compiled."""
    directory = two_transformers(tmp_path / "model")
    backend, model = load(directory, tmp_path / "cache", backend="openvino", precision="fp32"), reference(directory)
    assert {each.backend for each in backend.description.routes.values()} == {"openvino"}
    texts = [text for text in TEXTS if text.strip()]
    for task in ("query", "document"):
        expected = np.asarray(model.encode(texts, task=task, prompt="", show_progress_bar=False))
        assert cosines(embed(backend, [task] * len(texts), texts), expected).min() >= 0.9999
    backend.close()


# --- declarations -------------------------------------------------------------------------------------------------


def declared(directory: Path, **parameters: Any) -> Any:
    """Return the routes that a Router with these parameters declares."""
    directory.mkdir(parents=True)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.router.Router"}]
    names = parameters.pop("names", ["query", "document"])
    types = {f"{name}_0_Dense": "sentence_transformers.base.modules.dense.Dense" for name in names}
    structure = {name: [f"{name}_0_Dense"] for name in names}
    config = {"types": types, "structure": structure, "parameters": parameters}
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "router_config.json").write_text(json.dumps(config))
    return routes_of(Repository.of(snapshot_of(directory)))


def test_routes_of_tasks_follow_the_rules_of_sentence_transformers(tmp_path: Path) -> None:
    plain = declared(tmp_path / "a", default_route="document")
    assert (dict(plain.by_task), plain.default) == ({"query": "query", "document": "document"}, "document")
    first = declared(tmp_path / "b", default_route=None, allow_empty_key=True)
    assert first.default == "query"
    required = declared(tmp_path / "c", default_route=None, allow_empty_key=False)
    assert required.default is None
    mapped = declared(
        tmp_path / "d",
        names=["small", "large", "picture"],
        route_mappings={"('query', 'text')": "small", "(None, 'text')": "large", "(None, 'image')": "picture"},
    )
    assert dict(mapped.by_task) == {"query": "small", "document": "large"}
    assert mapped.default == "document"


def test_a_repository_without_a_router_has_no_routes(tmp_path: Path) -> None:
    assert routes_of(Repository.of(snapshot_of(save_bare(tmp_path / "model", bert, wordpiece())))) is None


def test_two_routers_are_an_error(tmp_path: Path) -> None:
    """Their routes could be combined in several ways."""
    routers = [Router.for_query_document([Dense(48, 48)], [Dense(48, 48)]) for _ in range(2)]
    directory = save(tmp_path / "model", transformer(tmp_path / "bare"), Pooling(48, "mean"), *routers)
    with pytest.raises(UnsupportedModelError, match="2 Routers"):
        load(directory, tmp_path / "cache")


def test_a_router_cannot_be_loaded_without_a_route(tmp_path: Path) -> None:
    """As one pipeline, all inputs would take the default route."""
    with pytest.raises(UnsupportedModelError, match="Router"):
        load_torch(static_query(tmp_path / "model"))


def test_vectors_of_routes_must_have_one_size(tmp_path: Path) -> None:
    router = Router.for_query_document(query_modules=[Dense(48, 8)], document_modules=[Dense(48, 16)])
    directory = save(tmp_path / "model", transformer(tmp_path / "bare"), Pooling(48, "mean"), router)
    with pytest.raises(Exception, match="different sizes"):
        load(directory, tmp_path / "cache")
