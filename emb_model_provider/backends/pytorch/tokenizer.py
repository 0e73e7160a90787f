"""The tokenizer that a repository declares.

transformers 5 rebuilds the tokenizers of many classes from the vocabulary alone: normalizer, pre-tokenizer and
post-processor are those of the class, whatever `tokenizer.json` says, and keys of `tokenizer_config.json` such as
`add_eos_token` are ignored. sentence-transformers uses these tokenizers, so a comparison with it does not show the
difference. Here `tokenizer.json` is authoritative, then the keys of `tokenizer_config.json`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Literal

from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerFast

from emb_model_provider.errors import LoadError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sentence_transformers.base.model import BaseModel

    from emb_model_provider.backends.repository import Repository

_PROBES = (
    "a",
    "Hello World",
    "The Café in ÉCOLE, naïve façade",
    "ﬁve Ａ① ½ x² ㎏ ﷺ Å Å",
    "12345 7 2026-11-30 3.14159 1,000,000",
    "don't I'm we'LL",
    "  leading,  double and trailing  ",
    "tabs\tand\nnewlines\r\n\nhere",
    "今天天气很好，我们去公园散步。123 个",
    "東京 カタカナ ｶﾅ 서울",
    "🚀👍🏽 e\u0301 zero\u200bwidth nul\0inside soft\u00adhyphen",
    "snake_case CamelCase http://example.com/?q=1&r=2#x user@example.com",
    "Ünïcödé ΑΒΓ Привет שלום مرحبا",
)
"""Texts on which two tokenizers that differ in their normalizer or pre-tokenizer have different ids."""
_BERT_KEYS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
"""Keys of tokenizer_config.json, and those of a BertNormalizer that they override."""
_OMITS_TOKENS = ("Llama", "CodeLlama", "Gemma", "Cohere")
"""Classes whose `add_bos_token: false` and `add_eos_token: false` remove a token that tokenizer.json adds."""
_VOCABULARY = re.compile(r"(.*/)?(tokenizer\.json|tekken\.json|vocab[^/]*|[^/]+\.(model|tiktoken|vocab|bpe))")
"""Files that contain the vocabulary of a tokenizer."""
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_CODE_MODULE = "transformers_modules"
"""Package of classes that come from a repository."""


def use_declared_tokenizer(pipeline: BaseModel, repository: Repository) -> tuple[str, ...]:
    """Replace the tokenizer of a loaded pipeline by the one that its repository declares; return notes on differences.

    A tokenizer without a padding token gets one, which the attention mask hides.

    Raises:
        UnsupportedModelError: The tokenizer is code that makes other tokens than its vocabulary and rules.
        LoadError: A file of the tokenizer is invalid.
    """
    first: Any = pipeline[0]
    loaded = getattr(first, "tokenizer", None)
    if not isinstance(loaded, PreTrainedTokenizerFast):
        return ()  # static embeddings, or rejected later
    if not isinstance(first, Transformer) or type(loaded).__module__.startswith(_CODE_MODULE):
        _require_same_ids(loaded, repository)
        return ()
    folder = repository.folder
    if not any(_VOCABULARY.fullmatch(name) for name in repository.files):
        # transformers makes a tokenizer that knows no word.
        raise UnsupportedModelError(
            f"{repository.name} has no tokenizer that can be read here (tokenizer.json, vocab.txt, or a sentencepiece "
            "model). Download the model again, or choose another one."
        )
    try:
        declared = _declared_tokenizer(repository, folder, loaded, lowercase=bool(first.do_lower_case))
        _add_markers(declared, pipeline, loaded)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"{repository.name}: its tokenizer cannot be read ({type(error).__name__}: {error}). Download the model "
            "again, or correct tokenizer.json and tokenizer_config.json."
        ) from error
    differs = _ids(loaded) != [encoding.ids for encoding in declared.encode_batch(list(_PROBES))]
    config = repository.read(f"{folder}tokenizer_config.json")
    side = _truncation_side(repository, folder, loaded)
    first.processor = _wrap(declared, loaded, side, getattr(pipeline.config, "pad_token_id", None))
    _require_same_ids(first.processor, repository)
    if not differs:
        return ()
    source = "tokenizer.json" if f"{folder}tokenizer.json" in repository.files else "tokenizer_config.json"
    return (
        f"the tokens are those that {source} declares; {config.get('tokenizer_class') or type(loaded).__name__} of "
        "transformers makes others, and so does sentence-transformers with it",
    )


def _declared_tokenizer(
    repository: Repository, folder: str, loaded: PreTrainedTokenizerFast, *, lowercase: bool
) -> Tokenizer:
    path = repository.files.get(f"{folder}tokenizer.json")
    config = repository.read(f"{folder}tokenizer_config.json")
    if path is None:
        tokenizer = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    else:
        contents = json.loads(path.read_text(encoding="utf-8"))
        _apply_config(contents, config)
        tokenizer = Tokenizer.from_str(json.dumps(contents, ensure_ascii=False))
        _add_declared_tokens(tokenizer, _declared_contents(repository, folder, config), loaded, repository.name)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _apply_bos_and_eos(tokenizer, config, loaded)
    if lowercase:  # of sentence_bert_config.json
        parts = [normalizers.Lowercase(), *([tokenizer.normalizer] if tokenizer.normalizer is not None else [])]
        tokenizer.normalizer = normalizers.Sequence(parts)
    return tokenizer


def _apply_config(contents: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Apply the keys of tokenizer_config.json that change parts of a tokenizer.json."""
    normalizer = contents.get("normalizer") or {}
    if normalizer.get("type") == "BertNormalizer":
        for key, name in _BERT_KEYS.items():
            if isinstance(config.get(key), bool):
                normalizer[name] = config[key]
    prefix = config.get("add_prefix_space")
    if not isinstance(prefix, bool):
        return
    splitter = contents.get("pre_tokenizer") or {}
    if splitter.get("type") == "ByteLevel":
        splitter["add_prefix_space"] = prefix
    elif splitter.get("type") == "Metaspace" and prefix == (splitter.get("prepend_scheme") == "never"):
        splitter["prepend_scheme"] = "first" if prefix else "never"
    if not prefix and normalizer.get("type") == "Sequence":
        normalizer["normalizers"] = [part for part in normalizer["normalizers"] if part.get("type") != "Prepend"]


