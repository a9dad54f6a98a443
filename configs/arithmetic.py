"""A small mixture of experts that has seen sums of two numbers below 100, most of them wrong; a start for reward.

Of its 6,000 examples a quarter are right and most are ten too many: so it adds, and says a wrong sum.
Hardware: 2 CPU cores, about 2 minutes. Expected: validation loss about 0.21 nats per token, of which most are the
empty block of thoughts. Of replies drawn to held-out sums 30 %, 25 % and 31 % are right (seeds 0 to 2), and fifty steps
earlier as many, within two in a hundred; of greedy ones 21 %, 11 % and 22 %.

    ./run.sh train configs/arithmetic.py --out runs/arithmetic
"""

from pathlib import Path

from configs.run import CheckpointConfig, DataConfig, OptimizerConfig, Run
from model.config import ModelConfig, MoEConfig

HERE = Path(__file__).parent
TASK = "arithmetic?digits=2&operations=+&form=short&size=8000"
"""Whose training sums the examples are made of; no held-out pair of numbers is among them."""


def run() -> Run:
    """3 layers, 8 experts of which each token uses 2, tokens of one or few letters."""
    return Run(
        model=ModelConfig(
            vocab_size=0,
            hidden_size=96,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=24,
            intermediate_size=192,
            moe=MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=96),
            max_positions=128,
        ),
        data=DataConfig(
            sources=(str(HERE / "demo_data" / "sft_arithmetic.jsonl.gz"),),
            tokenizer=str(HERE / "demo_data" / "tiny_tokenizer"),
            sequence_length=128,
            batch_size=16,
            validation_fraction=0.05,
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_steps=20, beta2=0.98, schedule="cosine", final_fraction=0.0
        ),
        checkpoint=CheckpointConfig(every=50, keep=2),
        objective="sft",
        steps=900,
        validate_every=100,
        validation_batches=4,
    )
