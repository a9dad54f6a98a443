"""Reward puts right what a model has learnt wrong: GSPO (arXiv 2507.18071) on the model of configs/arithmetic.py.

Hardware: 2 CPU cores, about 4 minutes. Expected, of 256 held-out sums, for seeds 0 to 2 of both configs: 21 %, 11 % and
22 % right before, 99 %, 91 % and 95 % after; sampler and trainer at most 5.2e-5 apart in a token's log-probability.

    ./run.sh train configs/arithmetic_gspo.py --init-from runs/arithmetic --out runs/arithmetic-gspo
"""

from dataclasses import replace

from configs import arithmetic
from configs.alignment import RLConfig
from configs.run import CheckpointConfig, OptimizerConfig, Run


def run() -> Run:
    """32 sums a step, 8 replies to each."""
    base = arithmetic.run()
    return replace(
        base,
        objective="rl",
        data=replace(base.data, sources=()),
        rl=RLConfig(
            tasks=(arithmetic.TASK,),
            prompts=32,
            samples=8,
            max_new_tokens=6,
            ratio="sequence",
            mean="sequence",
            clip_low=3e-4,
            clip_high=4e-4,
            slots=256,
            validation_problems=256,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5, beta2=0.98, schedule="cosine", weight_decay=0.0),
        checkpoint=CheckpointConfig(every=20),
        steps=200,
        validate_every=10,
    )
