"""A minimal server for comparison: FastAPI around the `encode` of a library.

It runs in the environment of the library, and imports nothing else of this repository. `--batch-ms` collects the requests
that arrive within this time into one call; without it, each request is one call.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Encode = Callable[[list[str]], Sequence[Any]]
    """Texts to their vectors, arrays of float32."""


class Request(BaseModel):
    input: str | list[str]
    model: str
    encoding_format: Literal["float", "base64"] = "float"


class Batcher:
    """Collects the texts of several requests, and encodes them in one thread, one batch at a time."""

    def __init__(self, encode: Encode, delay_s: float) -> None:
        self._encode = encode
        self._delay_s = delay_s
        self._waiting: list[tuple[list[str], asyncio.Future[Sequence[Any]]]] = []
        self._thread = ThreadPoolExecutor(1)
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, texts: list[str]) -> Sequence[Any]:
        future: asyncio.Future[Sequence[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((texts, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            await asyncio.sleep(self._delay_s)
            batch, self._waiting = self._waiting, []
            texts = [text for part, _ in batch for text in part]
            try:
                vectors = await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, texts)
            except Exception as error:  # noqa: BLE001 - each of the waiting requests fails
                for _, future in batch:
                    future.set_exception(error)
                continue
            start = 0
            for part, future in batch:
                future.set_result(vectors[start : start + len(part)])
                start += len(part)


def load(library: str, model: str) -> Encode:
    """Load a model with a library: sentence-transformers with torch at fp32 or with OpenVINO, or fastembed.

    OpenVINO computes at bf16 if the processor has it.
    """
    if library == "fastembed":
        from fastembed import TextEmbedding

        name = "sentence-transformers/all-MiniLM-L6-v2"
        embedding = TextEmbedding(name, specific_model_path=model, local_files_only=True)
        return lambda texts: list(embedding.embed(texts))

    from sentence_transformers import SentenceTransformer

    if library == "openvino":
        import openvino

        # bf16 is emulated on a processor without it, and 30 times as slow as fp32.
        has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        options: dict[str, Any] = {
            "export": True,
            "ov_config": {"INFERENCE_PRECISION_HINT": "bf16" if has_bf16 else "f32"},
        }
        loaded = SentenceTransformer(model, device="cpu", backend="openvino", model_kwargs=options)
    else:
        loaded = SentenceTransformer(model, device="cpu")
    return lambda texts: loaded.encode(texts, show_progress_bar=False)


def create_app(encode: Encode, batch_ms: float | None) -> FastAPI:
    app = FastAPI()

    async def in_thread(texts: list[str]) -> Sequence[Any]:
        return await asyncio.to_thread(encode, texts)

    run: Callable[[list[str]], Awaitable[Sequence[Any]]]
    run = in_thread if batch_ms is None else Batcher(encode, batch_ms / 1000)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/embeddings")
    async def embed(request: Request) -> dict[str, object]:
        vectors = await run([request.input] if isinstance(request.input, str) else request.input)
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": vector.tolist()
                if request.encoding_format == "float"
                else base64.b64encode(vector.tobytes()).decode(),
            }
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        return {"object": "list", "data": data, "model": request.model, "usage": usage}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", choices=["torch", "openvino", "fastembed"], default="torch")
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-ms", type=float)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    loaded = load(arguments.library, arguments.model)
    uvicorn.run(create_app(loaded, arguments.batch_ms), host="127.0.0.1", port=arguments.port, access_log=False)
