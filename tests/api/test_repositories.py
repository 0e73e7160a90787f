"""Models from hubs and directories as users have them, through the service: their vectors, or a reason why not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.api.helpers import cosines, read_files
from tests.backends.helpers import reference
from tests.backends.pytorch.test_repositories import edit, with_adapter, write_adapter
from tests.backends.pytorch.test_tokenizer import DECLARED, declared_ids, vectors_of
from tests.backends.pytorch.test_tokenizer import TEXTS as CASED_TEXTS
from tests.backends.small_tokenizers import byte_bpe, wordpiece
from tests.backends.test_routes import static_query
from tests.hubs.servers import HuggingFaceServer, ModelScopeServer
from tests.models import FAMILIES, bert, qwen3, save_bare
from tests.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

pytestmark = pytest.mark.slow

TEXTS = ["hello world", "How do I reset my password?", "今天天气很好"]
REFUSED = {
    "reranker without its head": "would be noise",
    "own code": "EMB_PROVIDER_TRUST_REMOTE_CODE",
    "too few layers": "encoder.layer.1",
    "gguf": "GGUF",
}


class Models:
    """A service with models from a directory, and from both hubs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = FAMILIES["bert-cls"](root / "base")
        self.cased = DECLARED["cased BERT without tokenizer_config.json"](root / "cased")
        self.routes = static_query(root / "routes")
        self.left = save_bare(root / "left", qwen3, byte_bpe(around=("", ""), padding_side="left"))
        edit(self.left / "tokenizer_config.json", truncation_side="left", add_eos_token=True)
        self.adapter = self._adapter()
        self.coded = self._coded()
        self.refused = {name: self._refused(name) for name in REFUSED}

    def repositories(self) -> dict[str, dict[str, bytes]]:
        code = {name: (self.root / name).read_bytes() for name in ("configuration_own.py", "modeling_own.py")}
        return {
            "me/adapter": read_files(self.adapter),
            "owner/base": read_files(self.base),
            "me/coded": read_files(self.coded),
            "owner/code": code,
        }

    def mapping(self, huggingface: str, modelscope: str) -> dict[str, Any]:
        hub = {"source": "huggingface", "endpoint": huggingface}
        return {
            "cased": {"name": "cased", "path": str(self.cased)},
            "routes": {"name": "routes", "path": str(self.routes), "precision": "int8"},
            "left": {"name": "left", "path": str(self.left)},
            "adapter": {"name": "me/adapter", **hub},
            "adapter-ms": {"name": "me/adapter", "source": "modelscope", "endpoint": modelscope},
            "coded": {"name": "me/coded", "trust_remote_code": True, **hub},
            **{name: {"name": name, "path": str(path)} for name, path in self.refused.items()},
        }

    def _adapter(self) -> Path:
        from transformers import BertModel

        write_adapter(BertModel.from_pretrained(self.base), self.root / "adapter", "owner/base")
        return self.root / "adapter"

    def _coded(self) -> Path:
        """Write a model whose class is in the repository owner/code."""
        directory = save_bare(self.root / "coded", bert, wordpiece())
        own = {"AutoConfig": "owner/code--configuration_own.Config", "AutoModel": "owner/code--modeling_own.Model"}
        edit(directory / "config.json", model_type="own", architectures=["Model"], auto_map=own)
        (self.root / "configuration_own.py").write_text(
            "from transformers import BertConfig\nclass Config(BertConfig):\n    model_type = 'own'\n"
        )
        (self.root / "modeling_own.py").write_text(
            "from transformers import BertModel\nfrom .configuration_own import Config\n"
            "class Model(BertModel):\n    config_class = Config\n"
        )
        return directory

    def _refused(self, name: str) -> Path:
        directory = self.root / f"refused-{name.replace(' ', '-')}"
        if name == "reranker without its head":
            save_bare(directory, bert, wordpiece(), num_labels=1)
            edit(directory / "config.json", architectures=["BertForSequenceClassification"])
        elif name == "own code":
            save_bare(directory, bert, wordpiece())
            edit(directory / "config.json", auto_map={"AutoModel": "modeling.BertModel"})
        elif name == "too few layers":
            save_bare(directory, bert, wordpiece())
            edit(directory / "config.json", num_hidden_layers=1)
        else:
            save_bare(directory, bert, wordpiece())
            (directory / "model.safetensors").rename(directory / "model-q4_k_m.gguf")
        return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("repositories"))


