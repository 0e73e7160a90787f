"""Long texts lose most of their characters before they are tokenized, where that provably changes no token that is kept.

A tokenizer reads all of a text, whatever becomes of the tokens: 1 MB of '#' took 0.7 s and 400 MiB with
all-MiniLM-L6-v2's, for 256 tokens. Of BERT's own (`BertNormalizer`, `BertPreTokenizer`, WordPiece) only a piece need be
read. Its words are tokenized one by one, and where they begin and end is decided by single characters, so that a cut can
change only what touches it:

- the word that is cut, combining marks that wait to be put in order included: at most `max_input_chars_per_word` tokens,
  since WordPiece makes one token of a longer word, and no token is shorter than a character;
- a special token written out in the text, such as `[SEP]`, that is cut or that now stands at an end: as many characters
  as it has, and a few more tokens where normalization (NFD) makes up to four characters of one.

So where a piece from the start of a text has that many tokens more than will be kept, those that are kept are the whole
text's. The same holds for a piece from its end, if no special token's end is another's beginning: else it could be read
differently from the cut on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_CHARACTERS_PER_TOKEN = 16
"""Of the first piece: most texts have 1 to 6, so that one piece is enough."""
_GROWTH = 8
_LONGEST_DECOMPOSITION = 4
"""Characters that NFD makes of one."""


@dataclass(frozen=True, slots=True)
class Shortening:
    """What is known of a tokenizer that may read pieces."""

    margin: int
    """Tokens next to a cut that may differ from the whole text's."""
    from_end: bool
    """Whether a piece may also be taken from a text's end."""

    @classmethod
    def of(cls, tokenizer: Mapping[str, Any]) -> Shortening | None:
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