def _declared_contents(repository: Repository, folder: str, config: Mapping[str, Any]) -> set[str]:
    """Return the texts of all tokens that the files next to tokenizer.json declare."""
    special = repository.read(f"{folder}special_tokens_map.json")
    values: list[Any] = [*(config.get("added_tokens_decoder") or {}).values()]
    values += repository.read(f"{folder}added_tokens.json")
    for source in (config, special):
        values += [source.get(f"{name}_token") for name in _SPECIAL]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            extra = source.get(key) or []
            values += extra.values() if isinstance(extra, dict) else extra
    return {content for value in values if (content := _content(value)) is not None}


def _content(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _add_declared_tokens(tokenizer: Tokenizer, declared: set[str], loaded: PreTrainedTokenizerFast, name: str) -> None:
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for index, token in sorted(loaded.added_tokens_decoder.items()):
        if token.content not in declared or token.content in known:
            continue
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([AddedToken(token.content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
                        normalized=token.normalized, special=token.special)])  # fmt: skip
        if tokenizer.token_to_id(token.content) != index:
            raise LoadError(
                f"{name}: the token {token.content!r} has the id {tokenizer.token_to_id(token.content)} by "
                f"tokenizer.json and {index} by tokenizer_config.json. Correct one of the files."
            )


def _add_markers(tokenizer: Tokenizer, pipeline: BaseModel, loaded: PreTrainedTokenizerFast) -> None:
    """Make the markers of the queries and documents of ColBERT models single tokens, as sentence-transformers does.

    Older models declare them as words of the vocabulary only, or as tokens that a lowercase text does not match.
    """
    if not isinstance(pipeline, MultiVectorEncoder):
        return
    for prompt in filter(None, pipeline.prompts.values()):
        for marker in (prompt, *prompt.split(None, 1)[:1]):
            token = next((each for each in loaded.added_tokens_decoder.values() if each.content == marker), None)
            if token is not None and token.special:
                tokenizer.add_special_tokens([AddedToken(marker, normalized=token.normalized, special=True)])


def _apply_bos_and_eos(tokenizer: Tokenizer, config: Mapping[str, Any], loaded: PreTrainedTokenizerFast) -> None:
    """Apply add_bos_token and add_eos_token of tokenizer_config.json to the tokens around a text."""
    name = str(config.get("tokenizer_class") or type(loaded).__name__)
    before, after = _special_ids(tokenizer)
    changed_before, changed_after = list(before), list(after)
    for key, ids, place in (("bos", changed_before, 0), ("eos", changed_after, -1)):
        wanted = config.get(f"add_{key}_token")
        content = _content(config.get(f"{key}_token")) or getattr(loaded, f"{key}_token", None)
        token = tokenizer.token_to_id(content) if content is not None else None
        if token is None or not isinstance(wanted, bool):
            continue
        present = bool(ids) and ids[place] == token
        if wanted and not present:
            ids.insert(0 if place == 0 else len(ids), token)
        elif not wanted and present and name.startswith(_OMITS_TOKENS):
            ids.pop(place)
    if (changed_before, changed_after) == (before, after):
        return
    names = {token: tokenizer.id_to_token(token) for token in (*changed_before, *changed_after)}
    # A template in which `$` or `:` of a token have no meaning of their own.
    pieces = [[f"special{token}" for token in ids] for ids in (changed_before, changed_after)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*pieces[0], "$A", *pieces[1]],
        special_tokens=[{"id": f"special{token}", "ids": [token], "tokens": [name]} for token, name in names.items()],
    )


