"""From texts, or a caller's token ids, to the token ids that a backend reads.

How tokenizers are used here was measured with all-MiniLM-L6-v2's WordPiece (tokenizers 0.23, 2 cores):

- One text of ten tokens takes 17 µs with `encode_batch_fast([text])` and 26 µs with `encode(text)`, which also
  works out character offsets. For two texts and more one `encode_batch_fast` is a third faster than a call per
  text while TOKENIZERS_PARALLELISM is left on, and equal to it when it is off; so it is left alone.
- 1 MB of text takes 0.25 s with `encode_batch_fast` and 0.5 s with `encode`. The library's own truncation does not
  shorten that (0.25 and 0.56 s): it tokenizes everything, then cuts. Cutting the ids here costs nothing, and leaves
  the tokenizer without state, so that any number of threads may share it. What need not be tokenized at all is known
  of some tokenizers: see `shortening.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from emb_model_provider.errors import InputTooLongError, TokenInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from emb_model_provider.backends.base import ModelDescription
    from emb_model_provider.model_spec import Truncate


_PROBE = "a"


@dataclass(frozen=True, slots=True)
class EncodedInputs:
    """The inputs of a request as tokens, in the order of the request."""

    ids: list[list[int]]
    """Token ids of each input, special tokens included, none empty, none longer than allowed."""
    prompt_lengths: list[int]
    """Tokens at the start of each input that are its prompt; all 0 unless the model excludes prompts."""
    truncated: int
    """How many inputs were cut."""


class Tokenization:
    """A model's tokenizer. Any number of threads may use one instance at a time."""

    def __init__(self, description: ModelDescription) -> None:
        """Read the description's tokenizer, which takes up to a second for a large vocabulary."""
        self._tokenizer = Tokenizer.from_str(description.tokenizer_json)
        self._max_length = description.max_length
        self._vocab_size = description.vocab_size
        self._excludes_prompt = description.excludes_prompt
        # What stands in for a text that gives no tokens at all (see `encode`).
        self._blank = [description.pad_token_id]
        self._prefix, self._suffix = self._special_tokens_around_a_text()
        contents = json.loads(description.tokenizer_json)
        added = contents.get("added_tokens") or []
        self._special_ids = frozenset(token["id"] for token in added if token.get("special"))
        self._shortening = TextPreTruncator.of(contents)
        self._prompt_length = lru_cache(maxsize=256)(self._measure_prompt)

    def encode(
        self, texts: Sequence[str], *, prompt: str = "", truncate: Truncate, max_tokens: int | None = None
    ) -> EncodedInputs:
        """Tokenize texts, each with `prompt` before it, adding the model's special tokens.

        An input longer than the model's maximum, or than `max_tokens` where that is less, loses tokens at its end
        or its start but keeps its special tokens, as transformers cuts it. A lone surrogate, which no UTF-8 text
        can hold, is read as U+FFFD. A text that gives no tokens at all (an empty one, where the tokenizer adds no
        special tokens) becomes one padding token: the model then answers with some vector instead of failing.

        Raises: InputTooLongError for the first input that is too long, where `truncate` is NONE.
        """
        whole = [prompt + text for text in texts] if prompt else list(texts)
        measured = self._prompt_length(prompt) if prompt and self._excludes_prompt else 0
        limit, from_end = self._limit(max_tokens), truncate == "START"
        shortening = self._shortening
        if shortening is None or (from_end and (measured or not shortening.from_end)):
            rows = self._ids(whole)
        else:
            rows = shortening.encode(whole, self._ids, keep=limit, from_end=from_end)
        return self._cut(rows, self._prefix, self._suffix, measured, truncate, limit)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        try:
            encodings = self._tokenizer.encode_batch_fast(texts)
        except TypeError:
            # The library's answer to a str that is not valid Unicode. Rare, so it is not looked for beforehand.
            encodings = self._tokenizer.encode_batch_fast([_without_lone_surrogates(text) for text in texts])
        # Texts that give no tokens do so before and after cutting, so the stand-in needs no cutting.
        return [encoding.ids or list(self._blank) for encoding in encodings]

    def encode_token_ids(
        self, rows: Sequence[Sequence[int]], *, truncate: Truncate, max_tokens: int | None = None
    ) -> EncodedInputs:
        """Take the model's own token ids as they are: no special tokens are added, and none are kept when cutting.

        Raises: TokenInputError with code `invalid_value` for an empty input or an id that the model does not have;
        InputTooLongError for the first input that is too long, where `truncate` is NONE.
        """
        for index, row in enumerate(rows):
            if not row:
                raise TokenInputError(
                    f"Invalid 'input[{index}]': an array of token ids must not be empty.",
                    code="invalid_value",
                )
            if min(row) < 0 or max(row) >= self._vocab_size:
                wrong = min(row) if min(row) < 0 else max(row)
                raise TokenInputError(
                    f"Invalid 'input[{index}]': {wrong} is not a token id of this model, which has ids 0 to "
                    f"{self._vocab_size - 1}.",
                    code="invalid_value",
                )
        return self._cut([list(row) for row in rows], 0, 0, 0, truncate, self._limit(max_tokens))

    def _limit(self, max_tokens: int | None) -> int:
        return self._max_length if max_tokens is None else max(1, min(max_tokens, self._max_length))

    @staticmethod
    def _cut(
        rows: list[list[int]], prefix: int, suffix: int, prompt_length: int, truncate: Truncate, limit: int
    ) -> EncodedInputs:
        """Cut rows to `limit`, keeping `prefix` tokens at the start and `suffix` at the end of each."""
        prompt_lengths = [min(prompt_length, limit)] * len(rows)
        truncated = 0
        for index, row in enumerate(rows):
            excess = len(row) - limit
            if excess <= 0:
                continue
            if truncate == "NONE":
                raise InputTooLongError(index, limit)
            truncated += 1
            if limit <= prefix + suffix:
                # No room for any of the text: as many of the special tokens as fit.
                rows[index] = (row[:prefix] + row[len(row) - suffix :])[:limit]
            elif truncate == "START":
                rows[index] = row[:prefix] + row[prefix + excess :]
                prompt_lengths[index] = min(prompt_length, max(prefix, prompt_length - excess))
            else:
                end = len(row) - suffix
                rows[index] = row[: end - excess] + row[end:]
        return EncodedInputs(ids=rows, prompt_lengths=prompt_lengths, truncated=truncated)

    def _special_tokens_around_a_text(self) -> tuple[int, int]:
        """Return how many special tokens the tokenizer puts before and after every text."""
        bare = self._tokenizer.encode(_PROBE, add_special_tokens=False).ids
        full = self._tokenizer.encode(_PROBE).ids
        around = len(full) - len(bare)
        for prefix in range(around + 1):
            if full[prefix : prefix + len(bare)] == bare:
                return prefix, around - prefix
        return 0, 0

    def _measure_prompt(self, prompt: str) -> int:
        """Return the tokens of a prompt, as sentence-transformers counts them: without a closing special token."""
        whole = self._tokenizer.encode_batch_fast([_without_lone_surrogates(prompt)])[0].ids
        ids = self._cut([whole], self._prefix, self._suffix, 0, "END", self._max_length).ids[0]
        return len(ids) - 1 if ids and ids[-1] in self._special_ids else len(ids)


