"""Parses JSON that a client sent."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson

_MAX_INTEGER_DIGITS = 20
"""Digits, with the sign, of the longest 64-bit integer."""


def parse_json(content: bytes | str) -> Any:
    """Return the value of a JSON text, which can also have escaped lone surrogates, unlike those of orjson.

    Raises:
        ValueError: It is not valid.
    """
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        try:
            return json.loads(content, parse_constant=_reject_constant, parse_int=_parse_integer)
        except RecursionError as error:
            raise ValueError("it is nested too deep") from error


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def _parse_integer(digits: str) -> int | float:
    """Parse an integer as orjson does: with more than 64 bits it is a float, and out of a float's range invalid.

    Otherwise a number with thousands of digits would be accepted, and quoted in the error message.
    """
    if len(digits) <= _MAX_INTEGER_DIGITS:
        return int(digits)
    number = float(digits)
    if math.isinf(number):
        raise ValueError("the number is out of range")
    return number
