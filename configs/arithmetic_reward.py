"""A reward model that tells right sums from wrong ones: Bradley-Terry on pairs, from configs/arithmetic.py's model.

Hardware: 2 CPU cores, about 2 minutes. Expected: of held-out pairs 94 % are told apart.

    ./run.sh train configs/arithmetic_reward.py --init-from runs/arithmetic --out runs/arithmetic-reward
"""

from dataclasses import replace

from configs import arithmetic
from configs.run import CheckpointConfig, OptimizerConfig, Run


def run() -> Run:
    """The chosen sum is right; half of the rejected ones are ten too many, as the model would have it."""
    base = arithmetic.run()
    return replace(
        base,
        objective="reward",
        data=replace(
            base.data,
            sources=(str(arithmetic.HERE / "demo_data" / "preferences_arithmetic.jsonl.gz"),),
            validation_fraction=0.1,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20, beta2=0.98, schedule="cosine"),
        checkpoint=CheckpointConfig(every=200),
        steps=800,
        validate_every=100,
        validation_batches=4,
    )