def _without_lone_surrogates(text: str) -> str:
    """Return `text` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_CHARACTERS_PER_TOKEN = 16
"""Of the first piece: most texts have 1 to 6, so that one piece is enough."""
_GROWTH = 8
_LONGEST_DECOMPOSITION = 4
"""Characters that NFD makes of one."""


@dataclass(frozen=True, slots=True)
class TextPreTruncator:
    """What is known of a tokenizer that may read pieces."""

    margin: int
    """Tokens next to a cut that may differ from the whole text's."""
    from_end: bool
    """Whether a piece may also be taken from a text's end."""

    @classmethod
    def of(cls, tokenizer: Mapping[str, Any]) -> TextPreTruncator | None:
        """Return what holds for a `tokenizer.json`; None where it must read whole texts."""
        kinds = [(tokenizer.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
        added = tokenizer.get("added_tokens") or []
        # Where special tokens are looked for after normalization, they would have to be measured after it too.
        if kinds != ["BertNormalizer", "BertPreTokenizer", "WordPiece"] or any(
            token.get("normalized") for token in added
        ):
            return None  # fmt: skip
        contents = [token["content"] for token in added]
        longest = max(map(len, contents), default=0)
        # One more character at each side, which may decide whether a special token stands alone, and one of a surrogate pair.
        at_cut = _LONGEST_DECOMPOSITION * (longest + 2)
        return cls(
            margin=tokenizer["model"].get("max_input_chars_per_word", 100) + at_cut,
            from_end=not _overlap(contents),
        )

    def encode(
        self,
        texts: Sequence[str],
        encode: Callable[[list[str]], list[list[int]]],
        *,
        keep: int,
        from_end: bool,
    ) -> list[list[int]]:
        """Return the ids of each text, or of so much of it that its first (or last) `keep` ids are the whole text's.

        A row that is not the whole text's has more than `keep` ids. `encode` gives the ids of texts; special tokens that
        it adds count as if they were the text's, so `keep` must include them.
        """
        enough = keep + self.margin
        characters = _CHARACTERS_PER_TOKEN * enough
        rows: list[list[int]] = [[]] * len(texts)
        waiting = list(range(len(texts)))
        while waiting:
            pieces = [texts[i][-characters:] if from_end else texts[i][:characters] for i in waiting]
            again = []
            for i, piece, ids in zip(waiting, pieces, encode(pieces), strict=True):
                if len(piece) == len(texts[i]) or len(ids) > enough:
                    rows[i] = ids
                else:
                    again.append(i)
            waiting, characters = again, characters * _GROWTH
        return rows


def _overlap(contents: Sequence[str]) -> bool:
    """Tell whether an end of one is the beginning of one, itself included."""
    beginnings = {content[:length] for content in contents for length in range(1, len(content))}
    return any(content[start:] in beginnings for content in contents for start in range(1, len(content)))
