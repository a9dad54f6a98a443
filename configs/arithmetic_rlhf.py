"""Reward from a model that learnt what people prefer: GSPO with the reward model of configs/arithmetic_reward.py.

Nothing tells it whether a sum is right but that model; the task grades held-out sums only, to show what it is worth.
Hardware: 2 CPU cores, about 3 minutes. Expected: rewards rise, and with them the share of held-out sums that are right.

    ./run.sh train configs/arithmetic_rlhf.py --init-from runs/arithmetic --out runs/arithmetic-rlhf
"""

from dataclasses import replace

from configs import arithmetic_gspo
from configs.run import Run


def run() -> Run:
    """As configs/arithmetic_gspo.py, with another reward."""
    base = arithmetic_gspo.run()
    assert base.rl is not None
    return replace(base, rl=replace(base.rl, rewards=("model:runs/arithmetic-reward",)))
