"""A minimal server for comparison: FastAPI around `SentenceTransformer.encode`."""

from __future__ import annotations

import argparse
import base64
from typing import Literal

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer


class Request(BaseModel):
    input: str | list[str]
    model: str
    encoding_format: Literal["float", "base64"] = "float"


def create_app(model: SentenceTransformer) -> FastAPI:
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/embeddings")
    def embed(request: Request) -> dict[str, object]:
        texts = [request.input] if isinstance(request.input, str) else request.input
        vectors = model.encode(texts, show_progress_bar=False)
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
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    loaded = SentenceTransformer(arguments.model, device="cpu")
    uvicorn.run(create_app(loaded), host="127.0.0.1", port=arguments.port, access_log=False)
