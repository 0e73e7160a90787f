"""Code and commands that repeat what was done in the console."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_KEY = "YOUR_KEY"
_DOT = "const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);"


@dataclass(frozen=True, slots=True)
class Snippet:
    """Code in one language."""

    language: str
    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Calculation:
    """Requests for embeddings, and what was computed from their vectors."""

    requests: Mapping[str, Mapping[str, Any]]
    """Bodies of `POST /v1/embeddings`, by the name of the variable that gets the vectors."""
    python: str
    """An expression with numpy arrays."""
    javascript: str
    """An expression with arrays and the function `dot`."""


def snippets_of(calculation: Calculation, url: str, *, needs_key: bool) -> Sequence[Snippet]:
    """Return code that repeats a calculation with the service at `url`."""
    return [
        Snippet("curl", _curl(calculation, url, needs_key=needs_key)),
        Snippet("Python", _python(calculation, url, needs_key=needs_key)),
        Snippet("JavaScript", _javascript(calculation, url, needs_key=needs_key)),
    ]


def rerank_snippets(body: Mapping[str, Any], url: str, *, needs_key: bool) -> Sequence[Snippet]:
    """Return code that sends a request for the scores of documents to the service at `url`."""
    path = "/v1/rerank"
    headers = {"Authorization": f"Bearer {_KEY}"} if needs_key else {}
    python = [
        "import httpx",
        "",
        f"body = {dict(body)!r}",
        f"response = httpx.post({url + path!r}, json=body, headers={headers!r}, timeout=60)",
        'for result in response.json()["results"]:',
        '    print(result["index"], result["relevance_score"])',
    ]
    javascript = [
        f"const response = await fetch({json.dumps(url + path)}, {{",
        '  method: "POST",',
        f"  headers: {json.dumps({'Content-Type': 'application/json'} | headers)},",
        f"  body: JSON.stringify({json.dumps(body, ensure_ascii=False)}),",
        "});",
        "console.log((await response.json()).results);",
    ]
    return [
        Snippet("curl", curl_command(url, body, needs_key=needs_key, path=path, separator=" \\\n  ")),
        Snippet("Python", "\n".join(python)),
        Snippet("JavaScript", "\n".join(javascript)),
    ]


def cli_command(*words: str, **options: str | bool | None) -> str:
    """Return a command of `emb-provider`, with its options that are not None or False."""
    command = ["emb-provider", *words]
    for name, value in options.items():
        if value:
            command += [f"--{name}"] if value is True else [f"--{name}", value]
    return shlex.join(command)


def curl_command(
    url: str, body: Mapping[str, Any], *, needs_key: bool, path: str = "/v1/embeddings", separator: str = " "
) -> str:
    """Return a command that sends a request, by default for embeddings."""
    key = [f"-H 'Authorization: Bearer {_KEY}'"] if needs_key else []
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return separator.join(
        [f"curl {shlex.quote(url + path)}", "-H 'Content-Type: application/json'", *key, f"-d {data}"]
    )


def _curl(calculation: Calculation, url: str, *, needs_key: bool) -> str:
    bodies = calculation.requests.values()
    return "\n\n".join(curl_command(url, body, needs_key=needs_key, separator=" \\\n  ") for body in bodies)


def _python(calculation: Calculation, url: str, *, needs_key: bool) -> str:
    lines = [
        "import numpy as np",
        "from openai import OpenAI",
        "",
        f"client = OpenAI(base_url={f'{url}/v1'!r}, api_key={_KEY if needs_key else 'none'!r})",
        "",
        "",
        "def embed(texts, **fields):",
        "    response = client.embeddings.create(input=texts, extra_body=fields, model=fields['model'])",
        "    return np.array([item.embedding for item in response.data])",
        "",
        "",
    ]
    for name, body in calculation.requests.items():
        fields = ", ".join(f"{field}={value!r}" for field, value in body.items() if field != "input")
        lines.append(f"{name} = embed({body['input']!r}, {fields})")
    return "\n".join([*lines, f"print({calculation.python})"])


def _javascript(calculation: Calculation, url: str, *, needs_key: bool) -> str:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {_KEY}"} if needs_key else {})
    lines = [
        "async function embed(body) {",
        f"  const response = await fetch({json.dumps(f'{url}/v1/embeddings')}, {{",
        '    method: "POST",',
        f"    headers: {json.dumps(headers)},",
        "    body: JSON.stringify(body),",
        "  });",
        "  return (await response.json()).data.map((item) => item.embedding);",
        "}",
        "",
        _DOT,
    ]
    for name, body in calculation.requests.items():
        lines.append(f"const {name} = await embed({json.dumps(body, ensure_ascii=False)});")
    return "\n".join([*lines, f"console.log({calculation.javascript});"])
