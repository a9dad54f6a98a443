"""The engine: many requests over one model, each step one compiled program.

A row's last token stays on the device, so the next step is sent before the host has read what the last one drew: the
device never waits. Requests come and go between steps; the scheduler says who takes which step.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from errors import UserError
from model.adapters import Adapter
from model.cache import KVType, page_size
from model.load import Unread
from model.quantization import WeightType
from model.transformer import Transformer
from serve.device import Device
from serve.drafts import DRAFTED, can_draft
from serve.kept import Kept
from serve.logits import first_tables
from serve.memory import Room
from serve.pages import PagePool, Snapshots
from serve.programs import Shape
from serve.recording import Reading, Recording, Sent
from serve.request import Completion, Place, Request
from serve.rows import Lines
from serve.sampling_params import MAX_STOP_IDS, SamplingParams
from serve.scheduler import Chunk, Limits, Scheduler
from serve.steps import NOBODY, unpack
from serve.weights import weight_bytes
from sharding.mesh import BATCH_AXES, platform

OnToken = Callable[[int, int, float], None]

CHUNKS = {"cpu": ((1, 64), (8, 64), (1, 512)), "other": ((1, 128), (8, 128), (1, 2048))}
"""(rows, tokens) of prompts that are read in one program, on each device along the batch."""

LEAST = {"slots": 1, "context": 2, "pages": 1, "guesses": 0, "snapshot_memory": 0}


class Vocabulary(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...


class Engine:
    """Generates replies with a model.

    Args:
        model: its weights, as a list of layers or stacked; a stacked model is unstacked once, here. Of one that is
            still to be read the first programs are made meanwhile.
        tokenizer: decides the default stop ids and how many of the embedding's rows are tokens.
        mesh: the devices to spread weights, slots and pages over, if more than one.
        slots: requests that run at the same time; further ones wait.
        context: most positions of a request; None: as many as the model has.
        pages: of keys and values, on all devices together; None: enough for all slots, or as many as fit.
        snapshot_memory: bytes, on all devices together, for what linear layers remember at the ends of prompts and now
            and then within them, so that prompts may share a beginning; None: for some of each slot, if they fit.
        deterministic: a reply has the same bits whatever is generated beside it: every step then has all slots, and
            prompts are read one at a time, in pieces that their own length decides.
        weight_type: int8 to keep matrices in 8 bits, each output channel with its scale.
        kv_type: int8 to keep keys and values in 8 bits, each token's heads with scales of their own.
        guesses: tokens that a step may guess, and keep where they come true, see `serve.speculation`: by the model's
            block for multi-token prediction, or else from the text, as always where the engine is deterministic.
            Requests with penalties or a constraint go without.
        adapters: adapters of low rank; a request names one by its number, counted from 1, see `request`.
        record_experts: replies tell which experts each token went to, see `Completion`.
        led: of several processes the others `device.follow()`: process 0 alone has requests. Otherwise all of them have
            the same ones, with seeds, and make the same steps of them.
        kept: compiled programs on the disk, to start sooner the next time.

    Raises:
        UserError: the tokenizer does not fit the model, or a size is out of range.
    """

    def __init__(
        self,
        model: Transformer | Unread,
        tokenizer: Vocabulary,
        *,
        mesh: jax.sharding.Mesh | None = None,
        slots: int = 16,
        context: int | None = None,
        pages: int | None = None,
        snapshot_memory: int | None = None,
        deterministic: bool = False,
        weight_type: WeightType = "same",
        kv_type: KVType = "same",
        guesses: int = 0,
        adapters: Sequence[Adapter] = (),
        record_experts: bool = False,
        led: bool = False,
        kept: Kept | None = None,
    ):
        self.config, self.tokenizer, self.mesh = model.config, tokenizer, mesh
        self._check(slots=slots, context=context, pages=pages, guesses=guesses, snapshot_memory=snapshot_memory)
        self.context = min(context or self.config.max_positions, self.config.max_positions)
        self.page = page_size(self.context)
        width = -(-self.context // self.page)
        shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        slots = -(-slots // shards) * shards
        self._drafts = guesses > 0 and can_draft(self.config) and not deterministic
        room = Room(self.config, jnp.dtype(model.dtype), self.page, kv_type, self._drafts)
        to_come = weight_bytes(self.config, room.dtype, weight_type) if isinstance(model, Unread) else 0
        self.pages, remembered = room.share(width, slots, shards, pages, snapshot_memory, to_come)
        every = -(-2048 // self.page) * self.page if room.snapshot_bytes else 0
        chunks = CHUNKS.get(platform(), CHUNKS["other"])
        self.limits = Limits(slots, shards, self.page, width, chunks, every, deterministic)
        self.device = Device(
            model,
            mesh,
            self.limits,
            self.pages,
            vocab_limit=tokenizer.vocab_size,
            snapshots=remembered,
            weight_type=weight_type,
            kv_type=kv_type,
            led=led,
            adapters=adapters,
            guesses=guesses,
            drafts=self._drafts,
            record_experts=record_experts,
            kept=kept,
        )
        recorded = record_experts and self.config.num_moe_layers
        self._recording = Recording(self.config, self.limits, self.pages) if recorded else None
        self.guesses, self.guesses_made, self.guesses_kept = guesses, 0, 0
        pools = [PagePool(self.pages // shards) for _ in range(shards)]
        self.scheduler = Scheduler(self.limits, pools, [Snapshots(remembered // shards) for _ in range(shards)])
        self.lines = Lines(self.limits)
        self._sent: deque[Sent] = deque()
        self._commands: deque[tuple[Request, bool]] = deque()
        self._stepping = threading.Lock()

    def _check(self, **sizes: int | None) -> None:
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens and the model {self.config.vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
        for name, value in sizes.items():
            if value is not None and value < LEAST[name]:
                raise UserError(f"{name}={value} must be {LEAST[name]} or more")

    # ---- weights and programs ---------------------------------------------
    def update(self, model: Transformer) -> None:
        """Takes the weights of `model`, of the same sizes as before; nothing is compiled anew."""
        self.device.update(model)
        self.forget()

    def forget(self) -> None:
        """Drops the beginnings of prompts that are kept for others."""
        self.scheduler.forget()

    @property
    def model(self) -> Transformer:
        """The weights as decoding uses them."""
        return self.device.with_leaves(self.device.leaves)

    def warm_up(self) -> None:
        """Makes every program; nothing is compiled after that."""
        self.device.warm_up()

    # ---- for callers ------------------------------------------------------
    def request(
        self, prompt: Sequence[int], sampling: SamplingParams, where: str = "the prompt", **more: Any
    ) -> Request:
        """A request with everything resolved; `submit` starts it. `more`: its further fields, such as `adapter`.

        Raises:
            UserError: the prompt is empty or too long, or an id is no token.
        """
        vocab, most = self.tokenizer.vocab_size, self.context
        if not prompt:
            raise UserError(f"{where} is empty; give it at least one token")
        if len(prompt) >= most:
            kind = "the model has" if most == self.config.max_positions else "a request may have"
            raise UserError(
                f"{where} has {len(prompt)} tokens, but {kind} {most} positions, "
                "of which the reply needs at least one; shorten the prompt"
            )
        wrong = next((token for token in prompt if not 0 <= token < vocab), None)
        if wrong is not None:
            raise UserError(f"{where} holds the id {wrong}, but tokens run from 0 to {vocab - 1}")
        wrong = next((token for token, _ in sampling.logit_bias if not 0 <= token < vocab), None)
        if wrong is not None:
            raise UserError(f"logit_bias names the id {wrong}, but tokens run from 0 to {vocab - 1}")
        if sampling.seed is None and sampling.temperature == 0:
            sampling = replace(sampling, seed=0)
        if sampling.seed is None:
            if self.device.many and not self.device.led:
                raise UserError("requests that several processes make need a seed, or these would draw different ones")
            sampling = sampling.variants(1)[0]
        stops = self.tokenizer.stop_ids if sampling.stop_ids is None else sampling.stop_ids
        wrong = next((token for token in stops if not 0 <= token < vocab), None)
        if wrong is not None:
            raise UserError(f"stop_ids names the id {wrong}, but tokens run from 0 to {vocab - 1}")
        room = min(most, self.pages // self.limits.shards * self.page) - len(prompt)
        if room < 1:
            raise UserError(f"{where} has {len(prompt)} tokens, and there are pages for {room + len(prompt)} only")
        return Request(prompt, sampling, stops[:MAX_STOP_IDS], min(sampling.max_tokens, room), **more)

    def submit(self, request: Request) -> None:
        """Queues a request, from any thread."""
        self._commands.append((request, True))

    def abort(self, request: Request) -> None:
        """Ends a request, from any thread; nothing happens if it has ended."""
        self._commands.append((request, False))

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

        def tell(index: int, _: Request, token: int, logprob: float) -> None:
            assert on_token is not None
            on_token(index, token, logprob)

        requests = [
            self.request(prompt, params, f"prompt {index + 1}", on_token=on_token and partial(tell, index))
            for index, (prompt, params) in enumerate(zip(prompts, each, strict=True))
        ]
        for _ in self._until_done(requests):
            pass
        return [request.completion for request in requests]

    def stream(self, prompt: Sequence[int], sampling: SamplingParams) -> Generator[tuple[int, float]]:
        """The tokens of one reply and their log-probabilities as they come; may be left at any time.

        Raises:
            UserError: as `generate` does, at once.
        """
        request = self.request(prompt, sampling, "prompt 1")

        def tokens() -> Generator[tuple[int, float]]:
            given = 0
            for _ in self._until_done([request]):
                while given < len(request.tokens):
                    yield request.tokens[given], request.logprobs[given]
                    given += 1

        return tokens()

    def _until_done(self, requests: Sequence[Request]) -> Iterator[None]:
        """Steps until these requests have ended; those that have not when it is left are aborted."""
        for request in requests:
            self.submit(request)
        try:
            while any(request.finish_reason is None for request in requests):
                self.step()
                yield
        finally:
            for request in requests:
                self.abort(request)
            with self._stepping:
                self._obey()

    # ---- a step -----------------------------------------------------------
    def step(self) -> bool:
        """Sends the next step to the device and reads the one before; False if there was nothing to do."""
        with self._stepping:
            self._obey()
            if self.guesses or any(request.constraint is not None for request in self.scheduler.running):
                while self._sent:  # what may come next, or is guessed to, depends on what has come
                    self._receive(self._sent.popleft())
            work = self.scheduler.next()
            before = len(self._sent)
            for chunk in work.chunks:
                self._begin_row(chunk)
            self._constrain([*work.rows, *(chunk.request for chunk in work.chunks if chunk.last)])
            if work.rows:
                self._sent.append(self._decode(work.rows))
            if work.chunks:
                self._sent.append(self._read_prompts(work.shape, work.chunks))
            sent = len(self._sent) - before
            for _ in range(before if sent else len(self._sent)):
                self._receive(self._sent.popleft())
            if not (sent or before):
                self.device.idle()
            return bool(sent or before or self.scheduler.busy)

    def _obey(self) -> None:
        """Takes what other threads have asked for."""
        while self._commands:
            request, new = self._commands.popleft()
            if new:
                self.scheduler.add(request)
            elif request.finish_reason is None:
                request.finish_reason = "abort"
                self.scheduler.remove(request)

    def _decode(self, requests: Sequence[Request]) -> Sent:
        """One more token of each of these rows."""
        found = [(request, request.place) for request in requests if request.place is not None]
        slots = [place.slot for _, place in found]
        most = np.bincount([slot // self.limits.slots_of_shard for slot in slots]).max() * self.limits.shards
        guesses = [self._guess(*one) for one in found]
        # What others guess must not decide which program a row goes through.
        guessed, shapes = any(guesses) or bool(self.guesses and self.limits.deterministic), self.device.programs.shapes
        shape = next(s for s in shapes if s.guessed == guessed and (guessed or not s.tokens) and s.rows >= most)
        for (_, place), guess in zip(found, guesses, strict=True):
            self.lines.put(place, length=place.length - 1, count=1 + len(guess), step=place.sampled - 1, keep=True)
        places, words = self.lines.words(slots, shape.rows, in_place=shape.rows == self.limits.slots)
        tokens_RT = np.zeros((shape.rows, shape.tokens), np.int32)
        for row, guess in zip(places, guesses, strict=True):
            tokens_RT[row, 1 : 1 + len(guess)] = guess
        output = self.device.step(shape, words, *([tokens_RT] if guessed else []))
        self.guesses_made += sum(map(len, guesses))
        rows = [(row, *one) for row, one in zip(places, found, strict=True)]
        reads = [(row, one, one.length - 1, 1 + len(guess)) for (row, _, one), guess in zip(rows, guesses, strict=True)]
        return self._send(output, rows, reads)

    def _guess(self, request: Request, place: Place) -> list[int]:
        """What may follow the row's last token, as far as it has room."""
        if not self.guesses or request.sampling.penalised or request.constraint is not None:
            return []
        room = min(request.max_tokens - place.sampled, len(place.pages) * self.page - place.length, self.guesses)
        drafted = self._drafts or room <= 0
        return [DRAFTED] * room if drafted else request.lookup.guess(request.known, room)

    def _read_prompts(self, size: tuple[int, int], chunks: Sequence[Chunk]) -> Sent:
        """Reads these pieces of prompts; of those that end one token is drawn."""
        shape, slots = Shape(*size), []
        tokens_RT = np.zeros(size, np.int32)
        for chunk in chunks:
            place = chunk.request.place
            assert place is not None
            slots.append(place.slot)
            count, step = chunk.end - chunk.start, place.sampled - chunk.last
            following = 0 if chunk.last else chunk.request.known[chunk.end]
            self.lines.put(place, length=chunk.start, count=count, step=step, keep=chunk.last, following=following)
        places, words = self.lines.words(slots, shape.rows, in_place=False)
        for row, chunk in zip(places, chunks, strict=True):
            tokens_RT[row, : chunk.end - chunk.start] = chunk.request.known[chunk.start : chunk.end]
        output = self.device.step(shape, words, tokens_RT)
        drawn, reads = [], []
        for row, chunk in zip(places, chunks, strict=True):
            place = chunk.request.place
            assert place is not None
            reads.append((row, place, chunk.start, chunk.end - chunk.start))
            if chunk.save is not None:
                self.device.save(place.slot, self._snapshot(place, chunk.save))
            if chunk.last:
                drawn.append((row, chunk.request, place))
        return self._send(output, drawn, reads)

    def _snapshot(self, place: Place, number: int) -> int:
        """The number of a snapshot among those of all devices."""
        shards = self.limits.shards
        return place.slot // self.limits.slots_of_shard * (self.device.store.count // shards) + number

    def _begin_row(self, chunk: Chunk) -> None:
        """Writes what a request asks for to its slot, if it has just got it, and what linear layers remembered."""
        request, place = chunk.request, chunk.request.place
        assert place is not None
        if chunk.load is not None:
            self.device.load(place.slot, self._snapshot(place, chunk.load))
        if not chunk.first:
            return
        self.lines.begin(request, place)
        if request.sampling.penalised or request.sampling.logit_bias:
            self.device.begin(place.slot, *first_tables(request, self.config.vocab_size))

    def _constrain(self, requests: Sequence[Request]) -> None:
        """Tells the device what these may draw next."""
        bound = [request for request in requests if request.constraint is not None]
        if not bound:
            return
        width = -(-self.config.vocab_size // 32)
        slots_S = np.full(self.limits.slots, NOBODY, np.int32)
        allowed_SW = np.zeros((self.limits.slots, width), np.uint32)
        for index, request in enumerate(bound):
            place, constraint = request.place, request.constraint
            assert place is not None and constraint is not None
            bits = constraint.allowed()
            self.lines.restricted_S[place.slot] = bits is not None
            if bits is not None:
                bits = bits[:width]  # a grammar may count more tokens than the embedding has rows
                slots_S[index], allowed_SW[index, : len(bits)] = place.slot, bits
        self.device.allow(slots_S, allowed_SW)

    def _send(self, output: Any, rows: list[tuple[int, Request, Place]], reads: Sequence[Reading]) -> Sent:
        jax.tree.map(lambda x: x.copy_to_host_async(), output)
        drawn, experts = output
        return Sent(drawn, experts, rows, self._recording.located(reads) if self._recording else [])

    def _receive(self, sent: Sent) -> None:
        """Reads what a step drew and gives it to those who still run where they did."""
        if self._recording:
            self._recording.write(sent)
        if not sent.rows:
            return
        drawn = unpack(sent.output)
        for row, request, place in sent.rows:
            if request.place is not place:  # it has ended, or will be read again
                continue
            self.guesses_kept += len(drawn[0][row]) - 1
            place.length += len(drawn[0][row]) - 1
            place.sampled += len(drawn[0][row]) - 1
            for token, logprob, top_tokens, top_logprobs in zip(*(part[row] for part in drawn), strict=False):
                if request.finish_reason is not None:
                    break
                self._take(request, token, logprob, top_tokens, top_logprobs)

    def _take(self, request: Request, token: int, logprob: float, top_tokens: Any, top_logprobs: Any) -> None:
        """One more token of a reply."""
        if count := request.sampling.top_logprobs:
            pairs = zip(top_tokens[:count].tolist(), top_logprobs[:count].tolist(), strict=True)
            request.top.append(list(pairs))
        request.take(token, logprob)
        if request.finish_reason is not None:
            if self._recording:
                request.experts = self._recording.of(request)
            self.scheduler.remove(request)
        if request.on_token is not None:
            request.on_token(request, token, logprob)
