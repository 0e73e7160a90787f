"""Makes inputs of pairs of a query and a document, for rerankers.

Only the document is ever cut: without the whole query, or without the end of a chat template, a score has no meaning.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emb_model_provider.backends.tokenization import EncodedInputs, replace_lone_surrogates
from emb_model_provider.errors import InputTooLongError, RequestError, TextTooLongError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from emb_model_provider.backends.base import ModelDescription, PairTemplate
    from emb_model_provider.backends.tokenization import Tokenization
    from emb_model_provider.model_spec import LongDocuments

_OVERLAP = 4
"""Consecutive windows share a fourth of their tokens, so that a passage at the border of one is whole in the next."""
_MIN_ROOM = 32
"""Tokens of a document that must fit next to the query; in short models a fourth of their length. Otherwise a long query
would turn a document into hundreds of windows without context."""


PairNames = tuple[str, str]
PAIR_NAMES: PairNames = ("query", "documents")
"""How requests name queries and documents, most often."""


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """Pairs as tokens."""

    inputs: EncodedInputs
    """One or, for a long document, several inputs per pair. Its `truncated` is the number of documents that were cut."""
    owners: list[int]
    """The pair that each input belongs to, ascending."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """A pair as tokens; `before` and `after` include the query and everything else that is not the document."""

    before: list[int]
    document: list[int]
    after: list[int]
    first_length: int


class PairTokenization:
    """Tokenizes pairs for a reranker. Thread-safe."""

    def __init__(self, tokenization: Tokenization, description: ModelDescription) -> None:
        self._tokenization = tokenization
        self._template = description.pair_template
        self._frame = tokenization.pair_frame() if description.pair_template is None else None
        self._max_length = description.max_length
        self._has_token_types = description.has_token_types

    def encode(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        prompt: str = "",
        long_documents: LongDocuments | None = "windows",
        max_tokens: int | None = None,
        max_document_tokens: int | None = None,
        names: PairNames = PAIR_NAMES,
    ) -> EncodedPairs:
        """Tokenize pairs of a query and a document.

        Args:
            pairs: At least one pair.
            prompt: Text before each query or, with a chat template, the instruction; empty for that of the template.
            long_documents: What happens to a document that does not fit: it is read in overlapping windows, or cut. None:
                it is an error.
            max_tokens: Longest input, at most that of the model.
            max_document_tokens: Longest document; what is beyond it is not read.
            names: Names of the queries and of the documents, for errors.

        Raises:
            InputTooLongError: A document does not fit, and `long_documents` is None.
            RequestError: A query leaves too little room for a document that does not fit.
            TextTooLongError: The tokenizer would have to read too many characters of a text.
        """
        limit = self._max_length if max_tokens is None else max(1, min(max_tokens, self._max_length))
        inputs = EncodedInputs([], [], 0, first_lengths=[] if self._has_token_types else None)
        owners: list[int] = []
        cut = 0
        for index, pair in enumerate(self._tokenize(pairs, prompt, names)):
            document = pair.document[:max_document_tokens]
            room = limit - len(pair.before) - len(pair.after)
            starts = [0]
            if len(document) > room:
                self._check_room(index, room, limit, long_documents, names)
                if long_documents == "windows":
                    starts = _window_starts(len(document), room)
            cut += len(starts) == 1 and min(room, len(document)) < len(pair.document)
            for start in starts:
                inputs.ids.append([*pair.before, *document[start : start + room], *pair.after])
                inputs.prompt_lengths.append(0)
                if inputs.first_lengths is not None:
                    inputs.first_lengths.append(pair.first_length)
                owners.append(index)
        return EncodedPairs(
            EncodedInputs(inputs.ids, inputs.prompt_lengths, cut, first_lengths=inputs.first_lengths), owners
        )

    def _tokenize(self, pairs: Sequence[tuple[str, str]], prompt: str, names: PairNames) -> list[_Pair]:
        if self._template is not None:
            with _naming(names[1]):
                return self._fill(self._template, pairs, prompt)
        frame = self._frame
        assert frame is not None  # noqa: S101 - set if there is no template
        queries = list(dict.fromkeys(query for query, _ in pairs))
        with _naming(names[0]):
            ids = self._tokenization.ids_between([prompt + query for query in queries])
        of_query = dict(zip(queries, ids, strict=True))
        with _naming(names[1]):
            documents = self._tokenization.ids_between([document for _, document in pairs])
        return [
            _Pair(
                [*frame.before, *of_query[query], *frame.between],
                document,
                frame.after,
                len(frame.before) + len(of_query[query]) + frame.between_of_first,
            )
            for (query, _), document in zip(pairs, documents, strict=True)
        ]

    def _fill(self, template: PairTemplate, pairs: Sequence[tuple[str, str]], prompt: str) -> list[_Pair]:
        """Tokenize each pair as one text, because tokens can cross the borders of the parts of a template."""
        before = template.before
        if prompt:
            before = prompt.join(template.around_instruction or (before, ""))
        pairs = [(replace_lone_surrogates(query), replace_lone_surrogates(document)) for query, document in pairs]
        heads = [f"{before}{query}{template.between}" for query, _ in pairs]
        texts = [f"{head}{document}{template.after}" for head, (_, document) in zip(heads, pairs, strict=True)]
        filled = []
        for head, (_, document), (ids, spans) in zip(heads, pairs, self._tokenization.spans(texts), strict=True):
            start, end = len(head), len(head) + len(document)
            first = next((i for i, (begin, _) in enumerate(spans) if begin >= start), len(ids))
            last = next((i for i, (_, stop) in enumerate(spans) if stop > end and i >= first), len(ids))
            filled.append(_Pair(ids[:first], ids[first:last], ids[last:], first))
        return filled

    def _check_room(
        self, index: int, room: int, limit: int, long_documents: LongDocuments | None, names: PairNames
    ) -> None:
        query, documents = names
        if long_documents is None:
            raise InputTooLongError(index, limit, param=documents)
        if room < (least := min(_MIN_ROOM, max(1, limit // 4))):
            raise RequestError(
                f"The query is too long: this model reads {limit} tokens, and the query leaves {max(0, room)} of them for "
                f"{documents}[{index}], which needs at least {least}. Shorten the query.",
                param=query,
                code="context_length_exceeded",
            )


@contextmanager
def _naming(param: str) -> Iterator[None]:
    """Let the error for a text that is too long name the field of the text."""
    try:
        yield
    except TextTooLongError as error:
        raise TextTooLongError(error.index, error.characters, error.limit, param=param) from None


def _window_starts(length: int, room: int) -> list[int]:
    """Return where windows of `room` tokens begin, so that they cover `length` tokens; the last one ends with these."""
    step = max(1, room - room // _OVERLAP)
    return [*range(0, length - room, step), length - room]
