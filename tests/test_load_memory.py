"""Law: loading holds the model once, and beside it at most three times the largest tensor of its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from model.config import ModelConfig, MoEConfig
from model.hf.writing import write_checkpoint
from model.tree import make_skeleton

MODEL = ModelConfig(
    vocab_size=8000,
    hidden_size=512,
    num_layers=16,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    moe=MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=512),
    layout="qwen3_moe",
)
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes glibc give memory back at once, so that what is counted is what is held."""
ALLOCATOR = 16 * 2**20
"""Small blocks that are kept even so."""

CHILD = """
import json, sys, threading, time
import jax
from model.load import open_model, read_model
from model.tree import make_skeleton
from sharding.mesh import MeshConfig, make_mesh

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

mesh = make_mesh(MeshConfig(), jax.devices()[:1])
source = open_model(sys.argv[1])
# Programs that change types stay in memory, whatever the size of what they work on.
for shape in set(make_skeleton(source.config, stacked=False).shapes.values()):
    jax.numpy.zeros(shape, sys.argv[3]).astype(sys.argv[2]).block_until_ready()
first = peak = anonymous()
done = threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = jax.block_until_ready(read_model(source, mesh, dtype=sys.argv[2]))
done.set()
thread.join()
print(json.dumps({"above": peak - first, "own": sum(leaf.nbytes for leaf in jax.tree.leaves(model))}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted by Linux")
@pytest.mark.parametrize(("stored", "loaded"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_nothing_is_held_twice(stored: str, loaded: str, tmp_path: Path) -> None:
    shapes = make_skeleton(MODEL, stacked=False).shapes
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    write_checkpoint(tmp_path / "model", MODEL, shapes, weights, {}, dtype=stored)
    environment = {**os.environ, **MAPPED, "XLA_FLAGS": "", "PYTHONPATH": os.getcwd()}
    words = [sys.executable, "-c", CHILD, str(tmp_path / "model"), loaded, stored]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    itemsize = {"float32": 4, "bfloat16": 2}[stored]
    limit = 3 * MODEL.vocab_size * MODEL.hidden_size * itemsize + ALLOCATOR
    assert MODEL.parameters_total * itemsize > 2 * limit, "the model is too small to tell"
    assert found["above"] - found["own"] <= limit
