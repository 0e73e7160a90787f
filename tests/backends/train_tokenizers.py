"""Trains the vocabularies of `tests.backends.small_tokenizers`: `uv run python -m tests.backends.train_tokenizers`.

Training is not deterministic, and the bounds in the tests apply to the vocabularies that are committed.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.backends.small_tokenizers import SPECIAL, VOCABULARIES, surround

_CORPUS = [
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "How do I reset my password? Please send me a new one by mail.",
    "Embedding models turn text into vectors that can be compared.",
    "query: passage: search document retrieve the most similar sentence",
    "今天天气很好，我们去公园散步。向量检索把文本变成向量。",
    "如何重置我的密码？请把新的密码发给我。模型下载失败了。",
    "😀 🎉 👍🏽 🚀 emoji are text too 😂",
]


def wordpiece(style: str) -> Tokenizer:
    cls, sep, pad = SPECIAL[style]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = [cls, pad, sep, "[UNK]"] if style == "mpnet" else [pad, "[UNK]", cls, sep]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    surround(tokenizer, cls, sep)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    surround(tokenizer, "<s>", "</s>")
    return tokenizer


def byte_bpe() -> Tokenizer:
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
    return tokenizer


if __name__ == "__main__":
    trained = {f"wordpiece-{style}": wordpiece(style) for style in SPECIAL}
    for name, tokenizer in {**trained, "unigram": unigram(), "byte_bpe": byte_bpe()}.items():
        tokenizer.save(str(VOCABULARIES / f"{name}.json"), pretty=False)
