"""Tokenizers of the small models of `benchmarks.family_models`, in the classes of transformers.

Nothing is trained: vocabularies are made of the characters and words of a short text, so that every run has the same ones.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import transformers
from tokenizers import pre_tokenizers, processors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase as Tokenizer

LENGTH = 48
"""Longest input in tokens."""
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Special tokens of BERT."""
_CORPUS = """
the quick brown fox jumps over the lazy dog near the river bank how do i reset my password please send me a new one by
mail embedding models turn text into vectors that can be compared query : passage : search document retrieve the most
similar sentence hello world mixed with english words nul inside instruct find it title none task
今天天气很好 我们去公园散步 向量检索 把文本变成向量 如何重置我的密码 请把新的密码发给我 模型下载失败了
, . ? ! ， 。 ？ ！ 、 😀 🎉 👍 🏽 🚀 😂
"""
_CASED = "The Quick How Do I Reset My Embedding Models Instruct Query"


def tokenizer(name: str, **options: Any) -> Tokenizer:
    """Return a tokenizer of `TOKENIZERS`; `options` are values of the constructor of its class."""
    return TOKENIZERS[name](**options)


def known_words(*, cased: bool = True) -> list[str]:
    return list(dict.fromkeys(f"{_CORPUS} {_CASED if cased else ''}".split()))


def _characters(words: Sequence[str]) -> list[str]:
    return sorted({character for word in words for character in word})


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def _make(kind: str, **values: Any) -> Tokenizer:
    return getattr(transformers, kind)(**{"model_max_length": LENGTH, **values})


def _wordpiece(kind: str, special: Sequence[str], **options: Any) -> Tokenizer:
    words = known_words(cased=not options.get("do_lower_case", True))
    characters = _characters(words)
    continued = (f"##{character}" for character in characters)
    return _make(kind, vocab=_numbered([*special, *characters, *continued, *words]), **options)


def _unigram(kind: str, special: Sequence[str], **options: Any) -> Tokenizer:
    words = known_words()
    pieces = dict.fromkeys(special, 0.0) | {"▁": -3.0}
    for number, word in enumerate(words):
        pieces.setdefault(f"▁{word}", -4.0 - number / 1000)
        pieces.setdefault(word, -6.0 - number / 1000)
    for character in _characters(words):
        pieces.setdefault(character, -9.0)
    return _make(kind, vocab=list(pieces.items()), **options)


def _byte_bpe(kind: str, special: Sequence[str], around: tuple[str, str] | None = None, **options: Any) -> Tokenizer:
    """Return a tokenizer of bytes; `around` replaces its special tokens before and after a text."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merges = _merges([piece for word in known_words() for piece, _ in split.pre_tokenize_str(f" {word}")])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = _numbered([*special, *alphabet, *("".join(pair) for pair in merges)])
    return _surround(_make(kind, vocab=vocabulary, merges=merges, **options), around)


def _metaspace_bpe(kind: str, special: Sequence[str], around: tuple[str, str], **options: Any) -> Tokenizer:
    """Return a tokenizer of characters and, for unknown ones, bytes."""
    words = known_words()
    merges = _merges([f"▁{word}" for word in words])
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *_characters(words)]
    vocabulary = _numbered([*tokens, *("".join(pair) for pair in merges)])
    return _surround(_make(kind, vocab=vocabulary, merges=merges, **options), around)


def _merges(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Return merges that make each piece from its characters, from left to right."""
    return list(dict.fromkeys((piece[:end], piece[end]) for piece in pieces for end in range(1, len(piece))))


def _surround(made: Tokenizer, around: tuple[str, str] | None) -> Tokenizer:
    if around is not None:
        before, after = around
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(part for part in (before, "$A", after) if part),
            special_tokens=[(token, made.convert_tokens_to_ids(token)) for token in around if token],
        )
    return made


def _classless(special: Sequence[str], around: tuple[str, str], **options: Any) -> Tokenizer:
    """Return a tokenizer of bytes that has no class of its own, as many recent models have."""
    inner = _byte_bpe("GPT2Tokenizer", special, around).backend_tokenizer
    values = {"pad_token": special[0], "eos_token": around[1], "cls_token": around[0] or None}
    return _make("PreTrainedTokenizerFast", tokenizer_object=inner, **{**values, **options})


