"""Where a served model lies: options for devices and processes, and how these come together."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sharding.hosts import OPTIONS, Hosts, join_hosts
from sharding.mesh import MeshConfig
from sharding.peers import check_alike, peers, together
from sharding.runtime import configure_jax, emulate_devices

AXES = {
    "data": "parts that the slots are cut into, each with all weights",
    "expert": "parts that experts, and the slots, are cut into",
    "tensor": "parts that heads, feed-forward width and vocabulary are cut into",
}


@dataclass(frozen=True)
class Placement:
    """mesh: the devices to use. many: processes. leads: whether this one has the requests. hint: to be shown."""

    mesh: MeshConfig
    many: bool
    leads: bool
    hint: str


def add_placement(parser: argparse.ArgumentParser) -> None:
    """The options."""
    for axis, words in AXES.items():
        help_ = f"{words} (default: %(default)s)"
        parser.add_argument(f"--mesh.{axis}", type=int, default=1, metavar="N", help=help_)
    many = parser.add_argument_group(
        "several processes",
        "Each runs the same command; process 0 listens. On Cloud TPU VMs and GKE they find each other by themselves.",
    )
    for option, metavar, words in zip(
        OPTIONS,
        ("HOST:PORT", "N", "I"),
        ("where process 0 can be reached by the others", "how many there are", "which one this is, from 0"),
        strict=True,
    ):
        many.add_argument(option, metavar=metavar, help=words)


@contextmanager
def placed(args: argparse.Namespace, hosts: Hosts | None) -> Iterator[Placement]:
    """The placement that the options ask for, with the other processes joined; these end when one fails.

    Args:
        hosts: as `find_hosts` gives it.

    Raises:
        UserError: the options make no sense, the processes did not find each other, or were started differently.
    """
    given, own = vars(args), {option.removeprefix("--") for option in OPTIONS}
    mesh = MeshConfig(**{axis: given[f"mesh.{axis}"] for axis in AXES})
    emulate_devices(-(-mesh.num_devices // (hosts.processes if hosts else 1)))
    configure_jax()
    join_hosts(hosts)
    with together():
        here = peers()
        if here is not None:
            check_alike({name: str(value) for name, value in given.items() if name not in own})
        import jax

        idle = jax.device_count() - mesh.num_devices
        hint = f"; {idle} more devices are here, --mesh.tensor uses them" if idle > 0 else ""
        yield Placement(mesh, here is not None, here is None or here.index == 0, hint)
