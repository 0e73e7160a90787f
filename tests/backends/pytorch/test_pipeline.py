"""Loading files that are broken, unsafe, or of another kind of model."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from emb_model_provider.backends.pytorch.backend import TorchBackend
from emb_model_provider.errors import LoadError, UnsupportedModelError
from tests.backends.helpers import TEXTS, cosines, embed_texts, load_torch, reference
from tests.backends.small_tokenizers import byte_bpe, wordpiece
from tests.models import bert, qwen3, save_bare, save_modelscope, save_st, snapshot_of, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def bert_copy(family_directory: Callable[[str], Path], tmp_path: Path) -> Path:
    """Return a BERT directory that a test can change."""
    return Path(shutil.copytree(family_directory("bert-mean-normalize"), tmp_path / "model"))


def test_loading_opens_no_connection(
    family_directory: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    bare = save_bare(tmp_path / "bare", bert, wordpiece())
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for directory in (family_directory("qwen3-left"), family_directory("bert-dense"), bare):
        assert load_torch(directory).description.dimension > 0


@pytest.mark.parametrize("layout", ["modules.json", "bare"])
def test_missing_weights_are_an_error(layout: str, bert_copy: Path, tmp_path: Path) -> None:
    """transformers would initialize them randomly and only log it."""
    directory = bert_copy if layout == "modules.json" else save_bare(tmp_path / "bare", bert, wordpiece())
    weights = load_file(directory / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    save_file({k: v for k, v in weights.items() if k != name}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=name):
        load_torch(directory)


def test_a_missing_pooler_is_not_an_error(bert_copy: Path) -> None:
    """The pooler of BERT is not used, and many checkpoints omit it."""
    expected = reference(bert_copy).encode(TEXTS, show_progress_bar=False)
    weights = load_file(bert_copy / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, bert_copy / "model.safetensors", {"format": "pt"})
    assert cosines(embed_texts(load_torch(bert_copy), TEXTS), expected).min() >= 0.99999


def test_weights_of_another_model_class_are_an_error(tmp_path: Path) -> None:
    """All weights of the model would be random, because the names differ."""
    directory = save_modelscope(tmp_path / "gte", None, safetensors=True)
    weights = load_file(directory / "model.safetensors")
    save_file({f"tower.{k}": v for k, v in weights.items()}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match="noise"):
        load_torch(directory)


def test_code_in_bin_weights_is_not_run(tmp_path: Path) -> None:
    """A pickle with code is an error."""
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    directory = save_modelscope(tmp_path / "gte", None)
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(LoadError):
        load_torch(directory)
    assert not marker.exists()


def test_a_model_with_its_own_code_is_an_error(tmp_path: Path) -> None:
    """Unless it is trusted. The message names the setting, and the code is not run."""
    directory = save_bare(tmp_path / "own", bert, wordpiece())
    edit_json(
        directory / "config.json",
        model_type="homemade",
        auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"},
    )
    (directory / "own.py").write_text("raise SystemExit('the code ran')\n")
    with pytest.raises(UnsupportedModelError, match="EMB_PROVIDER_TRUST_REMOTE_CODE"):
        load_torch(directory)


def test_trusted_code_of_the_repository_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class is loaded, and a note says so."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    directory = save_bare(tmp_path / "own", bert, wordpiece())
    edit_json(
        directory / "config.json",
        model_type="homemade",
        auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"},
    )
    (directory / "own.py").write_text(
        "from transformers import BertConfig, BertModel\n"
        "class Config(BertConfig):\n    model_type = 'homemade'\n"
        "class Model(BertModel):\n    config_class = Config\n"
    )
    expected = embed_texts(load_torch(save_bare(tmp_path / "plain", bert, wordpiece())), TEXTS)
    backend = load_torch(directory, trust=True)
    assert cosines(embed_texts(backend, TEXTS), expected).min() >= 0.99999
    assert any("trust_remote_code is on" in note for note in backend.description.notes)


def test_errors_name_the_repository(bert_copy: Path) -> None:
    """And not the directory, which in the caches of the hubs has the name of a commit."""
    snapshot = snapshot_of(Path(bert_copy.rename(bert_copy.with_name("0123abcd"))), repository="someone/model")
    edit_json(snapshot.path / "config.json", model_type="homemade")
    with pytest.raises(LoadError, match=r"^someone/model cannot be loaded: "):
        TorchBackend(spec_of(), snapshot, trust_remote_code=False)


def test_a_router_is_an_error(tmp_path: Path) -> None:
    """A token batch does not distinguish between queries and documents."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    routes = [StaticEmbedding(wordpiece().backend_tokenizer, embedding_dim=8) for _ in range(2)]
    router = Router.for_query_document(query_modules=routes[:1], document_modules=routes[1:])
    model = SentenceTransformer(modules=[router], device="cpu", local_files_only=True)
    model.save(str(tmp_path / "routes"), create_model_card=False)
    with pytest.raises(UnsupportedModelError, match="Router"):
        load_torch(tmp_path / "routes")


def test_an_unknown_architecture_is_an_error(tmp_path: Path) -> None:
    """The message contains that of transformers."""
    directory = save_bare(tmp_path / "new", bert, wordpiece())
    edit_json(directory / "config.json", model_type="homemade")
    with pytest.raises(LoadError, match="homemade"):
        load_torch(directory)


def test_a_model_of_chat_messages_is_an_error(bert_copy: Path) -> None:
    """If `message` is declared, every text is rendered as a chat, so plain text would have other vectors."""
    entry = {"method": "forward", "method_output_name": "last_hidden_state"}
    edit_json(
        bert_copy / "sentence_bert_config.json",
        modality_config={"text": entry, "message": {**entry, "format": "flat"}},
        module_output_name="token_embeddings",
    )
    with pytest.raises(UnsupportedModelError, match="chat template"):
        load_torch(bert_copy)


def test_processing_kwargs_that_change_the_tokens_are_an_error(bert_copy: Path) -> None:
    """The message names them."""
    edit_json(bert_copy / "sentence_bert_config.json", processing_kwargs={"text": {"add_special_tokens": False}})
    with pytest.raises(UnsupportedModelError, match="add_special_tokens"):
        load_torch(bert_copy)


def test_lower_casing_declared_by_the_pipeline_is_used(tmp_path: Path) -> None:
    """do_lower_case in sentence_bert_config.json becomes part of the tokenizer in the description."""
    tokenizer = byte_bpe(around=("", "<|endoftext|>"), padding_side="left")
    directory = save_st(tmp_path / "cased", qwen3, tokenizer, pooling="lasttoken")
    edit_json(directory / "sentence_bert_config.json", do_lower_case=True)
    expected = reference(directory).encode(["HELLO World", "hello world"], show_progress_bar=False)
    vectors = embed_texts(load_torch(directory), ["HELLO World", "hello world"])
    assert cosines(vectors, expected).min() >= 0.99999
    assert cosines(vectors[:1], vectors[1:]).min() >= 0.99999


def test_a_tokenizer_without_a_fast_version_is_an_error(tmp_path: Path) -> None:
    """The message names its class."""
    from transformers import BertJapaneseTokenizer

    directory = save_bare(tmp_path / "slow", bert, wordpiece())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    (directory / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    slow = BertJapaneseTokenizer(
        str(directory / "vocab.txt"), word_tokenizer_type="basic", subword_tokenizer_type="character"
    )
    slow.save_pretrained(directory)
    with pytest.raises(UnsupportedModelError, match="BertJapaneseTokenizer"):
        load_torch(directory)