def _clip() -> Tokenizer:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = ["".join(piece for piece, _ in split.pre_tokenize_str(word)) for word in known_words(cased=False)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(left, right) for word in words for left, right in _merges([word]) if len(left) < len(word) - 1]
    merges += [(word[:-1], f"{word[-1]}</w>") for word in words if len(word) > 1]
    merges = list(dict.fromkeys(merges))
    ends = (f"{character}</w>" for character in alphabet)
    tokens = [*alphabet, *ends, *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    return _make("CLIPTokenizer", vocab=_numbered(tokens), merges=merges)


_END = "<|endoftext|>"
_ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_ALBERT = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
_CAMEMBERT = ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<s>", "</s>", "<mask>")
_BIG_BIRD = ("<pad>", "</s>", "<s>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
_XLNET = ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>")
_FUNNEL = ("<pad>", "<unk>", "<cls>", "<sep>", "<mask>", "<s>", "</s>")
_OPT = {"unk_token": "</s>", "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}

TOKENIZERS: dict[str, Callable[..., Tokenizer]] = {
    "bert": partial(_wordpiece, "BertTokenizer", BERT),
    "mpnet": partial(_wordpiece, "MPNetTokenizer", ("<s>", "<pad>", "</s>", "[UNK]", "<mask>")),
    "mobilebert": partial(_wordpiece, "MobileBertTokenizer", BERT),
    "funnel": partial(_wordpiece, "FunnelTokenizer", _FUNNEL),
    "xlm-roberta": partial(_unigram, "XLMRobertaTokenizer", _ROBERTA),
    "camembert": partial(_unigram, "CamembertTokenizer", _CAMEMBERT),
    "albert": partial(_unigram, "AlbertTokenizer", _ALBERT),
    "deberta-v2": partial(_unigram, "DebertaV2Tokenizer", ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")),
    "big-bird": partial(_unigram, "BigBirdTokenizer", _BIG_BIRD),
    "rembert": partial(_unigram, "RemBertTokenizer", _ALBERT),
    "fnet": partial(_unigram, "FNetTokenizer", _ALBERT),
    "xlnet": partial(_unigram, "XLNetTokenizer", _XLNET),
    "t5": partial(_unigram, "T5Tokenizer", ("<pad>", "</s>", "<unk>"), extra_ids=0),
    "roberta": partial(_byte_bpe, "RobertaTokenizer", _ROBERTA),
    "deberta": partial(_byte_bpe, "DebertaTokenizer", BERT),
    "gpt2": partial(_byte_bpe, "GPT2Tokenizer", (_END,), pad_token=_END),
    "gpt-neox": partial(_byte_bpe, "GPTNeoXTokenizer", (_END,), pad_token=_END),
    "opt": partial(_byte_bpe, "GPT2Tokenizer", ("<s>", "<pad>", "</s>"), ("</s>", ""), **_OPT),
    "qwen": partial(_byte_bpe, "Qwen2Tokenizer", (_END,), ("", _END), padding_side="left"),
    "llama": partial(_metaspace_bpe, "LlamaTokenizer", ("<unk>", "<s>", "</s>"), ("<s>", "</s>"), pad_token="</s>"),  # noqa: S106 - a part of a text
    "gemma": partial(
        _metaspace_bpe, "GemmaTokenizer", ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), ("<bos>", "<eos>")
    ),
    "closing token": partial(_classless, (_END,), ("", _END)),
    "modernbert": partial(_classless, BERT, ("[CLS]", "[SEP]")),
    "eurobert": partial(_classless, ("<pad>", "<s>", "</s>", "<mask>"), ("<s>", "</s>")),
    "nystromformer": partial(_classless, ("<pad>", "<unk>", "[CLS]", "[SEP]"), ("[CLS]", "[SEP]")),
    "clip": _clip,
}
"""By family: English, Chinese and emoji; at most `LENGTH` tokens."""
