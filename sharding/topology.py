"""TPUs that are not here: devices as the TPU compiler describes them, and what their makers say they can do."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from errors import UserError, did_you_mean

GIB = 2**30

SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What the TPU library asks of a machine that has none; without them it complains, or waits for a server."""


@dataclass(frozen=True)
class Chip:
    """One device of a generation, as the compiler counts them (a tpu7x chip is two).

    flops: bfloat16 operations per second. memory: bytes per second. link: bytes per second and direction of one link to
    a neighbour. limit: bytes that a program may use. clock: cycles per second of the matrix core, for the compiler's
    estimates. watts: of one device under load, with its share of the host, as far as it is known. Rates are those of
    cloud.google.com/tpu/docs, links as jax-ml.github.io/scaling-book (chapter 2) gives them; limit and clock are the
    compiler's; no maker publishes watts: these are rough.
    """

    flops: float
    memory: float
    link: float
    limit: float
    clock: float
    watts: float
    per_chip: int = 1


CHIPS = {
    "v5e": Chip(197e12, 819e9, 45e9, 15.75 * GIB, 1.5e9, 220),
    "v5p": Chip(459e12, 2765e9, 90e9, 95.73 * GIB, 1.75e9, 540),
    "v6e": Chip(918e12, 1640e9, 90e9, 31.25 * GIB, 1.75e9, 380),
    "tpu7x": Chip(1153.5e12, 3690e9, 90e9, 94.74 * GIB, 1.9e9, 480, per_chip=2),
}

BETWEEN_SLICES = 6.25e9
"""Bytes per second and direction that a chip has to other slices: a host's 200 Gbit/s over its four chips."""


def find_chip(topology: str) -> Chip:
    """The chip of a topology such as `v5p:4x4x8`.

    Raises:
        UserError: it is not of this form, or the generation is not known.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+){1,2})", topology)
    if not match:
        raise UserError(f"--topology {topology!r} is not of the form GENERATION:SHAPE, such as v5p:4x4x8 or v6e:16x16")
    if match[1] not in CHIPS:
        raise UserError(f"{match[1]!r} is no TPU that is known{did_you_mean(match[1], CHIPS)} ({', '.join(CHIPS)})")
    return CHIPS[match[1]]


def absent_devices(topology: str, slices: int = 1) -> list[Any]:
    """Devices of a slice, or of several, that programs can be compiled for; a torus, as real slices are.

    Call it before jax has a TPU backend.

    Raises:
        UserError: the TPU library is not installed, or knows no such topology.
    """
    find_chip(topology)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    sizes = [int(size) for size in topology.partition(":")[2].split("x")]
    if min(sizes[:2]) < 2:  # less than a host
        more["chips_per_host_bounds"] = (*(min(2, size) for size in sizes[:2]), 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, wrap=(True,) * 3, **more)
    except Exception as exc:  # the library raises what it likes
        words = " ".join(str(exc).split())
        if "libtpu" in words or "not found" in words.lower():
            raise UserError(f"the TPU compiler is not installed; pip install 'qmax[plan]' ({words[:200]})") from exc
        raise UserError(f"--topology {topology}: the TPU compiler says: {words[:300]}") from exc
    return list(found.devices)