@pytest.fixture(scope="module")
def served(models: Models) -> Iterator[Service]:
    repositories = models.repositories()
    with HuggingFaceServer(repositories) as huggingface, ModelScopeServer(repositories) as modelscope:
        settings = {
            "MODEL_MAPPING": json.dumps(models.mapping(huggingface.url, modelscope.url)),
            "BACKEND": "torch",
            "HF_CACHE_DIR": str(models.root / "hf"),
            "MODELSCOPE_CACHE_DIR": str(models.root / "ms"),
            "FIDELITY_FLOORS": '{"int8": 0}',
        }
        with Service(models.root / "service", **settings) as service:
            service.wait("/health")
            for alias in models.mapping("", ""):
                service.wait_for_state(alias, "failed" if alias in REFUSED else "ready")
            yield service


def vectors(service: Service, alias: str, texts: list[str], **fields: Any) -> NDArray[np.float32]:
    response = service.embed(*texts, model=alias, **fields)
    assert response.status_code == 200, response.text
    return np.array([item["embedding"] for item in response.json()["data"]], dtype=np.float32)


@pytest.mark.parametrize("alias", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_reason(alias: str, served: Service) -> None:
    """Requests get 503 with it, and /ready shows it."""
    response = served.embed("hello", model=alias)
    assert response.status_code == 503
    assert REFUSED[alias] in response.json()["error"]["message"]
    assert REFUSED[alias] in served.http.get("/ready").json()["models"][alias]["error"]


def test_tokens_are_those_of_tokenizer_json(models: Models, served: Service) -> None:
    """transformers would convert the texts to lower case. A note says so."""
    expected = vectors_of(models.cased, declared_ids(models.cased), "mean")
    assert cosines(vectors(served, "cased", CASED_TEXTS), expected).min() >= 0.9999
    assert any("tokenizer.json" in note for note in served.http.get("/v1/models/cased").json()["notes"])


def test_long_inputs_are_truncated_like_the_model_declares(models: Models, served: Service) -> None:
    """At the start, with the closing token kept. A request can choose the other end."""
    eos = json.loads((models.left / "tokenizer.json").read_text())["model"]["vocab"]["<|endoftext|>"]
    long = "one two three four five six seven eight nine ten " * 8
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(models.left / "tokenizer.json"))
    tokenizer.no_truncation()
    ids = tokenizer.encode(long).ids
    expected = vectors_of(models.left, [[*ids[-47:], eos]], "lasttoken")
    assert cosines(vectors(served, "left", [long]), expected).min() >= 0.9999
    assert cosines(vectors(served, "left", [long], truncation=True), expected).min() >= 0.9999
    from_end = vectors_of(models.left, [[*ids[:47], eos]], "lasttoken")
    assert cosines(vectors(served, "left", [long], truncate="END"), from_end).min() >= 0.9999


@pytest.mark.parametrize("alias", ["adapter", "adapter-ms"])
def test_an_adapter_is_served_with_its_base_model(alias: str, models: Models, served: Service) -> None:
    """Both are downloaded from the same hub."""
    expected = with_adapter(models.base, models.adapter)
    without = reference(models.base).encode(TEXTS, show_progress_bar=False)
    from tests.backends.helpers import TEXTS as ALL

    rows = [text for text in ALL if text.strip()]
    ours = vectors(served, alias, rows)
    assert cosines(ours, expected[[index for index, text in enumerate(ALL) if text.strip()]]).min() >= 0.9999
    assert cosines(vectors(served, alias, TEXTS), without).min() < 0.99


def test_code_of_another_repository_is_fetched_and_run(models: Models, served: Service) -> None:
    """If it is trusted."""
    plain = save_bare(models.root / "plain", bert, wordpiece())
    expected = reference(plain).encode(TEXTS, show_progress_bar=False)
    assert cosines(vectors(served, "coded", TEXTS), expected).min() >= 0.9999


@pytest.mark.parametrize("input_type", ["query", "document", "search_query", None])
def test_input_type_chooses_the_route(input_type: str | None, models: Models, served: Service) -> None:
    """With the prompt of this name. The default route is that of documents, and int8 does not apply to the table."""
    task = "query" if input_type in ("query", "search_query") else "document"
    prompt = None if input_type is None else task
    expected = reference(models.routes).encode(TEXTS, task=task, prompt_name=prompt, show_progress_bar=False)
    fields = {} if input_type is None else {"input_type": input_type}
    lowest = 0.9999 if task == "query" else 0.9
    assert cosines(vectors(served, "routes", TEXTS, **fields), np.asarray(expected)).min() >= lowest
    assert served.http.get("/v1/models/routes").json()["prompts"] == ["document", "query"]
