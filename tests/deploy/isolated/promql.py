"""Parses expressions of PromQL, and prints the errors."""

from __future__ import annotations

import json
import sys

import promql_parser

errors = {}
for expression in json.load(sys.stdin)["expressions"]:
    try:
        promql_parser.parse(expression)
    except ValueError as error:
        errors[expression] = str(error)
print(json.dumps(errors))  # noqa: T201 - the result
