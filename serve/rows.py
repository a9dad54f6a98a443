"""What a step is told of each row: one line of 32-bit words, so that one small array goes to the device in a step.

Everything that a request may ask for is in it as data: no choice of it compiles anything anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt32

from serve.request import Place, Request
from serve.sampling import LARGEST_TOP_K, SamplingArrays
from serve.sampling_params import MAX_STOP_IDS
from serve.scheduler import Limits

ROW = np.dtype(
    [
        ("slot", "i4"),  # among those of all devices
        ("length", "i4"),  # positions filled before this step
        ("count", "i4"),  # tokens that this step reads; 0: nobody is in this row
        ("keep", "i4"),  # 1: what is sampled is the row's next token; 0: there is more of its prompt to come
        ("step", "i4"),  # tokens generated so far
        ("min_tokens", "i4"),
        ("top_logprobs", "i4"),
        ("special", "i4"),  # which of the tables below concern it
        ("following", "i4"),  # the token after those that this step reads, where there is more of the prompt to come
        ("room", "i4"),  # positions that the row has pages for
        ("adapter", "i4"),  # which of the model's adapters it has; 0: none
        ("top_k", "i4"),
        ("temperature", "f4"),
        ("top_p", "f4"),
        ("min_p", "f4"),
        ("presence", "f4"),
        ("frequency", "f4"),
        ("repetition", "f4"),
        ("seed", "u4", (2,)),
        ("stop", "i4", (MAX_STOP_IDS,)),
    ]
)
"""The words of a row; the numbers of its pages follow them."""

WORDS = ROW.itemsize // 4

BIAS, ALLOWED = 1, 2
"""Bits of `special`: the row has a bias, or tokens that alone are allowed."""


def fill(row: Any, request: Request) -> None:
    """Writes what stays the same of a request to its line."""
    params = request.sampling
    assert params.seed is not None, "seeds are drawn before"
    row["min_tokens"], row["top_logprobs"] = min(params.min_tokens, request.max_tokens), params.top_logprobs
    row["top_k"], row["special"] = min(params.top_k, LARGEST_TOP_K), BIAS if params.logit_bias else 0
    row["temperature"], row["top_p"], row["min_p"] = params.temperature, params.top_p, params.min_p
    row["adapter"] = request.adapter
    row["presence"], row["frequency"] = params.presence_penalty, params.frequency_penalty
    row["repetition"] = params.repetition_penalty
    row["seed"] = params.seed >> 32, params.seed & 0xFFFFFFFF
    row["stop"] = -1
    row["stop"][: len(request.stop_ids)] = request.stop_ids


class Lines:
    """What the host knows of each slot, as a step is told it.

    restricted_S: whether a slot's request may draw some tokens only.
    """

    def __init__(self, limits: Limits):
        self._limits = limits
        self._lines_S = np.zeros(limits.slots, ROW)
        self._tables_SX = np.zeros((limits.slots, limits.width), np.int32)
        self.restricted_S = np.zeros(limits.slots, bool)

    def begin(self, request: Request, place: Place) -> None:
        """A request has a slot."""
        fill(self._lines_S[place.slot], request)
        self.restricted_S[place.slot] = False

    def put(self, place: Place, *, length: int, count: int, step: int, keep: bool, following: int = 0) -> None:
        """What the next step does with a slot."""
        line = self._lines_S[place.slot]
        line["slot"], line["length"], line["count"], line["step"], line["keep"] = place.slot, length, count, step, keep
        line["following"], line["room"] = following, len(place.pages) * self._limits.page
        self._tables_SX[place.slot, : len(place.pages)] = place.pages

    def words(self, slots: Sequence[int], rows: int, *, in_place: bool) -> tuple[list[int], np.ndarray]:
        """The row of each of these slots in a program with `rows` rows, and the words of all rows.

        In place, row r has slot r; otherwise each device has its own slots' rows one after the other.
        """
        limits, taken = self._limits, [0] * self._limits.shards
        found = list(slots)
        for index, slot in enumerate(() if in_place else slots):
            shard = slot // limits.slots_of_shard
            found[index] = shard * (rows // limits.shards) + taken[shard]
            taken[shard] += 1
        special = self._lines_S["special"] & ~ALLOWED
        self._lines_S["special"] = np.where(self.restricted_S, special | ALLOWED, special)
        words_RW = np.zeros((rows, WORDS + limits.width), np.int32)
        words_RW[found, :WORDS] = self._lines_S[list(slots)].view(np.int32).reshape(len(slots), WORDS)
        words_RW[found, WORDS:] = self._tables_SX[list(slots)]
        return found, words_RW


@struct.dataclass
class Rows:
    """`ROW` of R rows on the device, and their tables of pages."""

    slot_R: Int[Array, " R"]
    length_R: Int[Array, " R"]
    count_R: Int[Array, " R"]
    keep_R: Int[Array, " R"]
    step_R: Int[Array, " R"]
    min_tokens_R: Int[Array, " R"]
    top_logprobs_R: Int[Array, " R"]
    special_R: Int[Array, " R"]
    following_R: Int[Array, " R"]
    room_R: Int[Array, " R"]
    adapter_R: Int[Array, " R"]
    presence_R: Float[Array, " R"]
    frequency_R: Float[Array, " R"]
    repetition_R: Float[Array, " R"]
    stop_RX: Int[Array, "R X"]
    sampling: SamplingArrays
    table_RX: Int[Array, "R X"]


def unpack_rows(words_RW: Int[Array, "R W"]) -> Rows:
    """The fields of rows; a row of zeros is nobody's and harmless."""
    fields: dict[str, Any] = {}
    assert ROW.fields is not None
    for name, (kind, offset, *_) in ROW.fields.items():
        width = kind.itemsize // 4
        words = words_RW[:, offset // 4 : offset // 4 + width]
        words = words if kind.shape else words[:, 0]
        fields[name] = jax.lax.bitcast_convert_type(words, jnp.dtype(kind.base))
    seed_R2: UInt32[Array, "R 2"] = fields.pop("seed")
    temperature_R, top_k_R, top_p_R, min_p_R = (fields.pop(n) for n in ("temperature", "top_k", "top_p", "min_p"))
    sampling = SamplingArrays(temperature_R, top_k_R, top_p_R, min_p_R, seed_R2)
    stop_RX = fields.pop("stop")
    named = {f"{name}_R": value for name, value in fields.items()}
    return Rows(**named, stop_RX=stop_RX, sampling=sampling, table_RX=words_RW[:, WORDS:])
