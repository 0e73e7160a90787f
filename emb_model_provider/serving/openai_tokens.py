"""OpenAI's token ids back to text, for clients that tokenize before they send (LangChain's default)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from emb_model_provider.errors import LoadError, TokenInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiktoken import Encoding


@lru_cache(maxsize=1)
def load_cl100k() -> Encoding:
    """Return tiktoken's cl100k_base, which reads its vocabulary from TIKTOKEN_CACHE_DIR or downloads it once.

    Raises: LoadError that says how to provide the package or the vocabulary.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise LoadError(
            "token_input=cl100k needs tiktoken: install it with `uv sync --extra cl100k`, "
            "or `pip install tiktoken`."
        ) from error
    try:
        return tiktoken.get_encoding("cl100k_base")
    except Exception as error:
        raise LoadError(
            f"token_input=cl100k needs the cl100k_base vocabulary, which could not be fetched ({type(error).__name__}): "
            "set TIKTOKEN_CACHE_DIR to a directory where tiktoken has stored it before, or allow its download."
        ) from error


def decode_cl100k(rows: Sequence[Sequence[int]]) -> list[str]:
    """Return the text of each row of cl100k_base token ids.

    Raises: TokenInputError where an id is unknown or a row is not whole UTF-8: half a character would
    become another text.
    """
    encoding = load_cl100k()
    texts = []
    for index, row in enumerate(rows):
        try:
            texts.append(encoding.decode_bytes(row).decode("utf-8"))
        except (KeyError, OverflowError, UnicodeDecodeError) as error:
            raise TokenInputError(
                f"Invalid 'input[{index}]': these cl100k_base token ids do not decode to text.",
                code="invalid_value",
            ) from error
    return texts
