"""Lists of repositories to transfer: a source and a destination in each line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from emb_model_provider.errors import InvalidTransferError
from emb_model_provider.transfer.location import parse_destination, parse_source

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.transfer.location import Location

_MAX_PROBLEMS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Pair:
    """A repository and where it is transferred to."""

    source: Location
    destination: Location


def read_pairs(path: Path) -> list[Pair]:
    """Return the pairs of a list file.

    Each line is `SOURCE DESTINATION`. Blank lines are ignored, and so is everything after a `#` that begins a line or
    follows a space.

    Raises:
        InvalidTransferError: The file cannot be read, or lines are invalid. The message names all of them, and nothing
            was transferred.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidTransferError(f"{path} cannot be read: {reason}.") from error
    pairs: list[Pair] = []
    problems: list[str] = []
    lines_of: dict[Location, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = _words(line)
        if not words:
            continue
        try:
            pair = _parse(words)
        except InvalidTransferError as error:
            problems.append(f"line {number}: {error}")
            continue
        if pair.destination in lines_of:
            problems.append(
                f"line {number}: {pair.destination} is the destination of line {lines_of[pair.destination]}"
            )
            continue
        lines_of[pair.destination] = number
        pairs.append(pair)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:_MAX_PROBLEMS_SHOWN])
        more = len(problems) - _MAX_PROBLEMS_SHOWN
        rest = f"\n  and {more} more" if more > 0 else ""
        raise InvalidTransferError(f"{path} has invalid lines, and nothing was transferred:\n{shown}{rest}")
    if not pairs:
        raise InvalidTransferError(f"{path} names no repository. Write a source and a destination in each line.")
    return pairs


def _words(line: str) -> list[str]:
    words = line.split()
    comment = next((index for index, word in enumerate(words) if word.startswith("#")), len(words))
    return words[:comment]


def _parse(words: list[str]) -> Pair:
    if len(words) != 2:
        raise InvalidTransferError(f"expected a source and a destination, found {len(words)} words: {' '.join(words)}")
    source = parse_source(words[0])
    return Pair(source, parse_destination(words[1], source))
