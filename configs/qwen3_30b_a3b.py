"""Qwen3-30B-A3B, trained from nothing on 16 chips of v5p (v5p-32), 4,096 tokens on each.

    ./run.sh plan configs/qwen3_30b_a3b.py --topology v5p:2x2x4
    ./run.sh plan configs/qwen3_30b_a3b.py --topology v6e:8x8 --mesh.fsdp 16 --data.batch-size 64     # v6e-64

By libtpu 0.0.52: on v6e-64 11.7 GiB per device at the peak, 10 % to 15 % MFU by the plan's model of the time; on v5p-32
36.5 GiB and 20 % to 27 %.
"""

from configs.run import DataConfig, OptimizerConfig, Run
from model.sizes import named
from sharding.mesh import MeshConfig


def run() -> Run:
    """4,096 tokens on each chip."""
    return Run(
        model=named("Qwen3-30B-A3B"),
        data=DataConfig(sources=("data/*.jsonl.zst",), tokenizer="tokenizer", sequence_length=4096, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=0.0003, warmup_steps=2000),
        mesh=MeshConfig(fsdp=4, expert=4),
        remat="block",
        layers="stacked",
        steps=100_000,
    )
