"""Decodes OpenAI's token ids to text, for clients that tokenize before they send (the default of LangChain)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from emb_model_provider.errors import LoadError, TokenInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiktoken import Encoding


@lru_cache(maxsize=1)
def load_cl100k() -> Encoding:
    """Return the encoding cl100k_base of tiktoken.

    tiktoken reads its vocabulary from TIKTOKEN_CACHE_DIR, or downloads it once.

    Raises:
        LoadError: The package or the vocabulary is missing; the message says how to provide it.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise LoadError(
            "token_input=cl100k needs tiktoken: install it with `uv sync --extra cl100k`, or `pip install tiktoken`."
        ) from error
    try:
        return tiktoken.get_encoding("cl100k_base")
    except Exception as error:
        raise LoadError(
            "token_input=cl100k needs the vocabulary cl100k_base, which could not be downloaded "
            f"({type(error).__name__}): allow the download, or set TIKTOKEN_CACHE_DIR to a directory in which tiktoken "
            "has stored it."
        ) from error


def decode_cl100k(rows: Sequence[Sequence[int]]) -> list[str]:
    """Return the text of each row of cl100k_base token ids.

    Raises:
        TokenInputError: An id is unknown, or a row is not complete UTF-8. Replacing half a character would embed a
            different text.
    """
    encoding = load_cl100k()
    texts = []
    for index, row in enumerate(rows):
        try:
            texts.append(encoding.decode_bytes(row).decode("utf-8"))
        except (KeyError, OverflowError, UnicodeDecodeError) as error:
            raise TokenInputError(
                f"Invalid 'input[{index}]': these cl100k_base token ids cannot be decoded to text.",
                code="invalid_value",
            ) from error
    return texts
