"""Law: devices are emulated where and only where jax runs on a CPU, and the compilation cache never stops a run."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from errors import UserError
from sharding import runtime

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, **environment: str) -> str:
    """What a new Python prints; the variables given as "" are removed."""
    inherited = {key: value for key, value in os.environ.items() if environment.get(key) != ""}
    inherited |= {key: value for key, value in environment.items() if value}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=inherited, check=True
    )
    return done.stdout.strip()


COUNT = "from sharding.runtime import emulate_devices; emulate_devices({}); import jax; print(jax.device_count())"


@pytest.mark.parametrize(
    ("flags", "asked", "seen"),
    [
        ("", 4, 4),
        ("", 1, 1),
        ("--xla_force_host_platform_device_count=2", 3, 3),
        ("--xla_cpu_enable_fast_math=false", 2, 2),
    ],
)
def test_as_many_devices_as_asked(flags: str, asked: int, seen: int) -> None:
    assert python(COUNT.format(asked), XLA_FLAGS=flags, JAX_PLATFORMS="cpu") == str(seen)


def test_more_devices_than_asked_stay() -> None:
    assert python(COUNT.format(2), XLA_FLAGS="--xla_force_host_platform_device_count=5") == "5"


def test_too_late_is_a_sentence() -> None:
    assert jax.device_count() == 8
    runtime.emulate_devices(8)
    with pytest.raises(UserError, match="set XLA_FLAGS=--xla_force_host_platform_device_count=64"):
        runtime.emulate_devices(64)


def test_an_accelerator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    before = os.environ["XLA_FLAGS"]
    runtime.emulate_devices(64)
    assert os.environ["XLA_FLAGS"] == before


CACHE = """
from sharding.runtime import configure_jax
print(configure_jax())
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(int(jax.jit(lambda x: x + 1)(jnp.ones(()))))
"""


def test_programs_are_cached_at_home(tmp_path: Path) -> None:
    out = python(CACHE, HOME=str(tmp_path), XDG_CACHE_HOME="", JAX_COMPILATION_CACHE_DIR="")
    assert out.splitlines() == [str(tmp_path / ".cache" / "qmax" / "jax"), "2"]
    assert list((tmp_path / ".cache" / "qmax" / "jax").glob("*-cache"))


def test_the_users_place_is_taken(tmp_path: Path) -> None:
    out = python(CACHE, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert out.splitlines() == [str(tmp_path / "mine"), "2"]


def test_a_home_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file, not a folder")
    out = python(CACHE, HOME=str(tmp_path / "home"), XDG_CACHE_HOME="", JAX_COMPILATION_CACHE_DIR="")
    assert out.splitlines() == ["None", "2"]


FAULTS = """
import resource
from sharding.runtime import configure_jax
configure_jax(train=True)
import jax, jax.numpy as jnp
x = jnp.ones((4096, 8))
step = jax.jit(lambda x: jnp.sum(jnp.sin(x @ x.T) @ jnp.cos(x @ x.T)[:, :1]))
for _ in range(3):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of Linux's C library")
def test_a_step_keeps_its_memory() -> None:
    """A program with 64 MiB at least of its own does not ask the system for them again at every call."""
    pages = 64 * 2**20 // resource.getpagesize()
    assert int(python(FAULTS, JAX_PLATFORMS="cpu", XLA_FLAGS="")) < pages


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [("cpu", None, "float32"), ("gpu", "7.5", "float32"), ("gpu", "9.0", "bfloat16"), ("tpu", None, "bfloat16")],
)
def test_default_dtype(platform: str, capability: str | None, dtype: str) -> None:
    assert runtime.default_dtype(SimpleNamespace(platform=platform, compute_capability=capability)) == dtype


RESTART = """
import os, sys
from sharding.runtime import restart_with_huge_pages
print(os.getpid(), flush=True)
restart_with_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of Linux's C library")
def test_huge_pages_are_asked_for_once() -> None:
    """The process starts over with its id and arguments; what the user set stands; an accelerator needs none."""
    first, second, after = python(RESTART, GLIBC_TUNABLES="", JAX_PLATFORMS="cpu").splitlines()
    assert first == second
    assert after == f"{runtime.HUGE_PAGES} []"
    _, _, after = python(RESTART, GLIBC_TUNABLES="glibc.malloc.check=0", JAX_PLATFORMS="cpu").splitlines()
    assert after == f"glibc.malloc.check=0:{runtime.HUGE_PAGES} []"
    _, after = python(RESTART, GLIBC_TUNABLES="glibc.malloc.hugetlb=0", JAX_PLATFORMS="cpu").splitlines()
    assert after == "glibc.malloc.hugetlb=0 []"
    _, after = python(RESTART, GLIBC_TUNABLES="", JAX_PLATFORMS="tpu").splitlines()
    assert after == "None []"
