"""MaxText's own ahead-of-time compilation of the same model for the same chips, read as `qmax plan` reads ours.

Its trainer compiles with the options that its documentation recommends for mixtures of experts: sorted tokens, its
grouped product (megablox), splash attention, full rematerialisation.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.peer_maxtext import find
from sharding.topology import SETTINGS, find_chip
from train.hlo import read_program

OPTIONS = {
    "per_device_batch_size": "1",
    "max_target_length": "4096",
    "dataset_type": "synthetic",
    "remat_policy": "full",
    "sparse_matmul": "True",
    "megablox": "True",
    "attention": "flash",
    "enable_checkpointing": "False",
    "skip_jax_distributed_system": "True",
    "run_name": "plan",
}


def measure(python: str, model: str, accelerator: str, topology: str, fsdp: int, expert: int) -> dict[str, Any]:
    """One compilation.

    Args:
        python: an interpreter that has MaxText. model, accelerator: as MaxText names them. topology: the same chips, as
            `qmax plan` names them.
    """
    base, _ = find(python)
    mesh = {"ici_fsdp_parallelism": fsdp, "ici_expert_parallelism": expert, "compile_topology_num_slices": 1}
    options = {"model_name": model, "compile_topology": accelerator, **mesh, **OPTIONS}
    with tempfile.TemporaryDirectory() as directory:
        command = [python, "-m", "maxtext.trainers.pre_train.train_compile", base]
        command += [f"{name}={value}" for name, value in {**options, "base_output_directory": directory}.items()]
        flags = f"--xla_dump_to={directory}/dump --xla_dump_hlo_as_text"
        environment = {**os.environ, **SETTINGS, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        environment["TPU_LIBRARY_PATH"] = compiler_path()
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        said = done.stdout + done.stderr
        memory = dict(re.findall(r"(argument|temp)_size_in_bytes=(\d+)", said.partition("Memory analysis")[2]))
        texts = sorted(Path(directory, "dump").glob("*jit_train_step*after_codegen.txt"))
        if done.returncode or not memory or not texts:
            return {"error": said.strip().splitlines()[-1:]}
        read = read_program(texts[-1].read_text(errors="replace"), {"fsdp": fsdp, "expert": expert})
    chip = find_chip(topology)
    return {
        "peak_bytes_per_device": sum(int(size) for size in memory.values()),
        "compile_seconds": seconds,
        "matrix_seconds": read.cycles / chip.clock,
        "unstated_seconds": read.unstated_bytes / chip.memory,
        "collective_bytes": bytes_by_kind(vars(one) for one in read.collectives),
    }


def bytes_by_kind(collectives: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """What is sent, by the kind of collective."""
    moved: dict[str, int] = {}
    for one in collectives:
        moved[one["kind"]] = moved.get(one["kind"], 0) + one["bytes"]
    return moved


def compiler_path() -> str:
    """The TPU compiler of this interpreter."""
    spec = find_spec("libtpu")
    assert spec is not None and spec.submodule_search_locations, "pip install 'qmax[plan]'"
    return str(Path(spec.submodule_search_locations[0]) / "libtpu.so")
