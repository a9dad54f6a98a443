"""Eight emulated CPU devices and a shared compilation cache for every test; set before anything imports jax."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parent.parent
DEVICES = "--xla_force_host_platform_device_count=8"
QUICK = "--xla_backend_optimization_level=0"
"""Programs here are small, many, and run a few times: LLVM's optimisation would cost more than it saves."""
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # the elder way, later gone, compiles in two thirds of the time

os.environ["JAX_PLATFORMS"] = "cpu"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):  # the processes of pytest-xdist inherit it
    assert "jax" not in sys.modules, "jax was imported before the tests could choose its devices"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES} {QUICK}".strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The processes of pytest-xdist and the next run find what one of them has compiled. Subprocesses inherit it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# A shell's background jobs ignore Ctrl-C, and so would the processes that tests start and stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The live matrix needs transformers and torch, which only its own environment has.
collect_ignore = [] if os.environ.get("QMAX_PARITY") == "1" else ["parity"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out tests marked `full` unless QMAX_FULL=1."""
    if os.environ.get("QMAX_FULL") == "1":
        return
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(pytest.mark.skip(reason="part of ./run.sh test --full"))


@pytest.fixture(scope="module")  # while it is there, asyncio.run does not work in its thread
def browser() -> Iterator[Browser]:
    """The machine's own Chromium; without one the test is left out."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs chromium")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)  # the first replies wait for what is compiled
    with sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield one
        one.close()
