"""One step of distillation on replies that the student draws: draw, ask the teacher about every token, learn.

On-policy distillation: GKD, arXiv 2306.13649, section 3, of student samples alone; Qwen3, 2505.09388, section 4.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from train.data.order import derive
from train.rl.learner import Learner, Metrics
from train.rl.rows import make_rows
from train.rl.samples import Sample
from train.setup import Job
from train.state import TrainState

READ = "tokens", "targets", "positions", "segments", "weights", "total", "drawn"
"""Arrays of rows of replies that have to do with no reward."""


class Distiller(Learner):
    """A learner whose replies have no reward: a teacher says what it would have said at each of their tokens.

    Rewards are given to replies to held-out problems alone, for the log.
    """

    def __init__(self, job: Job, state: TrainState):
        super().__init__(job, state)
        self.held_out_step = job.compiled_validation()

    def draw(self, number: int) -> tuple[list[Sample], Metrics]:
        """The replies of a step, group after group."""
        prompts = [self.rollout.encode(one.problem) for one in self.prompts(number, 0)]
        return self.rollout.draw(prompts, derive(self.job.run.seed, "rollout", number), samples=self.config.samples), {}

    def look_up(self, state: TrainState, samples: Sequence[Sample]) -> Metrics:
        """Nothing: what the teacher says comes with the rows, or in the step itself."""
        del state, samples
        return {}

    def compare(self, samples: Sequence[Sample]) -> list[float]:
        """No reply is better than another."""
        return [0.0] * len(samples)

    def of_answers(self, state: TrainState, samples: Sequence[Sample]) -> dict[str, float]:
        """How far the student is from the teacher on its own replies to held-out problems."""
        rows = make_rows(samples, self.compare(samples), self._layout(samples), self.length, self.config)
        sums = jax.device_get(self.held_out_step(state, self._place(rows)))
        weight = float(sums.pop("weight"))
        return {f"validation_{name}": float(value) / weight for name, value in sums.items()}

    def _place(self, rows: dict[str, Any]) -> dict[str, jax.Array]:
        assert self.job.teacher is not None
        own = self._share({name: rows[name] for name in READ})
        return self.job.place(self.job.teacher.tell(own))

    def _of_replies(self, samples: Sequence[Sample]) -> Metrics:
        return self._of_lengths(samples)
