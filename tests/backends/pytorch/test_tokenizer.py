"""The tokens are those that the repository declares, also where transformers makes others."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.errors import LoadError, UnsupportedModelError
from tests.backends.helpers import cosines, embed_texts, load_torch, load_torch_pipeline
from tests.backends.small_tokenizers import VOCABULARIES, byte_bpe, unigram, wordpiece
from tests.models import bert, qwen3, save_bare, xlm_roberta

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEXTS = ["Hello World", "Café NAÏVE Ｆｕｌｌ ﬁne", "12345 and 678", "今天天气很好 123", "two  spaces", "a"]


def edit(path: Path, **values: Any) -> None:
    contents = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**contents, **values}))


def nfkc(contents: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": [{"type": "NFKC"}, *([contents] if contents else [])]}


DIGITS = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,2}"}, "behavior": "Isolated", "invert": False}
"""Splits numbers into groups, as Qwen's tokenizers do with single digits."""


def cased_bert(directory: Path) -> Path:
    """Without tokenizer_config.json, so that transformers uses BertTokenizer, which converts to lower case."""
    save_bare(directory, bert, wordpiece())
    (directory / "tokenizer_config.json").unlink()
    contents = json.loads((directory / "tokenizer.json").read_text())
    edit(directory / "tokenizer.json", normalizer={**contents["normalizer"], "lowercase": False})
    return directory


def with_parts(
    build: Callable[[PreTrainedTokenizerFast], PreTrainedModel],
    tokenizer: Callable[[], PreTrainedTokenizerFast],
    tokenizer_class: str | None,
    change: Callable[[dict[str, Any]], dict[str, Any]],
) -> Callable[[Path], Path]:
    """Return a builder of a directory with a changed tokenizer.json, and with a class that transformers rebuilds."""

    def write(directory: Path) -> Path:
        save_bare(directory, build, tokenizer())
        contents = json.loads((directory / "tokenizer.json").read_text())
        edit(directory / "tokenizer.json", **change(contents))
        if tokenizer_class is not None:
            edit(directory / "tokenizer_config.json", tokenizer_class=tokenizer_class)
        return directory

    return write


def closing_token_only() -> PreTrainedTokenizerFast:
    return byte_bpe(around=("", "<|endoftext|>"), padding_side="left")


def digit_groups(contents: dict[str, Any]) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, contents["pre_tokenizer"]]}}


def own_template(contents: dict[str, Any]) -> dict[str, Any]:
    """Without the opening token."""
    post = contents["post_processor"]
    single = [part for part in post["single"] if "Sequence" in part or part["SpecialToken"]["id"] != "<s>"]
    return {"post_processor": {**post, "single": single}}


DECLARED: dict[str, Callable[[Path], Path]] = {
    "cased BERT without tokenizer_config.json": cased_bert,
    "NFKC in BERT": with_parts(bert, wordpiece, "BertTokenizer", lambda c: {"normalizer": nfkc(c["normalizer"])}),
    "NFKC in Qwen": with_parts(qwen3, closing_token_only, "Qwen2Tokenizer", lambda c: {"normalizer": {"type": "NFKC"}}),
    "groups of digits in Qwen": with_parts(qwen3, closing_token_only, "Qwen2Tokenizer", digit_groups),
    "groups of digits in Qwen, generic class": with_parts(
        qwen3, closing_token_only, "PreTrainedTokenizerFast", digit_groups
    ),
    "lower case in XLM-R": with_parts(
        xlm_roberta, unigram, "XLMRobertaTokenizer", lambda c: {"normalizer": {"type": "Lowercase"}}
    ),
    "template in XLM-R": with_parts(xlm_roberta, unigram, "XLMRobertaTokenizer", own_template),
    "template in XLM-R, generic class": with_parts(xlm_roberta, unigram, None, own_template),
}


