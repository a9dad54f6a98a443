"""Files of tensors as MODELs: compared with what the rules expect, then read one by one into their places."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from errors import UserError
from model.config import ModelConfig
from model.hf.rules import Get, Shapes
from model.tree import make_skeleton

SHOWN = 12
"""Tensors of each kind that a refusal names."""

Place = Callable[[str, np.ndarray], jax.Array]
"""Puts a weight, by our name, where it belongs."""

Shardings = Mapping[str, jax.sharding.Sharding]
"""Where each weight of the list form goes."""

Keep = Callable[[str, jax.Array], Any]
"""What is kept of a weight that is in its place: asked of one after the other, so that never all are there whole."""

Progress = Callable[[int], None]
"""Told the bytes that were read since it was last called."""


class Reading(Protocol):
    """A rule that is only ever read; see `model.hf.rules.Rule`."""

    @property
    def ours(self) -> tuple[str, ...]: ...
    def expected(self, shapes: Shapes) -> dict[str, tuple[int, ...]]: ...
    def read(self, get: Get, shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]: ...


class TensorFiles(ABC):
    """A MODEL whose tensors are read by rules."""

    path: Path
    config: ModelConfig

    @abstractmethod
    def rules(self, shapes: Shapes) -> Sequence[Reading]:
        """The rules that give our weights (of these shapes, list form).

        Raises:
            UserError: tensors that are missing, not used or of another shape, all of them together.
        """

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """A tensor by the name that the rules give it; a view of its file where it needs no arithmetic."""

    def weights(
        self, shardings: Shardings, dtype: Any, progress: Progress | None = None, keep: Keep | None = None
    ) -> dict[str, Any]:
        """As `model.load.Source.weights`; each is put in its place as soon as it is read, two at a time."""
        shapes = make_skeleton(self.config, stacked=False).shapes
        place = onto(shardings, dtype)

        def one(rule: Reading) -> dict[str, Any]:
            found = {}
            for name, view in rule.read(self.read, shapes):
                # Copies run behind; without waiting, many tensors would be on the host at once.
                array = jax.block_until_ready(place(name, view))
                found[name] = array if keep is None else jax.block_until_ready(keep(name, array))
                if progress is not None:
                    progress(view.nbytes)
            return found

        with ThreadPoolExecutor(2) as pool:
            return {name: array for found in pool.map(one, self.rules(shapes)) for name, array in found.items()}

    def streamed(self) -> Mapping[str, np.ndarray]:
        """All weights in list form; each is read when it is asked for, once, and not kept."""
        shapes = make_skeleton(self.config, stacked=False).shapes
        return _Streamed(self.read, self.rules(shapes), shapes)


class _Streamed(Mapping[str, np.ndarray]):
    def __init__(self, get: Get, rules: Sequence[Reading], shapes: Shapes):
        self.get_tensor, self.shapes = get, shapes
        self.rules = {name: rule for rule in rules for name in rule.ours}
        self.waiting: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.waiting:
            self.waiting |= dict(self.rules[name].read(self.get_tensor, self.shapes))
        return self.waiting.pop(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)


def expected_tensors(rules: Iterable[Reading], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The tensors of all rules for weights of these shapes, in their order, with the shapes that they must have."""
    return {name: shape for rule in rules for name, shape in rule.expected(shapes).items()}


def compare(
    expected: Shapes, found: Shapes, where: str, *, optional: Collection[str] = (), ignored: Collection[str] = ()
) -> None:
    """Compares the tensors of a file with those that its rules read.

    optional: expected ones that may be missing. ignored: found ones that need no reader.

    Raises:
        UserError: tensors that are missing, not used or of another shape, all of them together.
    """
    missing = [name for name in expected if name not in found and name not in optional]
    unused = sorted(found.keys() - expected.keys() - set(ignored))
    wrong = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    listed = (("missing", missing), ("not used", unused), ("of the wrong shape", wrong))
    if any(names for _, names in listed):
        parts = [f"{len(names)} {kind}: {_some(names)}" for kind, names in listed if names]
        raise UserError(f"the tensors of {where} are not those of its architecture and sizes; {'; '.join(parts)}")


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def onto(shardings: Shardings, dtype: Any) -> Place:
    """Puts weights under their shardings, as `dtype`; each device is given just its share."""

    def place(name: str, view: np.ndarray) -> jax.Array:
        sharding = shardings[name]
        if len(sharding.device_set) == 1:
            array = jax.device_put(view, sharding)
            # A view that lies well is shared, not copied, and the file may change under it.
            if array.dtype == dtype and array.unsafe_buffer_pointer() == view.ctypes.data:
                array = jnp.copy(array)
        else:
            array = jax.make_array_from_callback(view.shape, sharding, lambda index: np.ascontiguousarray(view[index]))
        return array if array.dtype == dtype else jnp.astype(array, dtype)

    return place
