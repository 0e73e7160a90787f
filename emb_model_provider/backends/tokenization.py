"""Tokenizes texts, and checks token ids, for a backend.

Token ids are truncated here and not by the library, which tokenizes the whole text anyway; so tokenizers have no state,
and any number of threads can share one. With some tokenizers, long texts are truncated before they are tokenized (see
docs/performance.md).
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from emb_model_provider.backends.base import TokenBatch, TokenRules
from emb_model_provider.backends.pre_truncation import TextPreTruncator, require_short
from emb_model_provider.backends.tokenizer_rules import is_known, require_bounded
from emb_model_provider.errors import (
    InferenceError,
    InputTooLongError,
    LoadError,
    ProviderError,
    TokenInputError,
    is_failure,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from emb_model_provider.backends.base import ModelDescription, OutputName
    from emb_model_provider.model_spec import Truncate

_PROBE = "a"
_MAX_SPECIAL_TOKENS = 1_000
"""Tokens that a tokenizer may add to each text."""


@dataclass(frozen=True, slots=True)
class EncodedInputs:
    """The inputs of a request as tokens, in the order of the request."""

    ids: list[list[int]]
    """Special tokens included. No input is empty, and none is longer than allowed."""
    prompt_lengths: list[int]
    """Number of prompt tokens at the start of each input; 0 unless the model excludes prompts."""
    truncated: int
    """Number of inputs that were truncated."""
    first_lengths: list[int] | None = None
    attended: list[int] | None = None
    """These two as in `TokenBatch`."""

    def batch(self, outputs: tuple[OutputName, ...] | None = None, task: str | None = None) -> TokenBatch:
        """Return the inputs as a batch that requests some outputs."""
        return TokenBatch(
            ids=self.ids,
            prompt_lengths=self.prompt_lengths,
            tasks=[task] * len(self.ids) if task is not None else None,
            first_lengths=self.first_lengths,
            attended=self.attended,
            outputs=outputs,
        )


@dataclass(frozen=True, slots=True)
class PairFrame:
    """The special tokens of a pair."""

    before: list[int]
    between: list[int]
    after: list[int]
    between_of_first: int
    """How many of the tokens between the texts have the type of the first text."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a text."""

    id: int
    text: str
    """Its characters in the text; of a special token its name."""
    is_special: bool
    """Whether the model adds it to every text."""
    start: int
    """Position of its first character, in characters; 0 for a special token."""
    stop: int