def declared_ids(directory: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [encoding.ids for encoding in tokenizer.encode_batch(TEXTS)]


def vectors_of(directory: Path, rows: list[list[int]], pooling: str) -> NDArray[np.float32]:
    """Run token ids through the model of a directory with transformers, and pool them by hand."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    vectors = []
    for ids in rows:
        with torch.inference_mode():
            tokens = model(torch.tensor([ids])).last_hidden_state[0]
        vectors.append((tokens[-1] if pooling == "lasttoken" else tokens.mean(dim=0)).numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("case", DECLARED)
def test_vectors_are_those_of_tokenizer_json(case: str, tmp_path: Path) -> None:
    """Whatever class tokenizer_config.json names. A note says where transformers makes other tokens."""
    directory = DECLARED[case](tmp_path / "model")
    backend = load_torch(directory)
    rows = Tokenization(backend.description).encode(TEXTS, truncate="END").ids
    assert rows == declared_ids(directory)
    expected = vectors_of(directory, rows, backend.description.pooling)
    assert cosines(embed_texts(backend, TEXTS), expected).min() >= 0.99999
    reference = load_torch_pipeline(directory).encode(TEXTS, show_progress_bar=False)
    assert cosines(np.asarray(reference), expected).min() >= 0.99999


def test_a_difference_from_transformers_is_noted(tmp_path: Path) -> None:
    """And no note if the tokens are the same."""
    other, same = DECLARED["NFKC in Qwen"](tmp_path / "other"), save_bare(tmp_path / "same", bert, wordpiece())
    assert any("tokenizer.json" in note for note in load_torch(other).description.notes)
    assert not any("tokenizer.json" in note for note in load_torch(same).description.notes)


# --- keys of tokenizer_config.json ----------------------------------------------------------------------------------


def ids_with(directory: Path, **config: Any) -> list[list[int]]:
    """Return the ids of the texts with other values in tokenizer_config.json."""
    edit(directory / "tokenizer_config.json", **config)
    description = load_torch(directory).description
    return Tokenization(description).encode(TEXTS, truncate="END").ids


@pytest.fixture
def plain_bpe(tmp_path: Path) -> Path:
    """Return a directory with a tokenizer without special tokens around a text."""
    return save_bare(tmp_path / "model", qwen3, byte_bpe(around=("", ""), padding_side="left"))


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer"])
def test_add_eos_token_closes_each_text(tokenizer_class: str, plain_bpe: Path) -> None:
    """As in e5-mistral, whose vector is that of the closing token."""
    expected = [[*ids, 0] for ids in declared_ids(plain_bpe)]
    eos = Tokenizer.from_file(str(plain_bpe / "tokenizer.json")).token_to_id("<|endoftext|>")
    expected = [[*ids[:-1], eos] for ids in expected]
    assert ids_with(plain_bpe, tokenizer_class=tokenizer_class, add_eos_token=True) == expected


def test_add_bos_token_opens_each_text(plain_bpe: Path) -> None:
    bos = Tokenizer.from_file(str(plain_bpe / "tokenizer.json")).token_to_id("[CLS]")
    expected = [[bos, *ids] for ids in declared_ids(plain_bpe)]
    assert ids_with(plain_bpe, add_bos_token=True, bos_token="[CLS]") == expected


def test_add_eos_token_is_not_added_twice(tmp_path: Path) -> None:
    """If tokenizer.json adds it, too."""
    directory = save_bare(tmp_path / "model", qwen3, closing_token_only())
    assert ids_with(directory, add_eos_token=True) == declared_ids(directory)


@pytest.mark.parametrize(("tokenizer_class", "kept"), [("LlamaTokenizer", False), ("Qwen2Tokenizer", True)])
def test_add_eos_token_false_counts_for_classes_that_follow_it(
    tokenizer_class: str, kept: bool, tmp_path: Path
) -> None:
    """Llama's did, and Qwen's never did, so that its tokenizer.json decides."""
    directory = save_bare(tmp_path / "model", qwen3, closing_token_only())
    ids = ids_with(directory, tokenizer_class=tokenizer_class, add_eos_token=False)
    assert (ids == declared_ids(directory)) is kept


@pytest.mark.parametrize(
    ("values", "normalizer"),
    [
        ({"do_lower_case": False}, {"lowercase": False}),
        ({"strip_accents": False}, {"strip_accents": False}),
        ({"do_lower_case": False, "strip_accents": True}, {"lowercase": False, "strip_accents": True}),
        ({"tokenize_chinese_chars": False}, {"handle_chinese_chars": False}),
    ],
)
def test_keys_of_bert_change_its_normalizer(values: dict[str, Any], normalizer: dict[str, Any], tmp_path: Path) -> None:
    directory = save_bare(tmp_path / "model", bert, wordpiece())
    expected = shutil.copytree(directory, tmp_path / "expected")
    contents = json.loads((expected / "tokenizer.json").read_text())
    edit(expected / "tokenizer.json", normalizer={**contents["normalizer"], **normalizer})
    assert ids_with(directory, **values) == declared_ids(expected) != declared_ids(directory)


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_add_prefix_space_is_used(tokenizer_class: str, plain_bpe: Path, tmp_path: Path) -> None:
    splitter = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    edit(plain_bpe / "tokenizer.json", pre_tokenizer=splitter)
    expected = shutil.copytree(plain_bpe, tmp_path / "expected")
    edit(expected / "tokenizer.json", pre_tokenizer={**splitter, "add_prefix_space": True})
    ids = ids_with(plain_bpe, tokenizer_class=tokenizer_class, add_prefix_space=True)
    assert ids == declared_ids(expected) != declared_ids(plain_bpe)


def test_tokens_that_only_tokenizer_config_declares_are_added(plain_bpe: Path) -> None:
    """With the id that it declares."""
    size = Tokenizer.from_file(str(plain_bpe / "tokenizer.json")).get_vocab_size()
    token = {"content": "<|new|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    edit(plain_bpe / "tokenizer_config.json", added_tokens_decoder={str(size): {**token, "special": True}})
    encoded = Tokenization(load_torch(plain_bpe).description).encode(["a<|new|>"], truncate="END").ids
    assert encoded[0][-1] == size


# --- other tokenizers -----------------------------------------------------------------------------------------------


def test_a_missing_padding_token_is_replaced(plain_bpe: Path) -> None:
    """So that sentence-transformers can pad a batch of the comparison. The attention mask hides it."""
    contents = json.loads((plain_bpe / "tokenizer_config.json").read_text())
    contents.pop("pad_token")
    (plain_bpe / "tokenizer_config.json").write_text(json.dumps(contents))
    (plain_bpe / "special_tokens_map.json").unlink(missing_ok=True)
    edit(plain_bpe / "config.json", pad_token_id=None)
    expected = vectors_of(plain_bpe, declared_ids(plain_bpe), "lasttoken")
    pipeline = load_torch_pipeline(plain_bpe)
    assert cosines(np.asarray(pipeline.encode(TEXTS, show_progress_bar=False)), expected).min() >= 0.99999
    assert cosines(embed_texts(load_torch(plain_bpe), TEXTS), expected).min() >= 0.99999


def test_long_inputs_are_truncated_at_the_side_that_the_repository_declares(plain_bpe: Path) -> None:
    """As by sentence-transformers, unless a request chooses another side."""
    edit(plain_bpe / "tokenizer_config.json", truncation_side="left")
    long = "one two three four five six seven eight nine ten " * 8
    backend, pipeline = load_torch(plain_bpe), load_torch_pipeline(plain_bpe)
    expected = np.asarray(pipeline.encode([long], show_progress_bar=False))
    assert backend.description.truncation_side == "left"
    assert cosines(embed_texts(backend, [long]), expected).min() >= 0.99999
    tokenize = Tokenization(backend.description).encode
    assert tokenize([long]).ids == tokenize([long], truncate="START").ids != tokenize([long], truncate="END").ids


def test_an_invalid_tokenizer_json_is_an_error(plain_bpe: Path) -> None:
    """The message names the model and the file."""
    edit(plain_bpe / "tokenizer.json", pre_tokenizer={"type": "Unheard"})
    with pytest.raises(LoadError, match=r"^test/small.*tokenizer"):
        load_torch(plain_bpe)


def test_a_tokenizer_whose_code_changes_the_tokens_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rules alone would make other tokens."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    directory = save_bare(tmp_path / "model", bert, wordpiece())
    (directory / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class Reversed(PreTrainedTokenizerFast):\n"
        "    def __call__(self, text, *args, **kwargs):\n"
        "        texts = [text] if isinstance(text, str) else text\n"
        "        return super().__call__([each[::-1] for each in texts], *args, **kwargs)\n"
    )
    edit(
        directory / "tokenizer_config.json",
        tokenizer_class="Reversed",
        auto_map={"AutoTokenizer": [None, "tokenization_own.Reversed"]},
    )
    with pytest.raises(UnsupportedModelError, match="own tokenizer"):
        load_torch(directory, trust=True)


def test_sentencepiece_only_tokenizers_are_converted(tmp_path: Path) -> None:
    """As transformers converts them."""
    import sentencepiece

    pieces = [piece for piece, _ in json.loads((VOCABULARIES / "unigram.json").read_text())["model"]["vocab"]]
    sentences = [" ".join(piece.strip("▁") for piece in pieces[start : start + 12]) for start in range(len(pieces))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=150,
        character_coverage=0.98,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        minloglevel=2,
    )
    directory = save_bare(tmp_path / "model", xlm_roberta, unigram())
    for name in ("tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"):
        (directory / name).unlink(missing_ok=True)
    shutil.copy(tmp_path / "spm.model", directory / "sentencepiece.bpe.model")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)(TEXTS)["input_ids"]
    assert Tokenization(load_torch(directory).description).encode(TEXTS, truncate="END").ids == theirs
