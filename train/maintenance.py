"""Google's notice that a machine is about to be taken away: heard a while before it is, and heeded like SIGTERM."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import UserError
from train.signals import StopRequest

VARIABLE = "QMAX_METADATA"
"""Environment variable that names another metadata server, or `off`."""
SERVER = "http://metadata.google.internal/computeMetadata/v1"
VENDOR = Path("/sys/class/dmi/id/sys_vendor")
POLL_SECONDS = 5.0
"""A spot machine is taken away 30 s after its notice."""
ANSWER_SECONDS = 3.0


def metadata_server() -> str | None:
    """Where to ask: what QMAX_METADATA names, else Google's server on a machine of Google; None elsewhere.

    Raises:
        UserError: QMAX_METADATA is no address.
    """
    named = os.environ.get(VARIABLE, "")
    if named == "off":
        return None
    if named:
        if not named.startswith(("http://", "https://")):
            raise UserError(f"{VARIABLE}={named!r} is no address such as {SERVER}; `off` asks nobody")
        return named.rstrip("/")
    try:
        return SERVER if VENDOR.read_text().startswith("Google") else None
    except OSError:
        return None


def notice(server: str) -> str:
    """What is about to happen to this machine, in words; empty when nothing is, or nobody answers.

    A migration (MIGRATE_ON_HOST_MAINTENANCE) is nothing: the machine goes on elsewhere by itself.
    """
    if ask(server, "preempted") == "TRUE":
        return "the preemption of this machine"
    event = ask(server, "maintenance-event")
    return f"a maintenance notice ({event})" if event.startswith("TERMINATE") else ""


def ask(server: str, name: str) -> str:
    """The server's answer about this machine; empty when there is none."""
    request = urllib.request.Request(f"{server}/instance/{name}", headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on the machine itself
    try:
        with direct.open(request, timeout=ANSWER_SECONDS) as answer:
            return answer.read(200).decode("ascii", "replace").strip()
    except (OSError, urllib.error.URLError, ValueError):
        return ""


@contextmanager
def heed_maintenance(stop: StopRequest, every: float = POLL_SECONDS) -> Iterator[None]:
    """While the block runs, asks the run to stop when the metadata server announces the machine's end."""
    server = metadata_server()
    if server is None:
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not (words := notice(server)):
            if ended.wait(every):
                return
        stop.ask(words)

    thread = threading.Thread(target=watch, name="maintenance", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(2 * ANSWER_SECONDS + 1)
