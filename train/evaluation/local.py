"""A MODEL in this process: replies by the engine, log-probabilities by the scorer, from the same arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from errors import UserError
from model.load import load_model
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from serve.engine import Engine
from serve.request import Completion, Request
from serve.sampling_params import MAX_SEED, SamplingParams
from serve.text import ReplyText
from sharding.mesh import platform
from train.evaluation.answerer import Ask, Reply, Settings, Tell
from train.evaluation.pieces import Pieces, make_pieces
from train.scoring import Scorer
from train.tasks.likelihood import Continuation, Likelihood

SLOTS = {"cpu": 16, "other": 128}
"""Replies that are drawn at the same time."""


class Local:
    """A model's answers.

    Args:
        path: any MODEL.
        slots: replies that are drawn at the same time; None: as many as suit the machine.
        batch_tokens: positions that are scored together.

    Raises:
        UserError: there is no model, or no tokenizer.
    """

    def __init__(self, path: str | Path, *, slots: int | None = None, batch_tokens: int = 4096):
        self.name = str(path)
        self._model, self.tokenizer = load_model(path)
        self._slots = slots or SLOTS.get(platform(), SLOTS["other"])
        self._batch_tokens = batch_tokens
        self.fingerprint: str = fingerprint(self._model, self.tokenizer)

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self._model, self.tokenizer, slots=self._slots)

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._model, self._batch_tokens)

    def replies(self, asked: Sequence[Ask], settings: Settings) -> Iterator[tuple[int, Reply]]:
        """As `Answerer` has it; many at a time, prompts that begin alike read once."""
        engine, waiting = self._engine, dict[int, Request]()
        for index, one in enumerate(asked):
            prompt = self.tokenizer.encode_chat(
                one.messages(settings),
                tools=one.problem.tools,
                add_generation_prompt=True,
                enable_thinking=settings.thinking,
            )
            if len(prompt) >= engine.context:
                yield index, Reply("", unfit=True)
                continue
            params = SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_tokens,
                seed=one.seed % MAX_SEED,
            )
            waiting[index] = engine.request(prompt, params, f"problem {one.problem.id}")
        for index, found in self._drawn(waiting):
            text = self.tokenizer.decode(found.content, skip_specials=True)
            yield index, Reply(text, cut=found.finish_reason != "stop", tokens=len(found.tokens))

    def _drawn(self, waiting: dict[int, Request]) -> Iterator[tuple[int, Completion]]:
        """Runs requests together, and gives each as it ends; those left when nobody listens are dropped."""
        for request in waiting.values():
            self._engine.submit(request)
        try:
            while waiting:
                self._engine.step()
                for index in [i for i, request in waiting.items() if request.finish_reason is not None]:
                    yield index, waiting.pop(index).completion
        finally:
            for request in waiting.values():
                self._engine.abort(request)

    def continuations(
        self, texts: Sequence[str], sampling: Sequence[SamplingParams], stops: Sequence[Sequence[str]]
    ) -> list[str]:
        """What follows texts, up to the first stop string; control tokens in a text are what they look like."""
        engine, waiting, said = self._engine, dict[int, Request](), list[ReplyText]()
        found = [""] * len(texts)

        def listen(index: int, request: Request, token: int, _: float) -> None:
            if token not in request.stop_ids:
                found[index] += said[index].push(token)
            if said[index].stopped_by is not None:
                engine.abort(request)

        for index, (text, params, stop) in enumerate(zip(texts, sampling, stops, strict=True)):
            room = engine.context - params.max_tokens
            prompt = self.tokenizer.encode(text, specials=True)[-max(room, 1) :]
            said.append(ReplyText(self.tokenizer, prompt, stop))
            waiting[index] = engine.request(prompt, params, f"text {index + 1}", on_token=partial(listen, index))
        for index, _ in self._drawn(waiting):
            found[index] += said[index].finish()
        return found

    def likelihoods(self, asked: Sequence[Continuation], tell: Tell) -> list[Likelihood]:
        """As `Answerer` has it. One token after a context that others share costs nothing beside them."""
        prefix, most = prefix_token(self.tokenizer), self._model.config.max_positions
        pieces = [make_pieces(self.tokenizer, one, prefix, most) for one in asked]
        found: list[Likelihood | None] = [None] * len(asked)
        short = [i for i, one in enumerate(pieces) if one.single]
        self._weigh_next(pieces, short, found, tell)
        rest = [i for i, one in enumerate(found) if one is None]
        rows = [(i, row, start) for i in rest for row, start in pieces[i].rows]
        sums: dict[int, tuple[float, bool]] = dict.fromkeys(rest, (0.0, True))
        ends = {i: number for number, (i, _, _) in enumerate(rows)}
        scores = self._scorer.score([row for _, row, _ in rows])
        for number, ((i, _, start), (logprobs, best)) in enumerate(zip(rows, scores, strict=True)):
            total, greedy = sums[i]
            sums[i] = total + sum(one or 0.0 for one in logprobs[start:]), greedy and all(best[start:])
            if ends[i] == number:
                found[i] = Likelihood(*sums[i], pieces[i].cut)
                tell(1)
        return [one for one in found if one is not None]

    def _weigh_next(
        self, pieces: Sequence[Pieces], short: Sequence[int], found: list[Likelihood | None], tell: Tell
    ) -> None:
        """Those whose text is one token: one pass for each context."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i in short:
            row, _ = pieces[i].rows[0]
            by_context.setdefault(tuple(row[:-1]), []).append(i)
        candidates = [[pieces[i].rows[0][0][-1] for i in group] for group in by_context.values()]
        scores = self._scorer.score_next(list(by_context), candidates)
        for group, line in zip(by_context.values(), scores, strict=True):
            for i, (logprob, best) in zip(group, line, strict=True):
                found[i] = Likelihood(logprob, best, pieces[i].cut)
                tell(1)


def prefix_token(tokenizer: Tokenizer) -> int:
    """What stands before a text without context: the token that begins documents, else the one that ends them."""
    first = tokenizer.document_start_id
    return tokenizer.document_end_id if first is None else first


def fingerprint(model: Transformer, tokenizer: Tokenizer) -> str:
    """16 hexadecimal digits of a model's sizes, weights and tokenizer: two that differ in a bit have two."""
    digest = hashlib.sha256(f"{model.config}{tokenizer.fingerprint}".encode())
    for leaf in jax.tree.leaves(model):
        digest.update(np.asarray(_checksum(leaf)).tobytes())
    return digest.hexdigest()[:16]


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """Sums, modulo 2^32, of an array's words: plain, and each times an odd number that depends on its place."""
    size = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(array.dtype.itemsize)
    if size is None or jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise UserError(f"a weight of type {array.dtype} has no fingerprint; convert the model to float32 or bfloat16")
    words = jax.lax.bitcast_convert_type(array, size).astype(jnp.uint32).ravel()
    odd = jnp.arange(words.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B1) * 2 + 1
    return jnp.stack([words.sum(dtype=jnp.uint32), (words * odd).sum(dtype=jnp.uint32)])
