"""Real tokenizers for English, Chinese and emoji, trained by `tests.backends.train_tokenizers`.

Their vocabularies are committed, because training is not deterministic. Otherwise the vectors of the small models, and
the effect of rounding on them, would differ between processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

VOCABULARIES = Path(__file__).with_name("vocabularies")
LENGTH = 48
"""Longest input of the small models, in tokens."""
SPECIAL = {"bert": ("[CLS]", "[SEP]", "[PAD]"), "mpnet": ("<s>", "</s>", "<pad>")}
"""Opening, closing and padding token of a WordPiece vocabulary, by style."""


def _load(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(VOCABULARIES / f"{name}.json"))


def wordpiece(style: str = "bert") -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer with the special tokens of BERT ("bert") or of MPNet ("mpnet")."""
    cls, sep, pad = SPECIAL[style]
    return PreTrainedTokenizerFast(
        tokenizer_object=_load(f"wordpiece-{style}"),
        unk_token="[UNK]",
        cls_token=cls,
        sep_token=sep,
        pad_token=pad,
        model_max_length=LENGTH,
    )


def unigram(model_max_length: int | None = LENGTH) -> PreTrainedTokenizerFast:
    tokenizer = _load("unigram")
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
    *, around: tuple[str, str] = ("[CLS]", "[SEP]"), padding_side: str = "right", chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer; `around` are the special tokens before and after a text, or ""."""
    tokenizer = _load("byte_bpe")
    if any(around):
        surround(tokenizer, *around)
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


def surround(tokenizer: Tokenizer, before: str, after: str) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in (before, "$A", after) if part),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (before, after) if token],
    )