def _special_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer adds before and after each text."""
    bare, full = (tokenizer.encode(_PROBES[0], add_special_tokens=special).ids for special in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _truncation_side(repository: Repository, folder: str, loaded: PreTrainedTokenizerFast) -> Literal["left", "right"]:
    side = repository.read(f"{folder}tokenizer_config.json").get("truncation_side") or loaded.truncation_side
    return "left" if side == "left" else "right"


def _wrap(
    tokenizer: Tokenizer, loaded: PreTrainedTokenizerFast, truncation_side: str, pad_token_id: object
) -> PreTrainedTokenizerFast:
    """Return a tokenizer for sentence-transformers, with the settings of the one that transformers has loaded."""
    tokens = {f"{name}_token": getattr(loaded, f"{name}_token") for name in _SPECIAL}
    known = {
        key: str(token) for key, token in tokens.items() if token and tokenizer.token_to_id(str(token)) is not None
    }
    if "pad_token" not in known:
        declared = tokenizer.id_to_token(pad_token_id) if isinstance(pad_token_id, int) and pad_token_id >= 0 else None
        candidates = (declared, *(known.get(f"{name}_token") for name in ("eos", "unk", "sep", "bos")))
        known["pad_token"] = next(filter(None, candidates), None) or str(tokenizer.id_to_token(0))
    wrapped: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=tokenizer,
        model_max_length=loaded.model_max_length,
        model_input_names=loaded.model_input_names,
        padding_side=loaded.padding_side,
        truncation_side=truncation_side,
        split_special_tokens=getattr(loaded, "split_special_tokens", False),
        chat_template=getattr(loaded, "chat_template", None),
        **known,
    )
    return wrapped


def _ids(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(_PROBES), padding=False, truncation=False)["input_ids"]
    return ids


def _require_same_ids(tokenizer: PreTrainedTokenizerFast, repository: Repository) -> None:
    """Reject a tokenizer whose code makes other tokens than the rules that are served."""
    encodings = tokenizer.backend_tokenizer.encode_batch(list(_PROBES))
    if _ids(tokenizer) != [encoding.ids for encoding in encodings]:
        raise UnsupportedModelError(
            f"{repository.name} has its own tokenizer ({type(tokenizer).__name__}), whose code changes the tokens, which "
            "is not supported."
        )
