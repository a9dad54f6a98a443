"""POST /v1/embeddings: the mean of a text's last hidden states, of length 1."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np

from serve.api.completions import prompts_of
from serve.api.errors import ApiError
from serve.api.schemas import EmbeddingBody
from serve.api.service import Service


async def embed(service: Service, body: EmbeddingBody) -> dict[str, Any]:
    """The answer to a body. ApiError 400 for a text that is empty, too long, or holds what is no token."""
    size = service.engine.config.hidden_size
    if body.dimensions not in (None, size):
        raise ApiError(400, f"dimensions={body.dimensions}: this model's embeddings have {size}", param="dimensions")
    if body.input == "" or (isinstance(body.input, list) and "" in body.input):
        raise ApiError(400, "input holds an empty text", param="input", code="invalid_value")
    texts = prompts_of(service, body.input, "input")
    most, vocab = service.engine.context, service.tokenizer.vocab_size
    for index, tokens in enumerate(texts):
        if len(tokens) > most:
            words = f"input {index + 1} has {len(tokens)} tokens; this model takes {most}"
            raise ApiError(400, words, param="input", code="context_length_exceeded")
        wrong = next((token for token in tokens if not 0 <= token < vocab), None)
        if wrong is not None:
            raise ApiError(
                400, f"input {index + 1} holds the id {wrong}; tokens run from 0 to {vocab - 1}", param="input"
            )
    found = []
    for tokens in texts:
        vector = await asyncio.to_thread(service.prompts.embedding, tokens)
        found.append(vector.astype(np.float32))
    count = sum(map(len, texts))
    service.metrics.prompt_tokens.inc(count)
    data = [
        {"object": "embedding", "index": index, "embedding": written(vector, body.encoding_format)}
        for index, vector in enumerate(found)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "model": service.name, "data": data, "usage": usage}


def written(vector: np.ndarray, form: str | None) -> list[float] | str:
    """Numbers, or the base64 of their 4 bytes each, least first."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
