"""What the engine has on devices, and the few things that it does there.

On several processes all of them do the same in the same order. Where they are `led`, process 0 alone knows the
requests, and tells the others before each operation which it is and what goes with it: the rows of a step, a few
kilobytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from model.adapters import Adapter, Adapters
from model.cache import KVType
from model.load import Unread
from model.quantization import WeightType
from model.transformer import Transformer
from serve.kept import Kept
from serve.programs import Program, Programs, Shape
from serve.prompts import embed, score
from serve.rows import WORDS
from serve.scheduler import Limits
from serve.snapshots import Store
from serve.speculation import verify
from serve.steps import NOBODY, abstract_state, allow, begin, empty_state, step
from serve.weights import abstract_weights, decode_weights
from sharding.rules import constrain

OPERATIONS = ("stop", "idle", "step", "begin", "allow", "load", "save", "score", "embed")

Arrays = Sequence[np.ndarray]
Weights = tuple[list[jax.Array], Adapters | None]


class Device:
    """Weights, pages, slots and compiled programs.

    Args:
        model: of one that is still to be read the first programs are made meanwhile.
        limits: the sizes that the scheduler works with. pages: of all devices together. vocab_limit: rows of the
            embedding that are tokens. snapshots: places for what linear layers remember, of all devices together.
        led: of several processes the others do what process 0 says; otherwise all have the same requests.
        adapters: each row may have one of them. guesses: tokens that a step may guess, see `serve.speculation`;
            drafts: the model's own block makes them, see `serve.drafts`.
        record_experts: steps give the experts that were chosen too. kept: compiled programs on the disk.
    """

    def __init__(
        self,
        model: Transformer | Unread,
        mesh: jax.sharding.Mesh | None,
        limits: Limits,
        pages: int,
        *,
        vocab_limit: int,
        snapshots: int,
        weight_type: WeightType,
        kv_type: KVType,
        led: bool,
        adapters: Sequence[Adapter] = (),
        guesses: int = 0,
        drafts: bool = False,
        record_experts: bool = False,
        kept: Kept | None = None,
    ):
        self.config, self.mesh, self.limits, self.pages = model.config, mesh, limits, pages
        self.weight_type: WeightType = weight_type
        self._kv_type: KVType = kv_type
        self._guesses, self._record, self._kept = guesses, record_experts, kept
        self._vocab_limit, self._dtype = vocab_limit, jnp.dtype(model.dtype)
        self.many = jax.process_count() > 1
        self.led = led and self.many
        self.adapters = self.on_mesh(lambda: Adapters.of(adapters, self._dtype))() if adapters else None
        self._abstract, self._structure = jax.tree.flatten(
            abstract_weights(self.config, self._dtype, mesh, weight_type)
        )
        self._drafts = guesses if drafts else 0
        sizes = limits.slots, pages, limits.page, self._dtype
        empty = partial(empty_state, self.config, *sizes, kv_type, self._drafts)
        self.state = self.on_mesh(jax.jit(empty))()
        self.store = Store(self.config, self._dtype, snapshots, self.on_mesh)
        self._begin, self._allow = (self.on_mesh(jax.jit(f, donate_argnums=0)) for f in (begin, allow))
        self._read = {"score": self._reading(score), "embed": self._reading(embed)}
        # All processes have to do the same in the same order, whichever thread asks for it.
        self._order: Any = threading.Lock() if self.led else nullcontext()
        self.programs = Programs(self._compile, self._shapes())
        if isinstance(model, Unread):
            self.programs.prepare(self.programs.shapes[:2])
            model = model.read()
        self.update(model)

    # ---- weights and programs ---------------------------------------------
    def update(self, model: Transformer) -> None:
        """Takes the weights of `model`, of the same sizes as before, on every process; nothing is compiled anew."""
        self.leaves, structure = jax.tree.flatten(decode_weights(model, self.mesh, self.weight_type))
        assert structure == self._structure, "update() takes a model of the same sizes"

    @property
    def weights(self) -> Weights:
        """What the compiled functions take."""
        return self.leaves, self.adapters

    def with_leaves(self, leaves: Sequence[jax.Array]) -> Transformer:
        """The model with these arrays, such as those that a compiled function is given."""
        return jax.tree.unflatten(self._structure, leaves)

    def _shapes(self) -> list[Shape]:
        """The shapes that steps have; a request alone needs the first two."""
        limits = self.limits
        own, shards = limits.slots_of_shard, limits.shards
        rows = [own] if limits.deterministic else [*[n for n in (1, 4, 16, 64, 256) if n < own], own]
        chunks = [(n, tokens) for n, tokens in limits.chunks if n == 1 or not limits.deterministic]
        decode, read = ([Shape(n * shards) for n in rows], [Shape(n * shards, tokens) for n, tokens in chunks])
        guessed = [Shape(n * shards, 1 + self._guesses, guessed=True) for n in rows] if self._guesses else []
        return [read[0], decode[0], *guessed[:1], *decode[1:], *guessed[1:], *read[1:]]

    def _compile(self, shape: Shape) -> Program:
        """The step for one shape."""
        limits = self.limits

        def engine_step(weights: Weights, *args: Any) -> Any:
            sizes = {"page": limits.page, "shards": limits.shards, "vocab_limit": self._vocab_limit}
            function = verify if shape.guessed else step
            return function(self.with_leaves(weights[0]), *args, **sizes, adapters=weights[1], record=self._record)

        state = abstract_state(
            self.config, limits.slots, self.pages, limits.page, self._dtype, self.mesh, self._kv_type, self._drafts
        )
        args = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._replicated())
            for x in self._blank("step", self.programs.shapes.index(shape))
        ]
        given = (self._abstract, self.adapters), state, *args

        def make(ending: str = "") -> Any:
            engine_step.__name__ += ending
            with self.mesh_context():
                return jax.jit(engine_step, donate_argnums=1).lower(*given).compile()

        if self._kept is None or self.many:
            return make()
        described = jax.tree.map(lambda x: (x.shape, str(x.dtype), str(x.sharding)), given)
        fixed = self._structure, self._vocab_limit, self._record
        devices = jax.local_devices()[:1] if self.mesh is None else list(self.mesh.devices.flat)
        return self._kept.get((self.config, limits, shape, *map(str, fixed), str(described)), devices, make)

    def _reading(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """One of the functions of `serve.prompts`, compiled for each length."""

        def read(weights: Weights, tokens_T: jax.Array, count: jax.Array, adapter: jax.Array) -> Any:
            model, rows = self.with_leaves(weights[0]), self.limits.shards
            if weights[1] is not None:
                model = weights[1].on(model, jnp.broadcast_to(adapter, rows))
            found = function(model, tokens_T, count, rows)
            return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), found)

        return self.on_mesh(jax.jit(read))

    def warm_up(self) -> None:
        """Makes every program of generation; nothing is compiled for that any more."""
        for made in self.programs.prepare():
            made.result()
        for name in ("begin", "allow", *(("save", "load") if self.store.count else ())):
            self._do(name, 0, self._blank(name, 0))

    def mesh_context(self) -> Any:
        """The mesh in force."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def on_mesh(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, called on this mesh."""

        def call(*args: Any) -> Any:
            with self.mesh_context():
                return function(*args)

        return call

    def _replicated(self) -> Any:
        return None if self.mesh is None else jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())

    # ---- operations -------------------------------------------------------
    def step(self, shape: Shape, *arrays: np.ndarray) -> tuple[jax.Array, jax.Array | None]:
        """Rows take a step: their words and, where prompts are read, their tokens.

        Gives what was drawn and, where they are recorded, the experts of what was read.
        """
        return self._all_do("step", self.programs.shapes.index(shape), arrays)

    def begin(self, slot: int, seen_V: np.ndarray, bias_V: np.ndarray) -> None:
        """Writes what a request asks of the tables to its slot."""
        self._all_do("begin", 0, (np.asarray([slot], np.int32), seen_V, bias_V))

    def allow(self, slots_S: np.ndarray, allowed_SW: np.ndarray) -> None:
        """Writes the tokens that these slots may draw next."""
        self._all_do("allow", 0, (slots_S, allowed_SW))

    def load(self, slot: int, place: int) -> None:
        """Puts a snapshot into a slot."""
        self._all_do("load", 0, (np.asarray([slot, place], np.int32),))

    def save(self, slot: int, place: int) -> None:
        """Keeps a snapshot of a slot."""
        self._all_do("save", 0, (np.asarray([slot, place], np.int32),))

    def read(self, name: str, tokens_T: np.ndarray, count: int, adapter: int = 0) -> Any:
        """What one of the functions of `serve.prompts` gives for a text of `count` tokens; from any thread."""
        words = np.asarray([count], np.int32), np.asarray([adapter], np.int32)
        return self._all_do(name, len(tokens_T), (tokens_T, *words))

    def idle(self) -> None:
        """Lets those who are led know that somebody is there."""
        if self.led:
            self._all_do("idle", 0, ())

    def stop(self) -> None:
        """Lets those who are led go."""
        if self.led:
            self._all_do("stop", 0, ())

    def follow(self) -> None:
        """Does what process 0 says until it says that it is over."""
        assert self.led and jax.process_index() > 0, "process 0 leads"
        while True:
            number, size = multihost_utils.broadcast_one_to_all(np.zeros(2, np.int32)).tolist()
            name = OPERATIONS[number]
            if name == "stop":
                return
            blank = self._blank(name, size)
            arrays = [np.asarray(x) for x in multihost_utils.broadcast_one_to_all(tuple(blank))] if blank else []
            self._do(name, size, arrays)

    def _all_do(self, name: str, size: int, arrays: Arrays) -> Any:
        with self._order:
            if self.led:
                multihost_utils.broadcast_one_to_all(np.asarray([OPERATIONS.index(name), size], np.int32))
                if arrays:
                    multihost_utils.broadcast_one_to_all(tuple(arrays))
            return self._do(name, size, arrays)

    def _blank(self, name: str, size: int) -> list[np.ndarray]:
        """Arrays of the shapes and types that go with an operation; `size`: a shape's number, or a text's length."""
        slots, vocab = self.limits.slots, self.config.vocab_size
        if name == "step":
            shape = self.programs.shapes[size]
            words = np.zeros((shape.rows, WORDS + self.limits.width), np.int32)
            return [words, np.zeros((shape.rows, shape.tokens), np.int32)] if shape.tokens else [words]
        if name == "begin":
            return [np.zeros(1, np.int32), np.zeros(vocab, np.int32), np.zeros(vocab, np.float32)]
        if name == "allow":
            return [np.full(slots, NOBODY, np.int32), np.zeros((slots, -(-vocab // 32)), np.uint32)]
        if name in self._read:
            return [np.zeros(size, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32)]
        return [np.zeros(2, np.int32)] if name in ("load", "save") else []

    def _do(self, name: str, size: int, arrays: Arrays) -> Any:
        given = [self._everywhere(x) for x in arrays]
        if name == "step":
            self.state, output = self.programs[self.programs.shapes[size]](self.weights, self.state, *given)
            return output
        if name in self._read:
            return self._read[name](self.weights, *given)
        if name == "begin":
            self.state = self._begin(self.state, *given)
        elif name == "allow":
            self.state = self._allow(self.state, *given)
        elif name == "load":
            self.state = self.store.load(self.state, *arrays[0].tolist())
        elif name == "save":
            self.store.save(self.state, *arrays[0].tolist())
        return None

    def _everywhere(self, x: np.ndarray) -> Any:
        """The same array on the devices of all processes."""
        if not self.many:
            return x
        return jax.make_array_from_callback(x.shape, self._replicated(), lambda index: x[index])
