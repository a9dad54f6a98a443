"""Reward from a model that learnt what people prefer: GSPO with the reward model of configs/arithmetic_reward.py.

Nothing tells it whether a sum is right but that model; the task grades held-out sums only, to show what it is worth.
Hardware: 2 CPU cores, about 3 minutes. Expected: rewards of held-out sums rise from -4.3 to 5.0, and right ones from a
fifth to nearly three fifths: that much a reward model can teach that tells 94 % of held-out pairs apart.

    ./run.sh train configs/arithmetic_rlhf.py --init-from runs/arithmetic --out runs/arithmetic-rlhf
"""

from dataclasses import replace

from configs import arithmetic_gspo
from configs.run import Run


def run() -> Run:
    """As configs/arithmetic_gspo.py, with another reward, and not far from the model that it starts from.

    Without that (rl.kl=0) it finds what the reward model takes for right: rewards rise as well, and sums get worse.
    """
    base = arithmetic_gspo.run()
    assert base.rl is not None
    return replace(base, steps=80, rl=replace(base.rl, rewards=("model:runs/arithmetic-reward",), kl=0.2))
