"""What the torch backend does with files that are broken, unsafe, or for another kind of model."""

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
from emb_model_provider.errors import (
    LoadError,
    UnsupportedModelError,
)
from tests.backends.comparison import TEXTS, cosines, embed_texts, reference
from tests.backends.small_tokenizers import byte_bpe, wordpiece
from tests.models import (
    bert,
    qwen3,
    save_bare,
    save_modelscope,
    save_st,
    snapshot_of,
    spec_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def load(directory: Path, *, trust: bool = False, **spec: Any) -> TorchBackend:
    return TorchBackend(spec_of(**spec), snapshot_of(directory), trust_remote_code=trust)


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def bert_copy(family_directory: Callable[[str], Path], tmp_path: Path) -> Path:
    """A BERT directory that a test may break."""
    return Path(shutil.copytree(family_directory("bert-mean-normalize"), tmp_path / "model"))


def test_loading_makes_no_request(
    family_directory: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of directory is read without opening a connection."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    bare = save_bare(tmp_path / "bare", bert, wordpiece())
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for directory in (family_directory("qwen3-left"), family_directory("bert-dense"), bare):
        assert load(directory).description.dimension > 0


@pytest.mark.parametrize("layout", ["modules.json", "bare"])
def test_weights_that_lack_tensors_are_refused(layout: str, bert_copy: Path, tmp_path: Path) -> None:
    """transformers would fill the gap with random numbers and only log it."""
    directory = bert_copy if layout == "modules.json" else save_bare(tmp_path / "bare", bert, wordpiece())
    weights = load_file(directory / "model.safetensors")
    lost = "encoder.layer.1.output.dense.weight"
    save_file(
        {k: v for k, v in weights.items() if k != lost}, directory / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(LoadError, match=lost):
        load(directory)


def test_a_missing_pooler_does_no_harm(bert_copy: Path) -> None:
    """BERT's pooler is not read, and many checkpoints leave it out."""
    expected = reference(bert_copy).encode(TEXTS, show_progress_bar=False)
    weights = load_file(bert_copy / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, bert_copy / "model.safetensors", {"format": "pt"})
    assert cosines(embed_texts(load(bert_copy), TEXTS), expected).min() >= 0.99999


def test_weights_for_another_class_of_model_are_refused(tmp_path: Path) -> None:
    """Weights under names that the model does not know would leave it random."""
    directory = save_modelscope(tmp_path / "gte", None, safetensors=True)
    weights = load_file(directory / "model.safetensors")
    save_file(
        {f"tower.{k}": v for k, v in weights.items()}, directory / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(LoadError, match="noise"):
        load(directory)


def test_a_pickle_in_bin_weights_is_not_run(tmp_path: Path) -> None:
    """A `.bin` file that carries code is refused, and its code does not run."""
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    directory = save_modelscope(tmp_path / "gte", None)
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(LoadError):
        load(directory)
    assert not marker.exists()


def test_a_model_that_needs_its_own_code_is_refused(tmp_path: Path) -> None:
    """Without trust the repository's code is not run, and the message names the setting."""
    directory = save_bare(tmp_path / "own", bert, wordpiece())
    edit_json(
        directory / "config.json",
        model_type="homemade",
        auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"},
    )
    (directory / "own.py").write_text("raise SystemExit('the code ran')\n")
    with pytest.raises(UnsupportedModelError, match="EMB_PROVIDER_TRUST_REMOTE_CODE"):
        load(directory)


def test_code_from_the_repository_runs_when_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With trust the repository's own class is loaded, and the description says that its code runs."""
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
    expected = embed_texts(load(save_bare(tmp_path / "plain", bert, wordpiece())), TEXTS)
    backend = load(directory, trust=True)
    assert cosines(embed_texts(backend, TEXTS), expected).min() >= 0.99999
    assert any("trust_remote_code is on" in note for note in backend.description.notes)


def test_a_model_with_routes_is_refused(tmp_path: Path) -> None:
    """Queries and documents that take different modules cannot be told apart in a token batch."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    routes = [StaticEmbedding(wordpiece().backend_tokenizer, embedding_dim=8) for _ in range(2)]
    router = Router.for_query_document(query_modules=routes[:1], document_modules=routes[1:])
    model = SentenceTransformer(modules=[router], device="cpu", local_files_only=True)
    model.save(str(tmp_path / "routes"), create_model_card=False)
    with pytest.raises(UnsupportedModelError, match="Router"):
        load(tmp_path / "routes")


def test_an_unknown_architecture_is_a_load_error(tmp_path: Path) -> None:
    """The library's own explanation is kept."""
    directory = save_bare(tmp_path / "new", bert, wordpiece())
    edit_json(directory / "config.json", model_type="homemade")
    with pytest.raises(LoadError, match="homemade"):
        load(directory)


def test_a_model_of_chat_messages_is_refused(bert_copy: Path) -> None:
    """Declared `message` means that every text is rendered as a chat: plain text would give other vectors."""
    entry = {"method": "forward", "method_output_name": "last_hidden_state"}
    edit_json(
        bert_copy / "sentence_bert_config.json",
        modality_config={"text": entry, "message": {**entry, "format": "flat"}},
        module_output_name="token_embeddings",
    )
    with pytest.raises(UnsupportedModelError, match="chat template"):
        load(bert_copy)


def test_tokenization_that_cannot_be_repeated_is_refused(bert_copy: Path) -> None:
    """processing_kwargs that change the tokens are named."""
    edit_json(
        bert_copy / "sentence_bert_config.json", processing_kwargs={"text": {"add_special_tokens": False}}
    )
    with pytest.raises(UnsupportedModelError, match="add_special_tokens"):
        load(bert_copy)


def test_a_lower_casing_declared_by_the_pipeline_is_kept(tmp_path: Path) -> None:
    """do_lower_case in sentence_bert_config.json becomes part of the described tokenizer."""
    tokenizer = byte_bpe(around=("", "<|endoftext|>"), padding_side="left")
    directory = save_st(tmp_path / "cased", qwen3, tokenizer, pooling="lasttoken")
    edit_json(directory / "sentence_bert_config.json", do_lower_case=True)
    expected = reference(directory).encode(["HELLO World", "hello world"], show_progress_bar=False)
    vectors = embed_texts(load(directory), ["HELLO World", "hello world"])
    assert cosines(vectors, expected).min() >= 0.99999
    assert cosines(vectors[:1], vectors[1:]).min() >= 0.99999


def test_a_tokenizer_without_a_fast_form_is_refused(tmp_path: Path) -> None:
    """A tokenizer that only Python code can run is named."""
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
        load(directory)
