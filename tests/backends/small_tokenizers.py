"""Real tokenizers, trained on the spot over English, Chinese and emoji."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LENGTH = 48
"""Longest input of the small models, in tokens."""

_CORPUS = [
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "How do I reset my password? Please send me a new one by mail.",
    "Embedding models turn text into vectors that can be compared.",
    "query: passage: search document retrieve the most similar sentence",
    "今天天气很好，我们去公园散步。向量检索把文本变成向量。",
    "如何重置我的密码？请把新的密码发给我。模型下载失败了。",
    "😀 🎉 👍🏽 🚀 emoji are text too 😂",
]


# Training breaks ties in a random order, so each tokenizer is trained once and handed out as a copy.


@cache
def _trained_wordpiece(cls: str, sep: str, pad: str) -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = [cls, pad, sep, "[UNK]"] if pad == "<pad>" else [pad, "[UNK]", cls, sep]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    _surround(tokenizer, cls, sep)
    return tokenizer.to_str()


@cache
def _trained_unigram() -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    _surround(tokenizer, "<s>", "</s>")
    return tokenizer.to_str()


@cache
def _trained_byte_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "[CLS]", "[SEP]", "[PAD]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer.to_str()


def wordpiece(cls: str = "[CLS]", sep: str = "[SEP]", pad: str = "[PAD]") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(_trained_wordpiece(cls, sep, pad))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token=cls,
        sep_token=sep,
        pad_token=pad,
        model_max_length=LENGTH,
    )


def unigram(model_max_length: int | None = LENGTH) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(_trained_unigram())
    limit: dict[str, Any] = {} if model_max_length is None else {"model_max_length": model_max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        **limit,
    )


def byte_bpe(
    *,
    around: tuple[str, str] = ("[CLS]", "[SEP]"),
    padding_side: str = "right",
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer; `around` are the special tokens put before and after a text, or ""."""
    tokenizer = Tokenizer.from_str(_trained_byte_bpe())
    if any(around):
        _surround(tokenizer, *around)
    extra: dict[str, Any] = {} if chat_template is None else {"chat_template": chat_template}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>" if around[0] != "[CLS]" else "[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        padding_side=padding_side,
        model_max_length=LENGTH,
        **extra,
    )


def _surround(tokenizer: Tokenizer, before: str, after: str) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in (before, "$A", after) if part),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (before, after) if token],
    )
