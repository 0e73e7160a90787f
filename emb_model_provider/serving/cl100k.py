"""Decodes token ids of cl100k_base, the tokenizer of OpenAI's embedding models, for clients that send ids instead of text.

The file `cl100k_base.xz` has the vocabulary of tiktoken (its license is in `cl100k_base.LICENSE`): the length of each token
as one byte, then the bytes of all tokens, both in the order of the ids. It is a quarter of the size of tiktoken's file, and
installed with the package, because tiktoken would download its file.
"""

from __future__ import annotations

import codecs
import hashlib
import lzma
from base64 import b64encode
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from emb_model_provider.errors import BodyTooLargeError, LoadError

if TYPE_CHECKING:
    from collections.abc import Sequence

FILE: Final = Path(__file__).with_name("cl100k_base.xz")
MAX_ID: Final = 100_276
_SHA256: Final = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
"""sha256 of tiktoken's file cl100k_base.tiktoken, as tiktoken checks it."""
_TOKENS: Final = 100_256
_SPECIAL_TOKENS: Final = {
    100_257: b"<|endoftext|>",
    100_258: b"<|fim_prefix|>",
    100_259: b"<|fim_middle|>",
    100_260: b"<|fim_suffix|>",
    MAX_ID: b"<|endofprompt|>",
}
_MAX_CONTINUATION_BYTES: Final = 3
"""Bytes of a character in UTF-8 after the first one."""


@lru_cache(maxsize=1)
def load_vocabulary(file: Path = FILE) -> Sequence[bytes]:
    """Return the bytes of each token by its id, which are empty for an id that is not used. Takes about 0.1 s.

    Raises:
        LoadError: The file is missing, or its content is not that of tiktoken.
    """
    try:
        contents = lzma.decompress(file.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise LoadError(f"{file.name} is missing or damaged ({error}): install emb-model-provider again.") from error
    tokens: list[bytes] = []
    lines = hashlib.sha256()
    start = _TOKENS
    for number, length in enumerate(contents[:_TOKENS]):
        token = contents[start : start + length]
        start += length
        tokens.append(token)
        lines.update(b"%s %d\n" % (b64encode(token), number))
    if lines.hexdigest() != _SHA256 or start != len(contents):
        raise LoadError(f"{file.name} does not contain the vocabulary of tiktoken: install emb-model-provider again.")
    tokens += [_SPECIAL_TOKENS.get(number, b"") for number in range(_TOKENS, MAX_ID + 1)]
    return tokens


def decode(row: Sequence[int], max_bytes: int) -> str:
    """Return the text of token ids, which must not be longer than `max_bytes`.

    Clients split long texts between tokens, which may be inside a character: the part of a character at either end of the
    row is left out.

    Raises:
        BodyTooLargeError: The text is longer; a token has up to 128 bytes.
        ValueError: An id is not one of cl100k_base, or the text is not valid UTF-8. The message says which.
        LoadError: The vocabulary cannot be read.
    """
    vocabulary = load_vocabulary()
    for number in (min(row, default=0), max(row, default=0)):
        if not 0 <= number <= MAX_ID:
            raise ValueError(f"{number} is out of the range 0 to {MAX_ID}")
    tokens = [vocabulary[number] for number in row]
    if b"" in tokens:
        raise ValueError(f"{row[tokens.index(b'')]} is not used")
    if sum(map(len, tokens)) > max_bytes:
        raise BodyTooLargeError("The text of the token ids is larger than a request body may be. Send less at a time.")
    data = b"".join(tokens)
    start = 0
    while start < min(_MAX_CONTINUATION_BYTES, len(data)) and _is_continuation(data[start]):
        start += 1
    try:
        # An incremental decoder keeps an incomplete character at the end for later.
        return codecs.getincrementaldecoder("utf-8")().decode(data[start:])
    except UnicodeDecodeError as error:
        raise ValueError("their bytes are not valid UTF-8") from error


def _is_continuation(byte: int) -> bool:
    return byte & 0b1100_0000 == 0b1000_0000
