"""Unusual texts that are valid in JSON and have a vector."""

from __future__ import annotations


def odd_texts(size: int) -> dict[str, str]:
    """Return unusual texts by name; the long ones have `size` characters."""
    return {
        "empty": "",
        "lone surrogates": "a\ud800b\udfffc\udc00\ud83d",
        "NUL": "nul\0inside\0",
        "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f",
        "right to left": "\u202eשלום עולם\u202c مرحبا بالعالم",
        "combining marks": "Z\u0351\u036b\u0343a\u0328\u0489l\u0334g\u0337o" * 50,
        "marks without a letter": "\u0301" * 3000,
        "emoji sequences": "👩‍👩‍👧‍👦🏳️‍🌈🇨🇳👍🏽1️⃣" * 20,
        "byte order marks": "\ufeffhello\ufeff",
        "private use": "\ue000\uf8ff\U000f0000\U0010fffd",
        "not characters": "\uffff\ufdd0\U0010ffff",
        "separators": "a\u2028b\u2029c\u0085d\u00a0e\u3000f",
        "looks special": "[CLS] [SEP] [PAD] [MASK] <s> </s> <|endoftext|> ##ing ▁a",
        "100,000 spaces": " " * 100_000,
        "one character": "a" * size,
        "words": "word " * (size // 5),
        "#": "#" * size,
        "CJK": "天地玄黄宇宙洪荒" * (size // 8),
        "a long word": "abcdefghijklmnopqrstuvwxyz" * (size // 26),
        "digits": "0123456789" * (size // 10),
        "a long line of marks": "e" + "\u0301" * (size - 1),
    }
