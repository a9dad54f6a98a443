"""Qwen3-235B-A22B, trained from nothing on 128 chips of v5p (v5p-256), 4,096 tokens on each.

    ./run.sh plan configs/qwen3_235b_a22b.py --topology v5p:4x4x8
    ./run.sh plan configs/qwen3_235b_a22b.py --topology tpu7x:4x4x4                              # tpu7x-128

By libtpu 0.0.52: on v5p-256 39.5 GiB per device at the peak, 28 % to 38 % MFU by the plan's model of the time; on
tpu7x-128 39.9 GiB and 19 % to 28 %.
"""

from configs.run import DataConfig, OptimizerConfig, Run
from model.sizes import named
from sharding.mesh import MeshConfig


def run() -> Run:
    """4,096 tokens on each device."""
    return Run(
        model=named("Qwen3-235B-A22B"),
        data=DataConfig(sources=("data/*.jsonl.zst",), tokenizer="tokenizer", sequence_length=4096, batch_size=128),
        optimizer=OptimizerConfig(learning_rate=0.0002, warmup_steps=2000),
        mesh=MeshConfig(fsdp=16, expert=8),
        remat="block",
        layers="stacked",
        steps=100_000,
    )
