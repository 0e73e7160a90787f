"""A calculator without a model: each answer is determined by its text."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from emb_model_provider.batch_jobs.types import Answer
from emb_model_provider.errors import InputTooLongError, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping


class HashCalculator:
    """Answers with the hash of the text, and counts what it answers. A text `too long` is refused when it is computed."""

    def __init__(self, *, line_s: float = 0.0) -> None:
        """Create a calculator that needs `line_s` seconds for a line, one after the other, as a model does."""
        self.computed: Counter[str] = Counter()
        self._line_s = line_s
        self._model = asyncio.Lock()

    def check(self, endpoint: str, body: Mapping[str, Any]) -> int:
        if "input" not in body:
            raise RequestError("Missing required parameter: 'input'.", param="input", code="missing_required_parameter")
        return len(body["input"]) if isinstance(body["input"], list) else 1

    async def answer(self, endpoint: str, body: Mapping[str, Any], request_id: str) -> Answer:
        async with self._model:
            self.count(body)
            await asyncio.sleep(self._line_s)
        if body["input"] == "too long":
            raise InputTooLongError(0, 512)
        text = json.dumps(body["input"])
        vector = list(hashlib.sha256(text.encode()).digest())
        return Answer(200, json.dumps({"data": [{"embedding": vector}], "id": request_id}).encode(), len(text))

    def count(self, body: Mapping[str, Any]) -> None:
        self.computed[json.dumps(body["input"])] += 1
