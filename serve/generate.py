"""Prompts in, replies out: prefill and decoding in waves of rows, with one compiled step for each.

The last token of every row stays on the device, which also knows when a row has ended; the host reads the outputs
of a step after it has dispatched the next one, so that the device never waits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from errors import UserError
from model.quantization import WeightType
from model.transformer import Transformer
from serve.sampling import SamplingParams, sampling_arrays
from serve.steps import Rows, State, decode, decode_weights, prefill, unpack
from sharding.mesh import BATCH_AXES

OnToken = Callable[[int, int, float], None]

SMALLEST_PROMPT = 16
SMALLEST_CAPACITY = 128
SMALLEST_STOPS = 4
"""Least prompt positions, cache positions and stop ids that a program is compiled for."""


class Vocabulary(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...


@dataclass
class Completion:
    """One reply.

    tokens: with the stop token that ended it, if one did. logprobs: of each token, under the model's own
    distribution. prompt_tokens: length of the prompt.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int

    @property
    def content(self) -> list[int]:
        """The tokens without the one that ended the reply."""
        return self.tokens[:-1] if self.finish_reason == "stop" else self.tokens


@dataclass
class Request:
    """A prompt with everything resolved, and what has come back so far."""

    index: int
    prompt: Sequence[int]
    sampling: SamplingParams
    stop_ids: tuple[int, ...]
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def take(self, token: int, logprob: float) -> None:
        """Adds a token, and notes the end if this is it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_tokens:
            self.finish_reason = "length"

    @property
    def completion(self) -> Completion:
        """The reply, once it has ended."""
        assert self.finish_reason is not None
        return Completion(self.tokens, self.logprobs, self.finish_reason, len(self.prompt))


def bucket(size: int, smallest: int, largest: int = 2**30, *, halves: bool = False) -> int:
    """`size` rounded up to `smallest` times a power of two (with `halves`: or 1.5 times one), at most `largest`."""
    rounded = smallest
    while rounded < size:
        if halves and rounded * 3 // 2 >= size:
            rounded = rounded * 3 // 2
            break
        rounded *= 2
    return max(size, min(rounded, largest))


class Generator:
    """Generates replies with a model.

    Args:
        model: its weights, as a list of layers or stacked; a stacked model is unstacked once, here.
        tokenizer: decides the default stop ids and how many of the embedding's rows are tokens.
        mesh: the devices to spread weights and rows over, if more than one.
        max_rows: rows decoded at the same time; further prompts wait for the next wave.
        deterministic: a reply has the same bits whatever is generated beside it. Every wave is then filled up to
            `max_rows`, and prompts share one only if they need the same sizes.
        weight_type: int8 to keep matrices in 8 bits, each output channel with its scale.

    Raises:
        UserError: the tokenizer does not fit the model, or `max_rows` is not positive.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Vocabulary,
        *,
        mesh: jax.sharding.Mesh | None = None,
        max_rows: int = 16,
        deterministic: bool = False,
        weight_type: WeightType = "same",
    ):
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
        if max_rows < 1:
            raise UserError(f"max_rows={max_rows} must be 1 or more")
        self.config, self.tokenizer, self.mesh = model.config, tokenizer, mesh
        self.max_rows, self.deterministic = max_rows, deterministic
        self.weight_type: WeightType = weight_type
        self._structure: Any = None
        self.update(model)
        limit = tokenizer.vocab_size

        def prefill_step(leaves: list[Array], *inputs: Any, capacity: int) -> tuple[State, Array]:
            model = jax.tree.unflatten(self._structure, leaves)
            return prefill(model, *inputs, capacity=capacity, vocab_limit=limit)

        def decode_step(leaves: list[Array], *inputs: Any) -> tuple[State, Array]:
            return decode(jax.tree.unflatten(self._structure, leaves), *inputs, vocab_limit=limit)

        self.prefill_step = jax.jit(prefill_step, static_argnames="capacity")
        self.decode_step = jax.jit(decode_step, donate_argnums=1)

    def update(self, model: Transformer) -> None:
        """Takes the weights of `model`, of the same sizes as before; nothing is compiled anew."""
        self.leaves, structure = jax.tree.flatten(decode_weights(model, self.mesh, self.weight_type))
        assert self._structure is None or self._structure == structure, "update() takes a model of the same sizes"
        self._structure = structure

    @property
    def model(self) -> Transformer:
        """The weights as decoding uses them; `leaves` are their arrays, which the compiled steps take."""
        return jax.tree.unflatten(self._structure, self.leaves)

    # ---- for callers ------------------------------------------------------
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        *,
        on_token: OnToken | None = None,
    ) -> list[Completion]:
        """Replies to all prompts, in their order.

        Args:
            prompts: token ids.
            sampling: one for all, or one for each. A seed is used as it stands: give several replies to one
                prompt their own (`SamplingParams.variants`).
            on_token: called with the prompt's index, the token and its log-probability as they come.

        Raises:
            UserError: a prompt is empty or longer than the model's positions, or holds an id that is no token.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompts):
            raise UserError(f"{len(prompts)} prompts came with {len(each)} sampling settings; give one, or one each")
        requests = [self._request(i, p, s) for i, (p, s) in enumerate(zip(prompts, each, strict=True))]
        for wave in self._waves(requests):
            for request, token, logprob in self._run(wave):
                if on_token is not None:
                    on_token(request.index, token, logprob)
        return [request.completion for request in requests]

    def stream(self, prompt: Sequence[int], sampling: SamplingParams) -> Iterator[tuple[int, float]]:
        """The tokens of one reply and their log-probabilities as they come; may be left at any time.

        Raises:
            UserError: as `generate` does, at once.
        """
        run = self._run([self._request(0, prompt, sampling)])
        return ((token, logprob) for _, token, logprob in run)

    # ---- waves ------------------------------------------------------------
    def _request(self, index: int, prompt: Sequence[int], sampling: SamplingParams) -> Request:
        vocab, positions = self.tokenizer.vocab_size, self.config.max_positions
        if not prompt:
            raise UserError(f"prompt {index + 1} is empty; give it at least one token")
        if len(prompt) >= positions:
            raise UserError(
                f"prompt {index + 1} has {len(prompt)} tokens, but the model has {positions} positions, "
                "of which the reply needs at least one; shorten the prompt"
            )
        wrong = next((token for token in prompt if not 0 <= token < vocab), None)
        if wrong is not None:
            raise UserError(f"prompt {index + 1} holds the id {wrong}, but tokens run from 0 to {vocab - 1}")
        if sampling.seed is None:
            sampling = sampling.variants(1)[0]
        stops = self.tokenizer.stop_ids if sampling.stop_ids is None else sampling.stop_ids
        return Request(index, prompt, sampling, stops, min(sampling.max_tokens, positions - len(prompt)))

    def _shape(self, requests: Sequence[Request]) -> tuple[int, int, int]:
        """Padded prompt length, cache positions and stop ids that these requests need together."""
        prompt = max(len(request.prompt) for request in requests)
        capacity = max(len(request.prompt) + request.max_tokens for request in requests)
        positions = self.config.max_positions
        return (
            bucket(prompt, SMALLEST_PROMPT, positions),
            bucket(capacity, SMALLEST_CAPACITY, positions, halves=True),
            bucket(max(len(request.stop_ids) for request in requests), SMALLEST_STOPS),
        )

    def _waves(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Requests in groups of at most `max_rows` that need much the same sizes, or exactly the same."""
        groups: defaultdict[tuple, list[Request]] = defaultdict(list)
        for request in requests:
            groups[self._shape([request]) if self.deterministic else ()].append(request)
        for group in groups.values():
            group.sort(key=lambda request: len(request.prompt) + request.max_tokens)
            for start in range(0, len(group), self.max_rows):
                yield group[start : start + self.max_rows]

    def _rows(self, count: int) -> int:
        """Rows that a wave of `count` requests is filled up to; they divide over the mesh."""
        rows = self.max_rows if self.deterministic else bucket(count, 1, self.max_rows)
        shards = 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        return -(-rows // shards) * shards

    def _run(self, wave: list[Request]) -> Iterator[tuple[Request, int, float]]:
        """Runs a wave to its end and gives every token as it is read."""
        length, capacity, stops = self._shape(wave)
        rows = self._rows(len(wave))
        tokens_BT = np.zeros((rows, length), np.int32)
        lengths_B, max_tokens_B = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        stop_BX = np.full((rows, stops), -1, np.int32)
        for row, request in enumerate(wave):
            tokens_BT[row, : len(request.prompt)] = request.prompt
            lengths_B[row], max_tokens_B[row] = len(request.prompt), request.max_tokens
            stop_BX[row, : len(request.stop_ids)] = request.stop_ids
        constants = Rows(
            sampling_arrays([r.sampling for r in wave], rows), jnp.asarray(stop_BX), jnp.asarray(max_tokens_B)
        )
        with self._on_mesh():
            constants = jax.device_put(constants, self._replicated())
            state, output = self.prefill_step(self.leaves, tokens_BT, lengths_B, constants, capacity=capacity)
        for dispatched in range(1, capacity + 1):
            following = None
            if any(r.finish_reason is None and r.max_tokens > dispatched for r in wave):
                with self._on_mesh():
                    state, following = self.decode_step(self.leaves, state, constants)
            tokens, logprobs = unpack(output)
            for request, token, logprob in zip(wave, tokens, logprobs, strict=False):
                if token >= 0:
                    request.take(token, logprob)
                    yield request, token, logprob
            if following is None or all(r.finish_reason for r in wave):
                return
            output = following

    def _on_mesh(self) -> Any:
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _replicated(self) -> Any:
        return None if self.mesh is None else jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
