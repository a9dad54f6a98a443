"""Law: a process killed at any moment leaves a good checkpoint; two processes write one that any number reads."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import abstract, make_state

from model.checkpoint.checkpoints import Checkpoints, leaf_hashes

ROOT = Path(__file__).parents[1]

KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_checkpoint import make_state
from model.checkpoint.checkpoints import Checkpoints
checkpoints = Checkpoints({directory!r}, keep=2)
step = checkpoints.latest_good(lambda sentence: sys.exit("damaged: " + sentence)) or 0
while True:
    step += 1
    checkpoints.save(step, make_state(step, size=192), meta={{}}, validation_loss=float(step % 5))
    print(step, flush=True)
"""


def test_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    code = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), directory=str(directory))
    moments = random.Random(11)
    torn = reached = 0
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for _ in range(3):
                child.stdout.readline()
            time.sleep(moments.uniform(0.0, 0.3))
            child.send_signal(signal.SIGKILL)
            said = child.stdout.read().split()
        torn += any(path.name.startswith(".tmp-") for path in directory.iterdir())
        checkpoints = Checkpoints(directory, keep=2)
        step = checkpoints.latest_good(pytest.fail)
        assert step is not None
        assert step > reached, "each life goes on from the one before"
        assert not said or step >= int(said[-1]) - 1, "only the save under way may be lost"
        state = make_state(step, size=192)
        assert leaf_hashes(checkpoints.restore(step, abstract(state))) == leaf_hashes(state)
        reached = step
    assert torn, "no kill fell into a save: the test shows nothing"


TWO = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize({address!r}, 2, int(sys.argv[1]))
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from model.checkpoint.checkpoints import CheckpointError, Checkpoints
mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
rows, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
def make(step):
    value = np.arange(64 * 8, dtype=np.float32).reshape(64, 8) + step
    return {{"w": jax.make_array_from_callback(value.shape, rows, lambda i: value[i]),
             "n": jax.make_array_from_callback((3,), whole, lambda i: value[0, :3][i])}}
box = Checkpoints({directory!r}, keep=1)
for step in (1, 2, 3):
    box.save(step, make(step), meta={{}})
box.wait()
assert box.steps() == [3], box.steps()
assert box.latest_good() == 3
template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(3))
restored = box.restore(3, template)
for name, leaf in make(3).items():
    for mine, theirs in zip(leaf.addressable_shards, restored[name].addressable_shards):
        assert np.array_equal(mine.data, theirs.data)
print("done")
"""


def test_two_processes_write_one_checkpoint(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    directory = tmp_path / "checkpoints"
    code = TWO.format(root=str(ROOT), tests=str(ROOT / "tests"), directory=str(directory), address=address)
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    for child in children:
        out, err = child.communicate(timeout=60)
        assert out.endswith("done\n"), err[-2000:]
    # A run of two processes goes on in one.
    template = {"w": jax.ShapeDtypeStruct((64, 8), jnp.float32), "n": jax.ShapeDtypeStruct((3,), jnp.float32)}
    restored = Checkpoints(directory, keep=1).restore(3, template)
    assert np.array_equal(restored["w"], np.arange(512, dtype=np.float32).reshape(64, 8) + 3)
