"""The processes of a run over several hosts: how they find each other."""

from __future__ import annotations

import os
import re
import sys
import threading
import warnings
from dataclasses import dataclass
from typing import Any

from errors import UserError

JOIN_SECONDS = "QMAX_JOIN_SECONDS", 300.0
"""How long processes wait for each other at the start: environment variable, and seconds where it is not set."""
HEARTBEAT_SECONDS = "QMAX_HEARTBEAT_SECONDS", 60.0
"""How long a process may be silent before the others take it for lost: likewise."""
MARGIN_SECONDS = 30
"""jax's own limits come this much later: it can only abort, and we would rather end with a sentence."""

OPTIONS = ("--coordinator", "--processes", "--process")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


_STARTED = False


@dataclass(frozen=True)
class Hosts:
    """The processes of a run, and which of them this one is."""

    coordinator: str
    """`HOST:PORT` where process 0 can be reached; nothing else may listen there."""
    processes: int
    process: int


def find_hosts(asked: tuple[str | None, str | None, str | None] = (None, None, None)) -> Hosts | None:
    """What was asked for: by the options (see OPTIONS), else by the environment (see VARIABLES); None for neither.

    Raises:
        UserError: some are missing, or make no sense; the sentence names the option or variable.
    """
    if any(value is not None for value in asked):
        return _hosts(asked, OPTIONS)
    found = tuple(os.environ.get(name) or None for name in VARIABLES)
    # The address alone is for what jax finds by itself (Slurm, ...), where it stands in for the one found.
    return _hosts(found, VARIABLES) if found[1] or found[2] else None


def _hosts(values: tuple[str | None, ...], names: tuple[str, ...]) -> Hosts:
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
        given = next(name for name in names if name not in missing)
        raise UserError(f"{given} needs {' and '.join(missing)} too: a run of several processes names all three")
    address, processes, process = values
    assert address is not None
    _check_address(address, names[0])
    count, index = _number(processes, names[1], 1), _number(process, names[2], 0)
    if index >= count:
        raise UserError(f"{names[2]}={index} must be below {names[1]}={count}: processes are counted from 0")
    return Hosts(address, count, index)


def _check_address(address: str, name: str) -> None:
    match = re.fullmatch(r"([^:\s]+|\[[0-9a-fA-F:.]+\]):(\d{1,5})", address)
    if not match or not 1 <= int(match[2]) <= 65535:
        raise UserError(f"{name}={address!r} is not of the form HOST:PORT, such as 10.0.0.2:8476")


def _number(text: str | None, name: str, lowest: int) -> int:
    if not re.fullmatch(r"\d+", text or "") or int(text or "") < lowest:
        raise UserError(f"{name}={text!r} must be a whole number of at least {lowest}")
    return int(text or "")


def seconds(setting: tuple[str, float]) -> float:
    """A time that the environment may set. UserError: it is no number above zero."""
    name, default = setting
    text = os.environ.get(name)
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise UserError(f"{name}={text!r} must be a number of seconds above zero")
    return value


def detect_hosts(limit: float) -> Hosts | None:
    """What jax finds by itself: Cloud TPU VMs and GKE (several slices too), Slurm, Open MPI; None where it is alone.

    Args:
        limit: seconds that the coordinator's name may take to become known.
    """
    # jax tells this only while it joins, and then joins a single TPU VM to itself too.
    from jax._src.clusters import ClusterEnv

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in Kubernetes it asks for a package that TPU pods do not need
        kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
        found = next((kind for kind in kinds if kind.is_env_present()), None)
    if found is None or (count := found.get_process_count()) < 2:
        return None
    address = os.environ.get(VARIABLES[0])
    if not address:
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = found.get_coordinator_address(timeout_secs=int(limit), override_coordinator_port=port)
    return Hosts(address, count, found.get_process_id())


def join_hosts(asked: Hosts | None = None) -> None:
    """Joins the other processes of the run; does nothing where this process is alone, or has joined already.

    Call it before anything asks for devices.

    Args:
        asked: as `find_hosts` gives it; None leaves it to jax to find out.

    Raises:
        UserError: not all came within QMAX_JOIN_SECONDS.
    """
    import jax

    if jax.distributed.is_initialized():
        return
    limit, patience = seconds(JOIN_SECONDS), seconds(HEARTBEAT_SECONDS)
    try:
        hosts = asked or detect_hosts(limit)
    except (RuntimeError, OSError) as exc:  # a name that nobody knows, or no answer from the metadata server
        raise UserError(f"the hosts of this run did not find each other: {exc}") from exc
    if hosts is None or hosts.processes == 1:
        return
    # jax's service would take SIGTERM for itself from here on; train/signals.py listens when there is work to save.
    jax.config.update("jax_enable_preemption_service", False)
    _initialize(hosts, limit, patience)
    from sharding.peers import meet

    meet(hosts, patience)


def _initialize(hosts: Hosts, limit: float, patience: float) -> None:
    """jax.distributed.initialize in a thread of its own: past its limit it aborts, where we want a sentence."""
    import jax

    failure: list[BaseException] = []

    def initialize() -> None:
        times: dict[str, Any] = {
            "initialization_timeout": int(limit) + MARGIN_SECONDS,
            "heartbeat_timeout_seconds": int(patience) + MARGIN_SECONDS,
        }
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                jax.distributed.initialize(hosts.coordinator, hosts.processes, hosts.process, **times)
        except BaseException as exc:
            failure.append(exc)

    global _STARTED
    _STARTED = True
    thread = threading.Thread(target=initialize, name="join", daemon=True)
    thread.start()
    thread.join(limit)
    where = f"this is process {hosts.process} of {hosts.processes}, with the coordinator at {hosts.coordinator}"
    if thread.is_alive():
        raise UserError(
            f"not all {hosts.processes} processes of this run came within {limit:g} s: {where}; "
            f"start all of them, see that they reach that address, or raise {JOIN_SECONDS[0]}"
        )
    if failure:
        words = " ".join(str(failure[0]).split())[:200]
        raise UserError(f"the processes of this run could not join: {where}: {words}") from failure[0]


def leave(code: int) -> None:
    """Ends a process that failed among others: on the way out jax would wait for them. Does nothing where it is alone.

    What the others should know they were told by `peers.together`.
    """
    if _STARTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