class Tokenization:
    """The tokenizer of a model. Thread-safe."""

    def __init__(self, description: ModelDescription) -> None:
        """Load the tokenizer of a model, which takes up to a second for a large vocabulary.

        Raises:
            LoadError: Its rules could take too much memory or time, or the library fails.
        """
        contents = json.loads(description.tokenizer_json)
        require_bounded(contents)
        self.is_known = is_known(contents)
        """Whether short texts are known to take a short time."""
        with _panics_as(LoadError):
            self._tokenizer = Tokenizer.from_str(description.tokenizer_json)
            self._first, self._last = self._added_tokens()
        self._prefix, self._suffix = len(self._first), len(self._last)
        if self._prefix + self._suffix > _MAX_SPECIAL_TOKENS:
            raise LoadError(
                f"its tokenizer adds {self._prefix + self._suffix} tokens to each text (tokenizer.json). Choose another model."
            )
        self._max_length = description.max_length
        self._vocab_size = description.vocab_size
        self._excludes_prompt = description.excludes_prompt
        self._rules = description.token_rules or TokenRules()
        self._side: Truncate = "START" if description.truncation_side == "left" else "END"
        # Replaces inputs without any token; see `encode`.
        self._placeholder = [description.pad_token_id]
        added = contents.get("added_tokens") or []
        self._special_ids = frozenset(token["id"] for token in added if token.get("special"))
        self._pre_truncator = TextPreTruncator.for_tokenizer(contents, self._tokenizer)
        self._prompt_length = lru_cache(maxsize=256)(self._measure_prompt)

    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt: str = "",
        truncate: Truncate | None = None,
        max_tokens: int | None = None,
        task: str | None = None,
    ) -> EncodedInputs:
        """Put a prompt before each text, tokenize them, and add the special tokens of the model.

        A multi-vector model has own lengths and a query expansion for the tasks `query` and `document`. `truncate` is the side
        from which inputs that are too long are cut; None is the side of the model.

        Special tokens are kept when an input is truncated, as in transformers. A lone surrogate, which valid Unicode
        text cannot contain, is read as U+FFFD. A text without any token (an empty one, if the tokenizer adds no special
        tokens) becomes one padding token, so that it gets a vector instead of an error.

        Raises:
            InputTooLongError: An input is longer than the model or `max_tokens` allows, and `truncate` is NONE.
            TextTooLongError: The tokenizer would have to read more than `MAX_CHARACTERS` of a text.
            InferenceError: The tokenizer fails.
        """
        truncate = truncate or self._side
        whole = [prompt + text for text in texts] if prompt else list(texts)
        prompt_length = self._prompt_length(prompt) if prompt and self._excludes_prompt else 0
        limit, from_end = self._limit(max_tokens, task), truncate == "START"
        truncator = self._pre_truncator
        if truncator is None or (from_end and (prompt_length or not truncator.from_end)):
            require_short(whole)
            rows = self._ids(whole)
        else:
            rows = truncator.encode(whole, self._ids, keep=limit, from_end=from_end)
        encoded = _truncate(rows, self._prefix, self._suffix, prompt_length, truncate, limit)
        return self._expand(encoded) if task == "query" else encoded

    def encode_token_ids(
        self, rows: Sequence[Sequence[int]], *, truncate: Truncate | None = None, max_tokens: int | None = None
    ) -> EncodedInputs:
        """Check token ids of the model, and truncate them. No special tokens are added, or kept when truncating.

        Raises:
            TokenInputError: An input is empty, or has an id that the model does not have.
            InputTooLongError: An input is longer than the model or `max_tokens` allows, and `truncate` is NONE.
        """
        for index, row in enumerate(rows):
            if not row:
                raise TokenInputError(
                    f"Invalid 'input[{index}]': an array of token ids must not be empty.", code="invalid_value"
                )
            if min(row) < 0 or max(row) >= self._vocab_size:
                wrong = min(row) if min(row) < 0 else max(row)
                raise TokenInputError(
                    f"Invalid 'input[{index}]': {wrong} is not a token id of this model, which has ids 0 to "
                    f"{self._vocab_size - 1}.",
                    code="invalid_value",
                )
        return _truncate([list(row) for row in rows], 0, 0, 0, truncate or self._side, self._limit(max_tokens))

    def are_complete(self, rows: Sequence[Sequence[int]]) -> bool:
        """Return whether all rows begin and end with the special tokens that the model adds to both ends of each text."""
        first, last = self._first, self._last
        if not first or not last:
            return False
        return all(list(row[: len(first)]) == first and list(row[-len(last) :]) == last for row in rows)

    def tokens(self, text: str, *, add_special_tokens: bool = True) -> list[Token]:
        """Return the tokens of a text, without truncation."""
        require_short([text])
        text = replace_lone_surrogates(text)
        with _panics_as(InferenceError):
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return [
            Token(number, name if special else text[start:stop], is_special=bool(special), start=start, stop=stop)
            for number, name, special, (start, stop) in zip(
                encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
            )
        ]

    def ids_between(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text without special tokens and without truncation."""
        require_short(texts)
        with _panics_as(InferenceError):
            try:
                encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            except TypeError:  # see `_ids`
                texts = [replace_lone_surrogates(text) for text in texts]
                encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return likewise the tokens of each text, which must be valid Unicode, with the span of characters of each token."""
        require_short(texts)
        with _panics_as(InferenceError):
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def pair_frame(self) -> PairFrame:
        """Return the special tokens of the model around and between the two texts of a pair."""
        encoding = self._tokenizer.encode(_PROBE, _PROBE)
        owners = encoding.sequence_ids
        first, second = owners.index(0), owners.index(1)
        end_of_first = len(owners) - 1 - owners[::-1].index(0) + 1
        end_of_second = len(owners) - owners[::-1].index(1)
        return PairFrame(
            encoding.ids[:first], encoding.ids[end_of_first:second], encoding.ids[end_of_second:],
            between_of_first=sum(1 for kind in encoding.type_ids[end_of_first:second] if kind == 0),
        )  # fmt: skip

    def _ids(self, texts: list[str]) -> list[list[int]]:
        with _panics_as(InferenceError):
            try:
                encodings = self._tokenizer.encode_batch_fast(texts)
            except TypeError:
                # Raised for a str that is not valid Unicode. This is rare, so texts are not checked beforehand.
                encodings = self._tokenizer.encode_batch_fast([replace_lone_surrogates(text) for text in texts])
        return [encoding.ids or list(self._placeholder) for encoding in encodings]

    def _limit(self, max_tokens: int | None, task: str | None = None) -> int:
        limits = (
            max_tokens,
            {"query": self._rules.query_length, "document": self._rules.document_length}.get(task or ""),
        )
        return max(1, min([self._max_length, *(limit for limit in limits if limit is not None)]))

    def _expand(self, encoded: EncodedInputs) -> EncodedInputs:
        """Add the expansion tokens of a multi-vector model to queries."""
        rules = self._rules
        if rules.expansion_id is None:
            return encoded
        lengths = [len(row) for row in encoded.ids]
        ids = [[*row, *[rules.expansion_id] * (rules.expansion_length - len(row))] for row in encoded.ids]
        return replace(encoded, ids=ids, attended=None if rules.expansion_is_attended else lengths)

    def _added_tokens(self) -> tuple[list[int], list[int]]:
        """Return the special tokens that the tokenizer adds before and after each text."""
        bare = self._tokenizer.encode(_PROBE, add_special_tokens=False).ids
        full = self._tokenizer.encode(_PROBE).ids
        added = len(full) - len(bare)
        for prefix in range(added + 1):
            if full[prefix : prefix + len(bare)] == bare:
                return full[:prefix], full[prefix + len(bare) :]
        return [], []

    def _measure_prompt(self, prompt: str) -> int:
        """Return the number of tokens of a prompt like sentence-transformers: without a closing special token."""
        (whole,) = self._ids([prompt])
        ids = _truncate([whole], self._prefix, self._suffix, 0, "END", self._max_length).ids[0]
        return len(ids) - 1 if ids and ids[-1] in self._special_ids else len(ids)


@contextmanager
def _panics_as(kind: type[ProviderError]) -> Iterator[None]:
    """Turn a panic of the library, which is no Exception, into an error."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise kind(f"the tokenizer failed: {error}") from error


def _truncate(
    rows: list[list[int]], prefix: int, suffix: int, prompt_length: int, truncate: Truncate, limit: int
) -> EncodedInputs:
    """Truncate rows to `limit`, keeping `prefix` tokens at the start and `suffix` tokens at the end of each."""
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
            # There is no space for the text: keep as many of the special tokens as fit.
            rows[index] = (row[:prefix] + row[len(row) - suffix :])[:limit]
        elif truncate == "START":
            rows[index] = row[:prefix] + row[prefix + excess :]
            prompt_lengths[index] = min(prompt_length, max(prefix, prompt_length - excess))
        else:
            end = len(row) - suffix
            rows[index] = row[: end - excess] + row[end:]
    return EncodedInputs(ids=rows, prompt_lengths=prompt_lengths, truncated=truncated)


def replace_lone_surrogates(text: str) -> str:
    """Return a text with surrogate pairs joined, and lone surrogates replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
