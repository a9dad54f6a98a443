"""What replies are worth: the task's own grade, a reward model, a judge at an endpoint, or several of them weighted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import jax
import jax.numpy as jnp
import numpy as np

from configs.alignment import RLConfig
from errors import UserError, did_you_mean
from model.forward import Batch, forward
from model.load import open_model, read_model
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from sharding.mesh import MeshConfig, make_mesh
from train.asking import Endpoint
from train.preference import score_hidden
from train.reference import reads_alike
from train.rl.samples import Sample
from train.tasks.task import Problem, Task, grade_safely

KINDS = ("task", "model", "judge")
ROWS = 16
"""Replies that a reward model reads at once."""
GRADERS = 4
"""Replies that are graded at the same time."""
JUDGE_TRIES = 4
"""Before a reply goes without a reward, where that is what the config wants."""


@dataclass(frozen=True)
class Asked:
    """A problem, and the task that it is of."""

    task: Task
    problem: Problem


class Reward(Protocol):
    """One source of rewards."""

    name: str

    def __call__(self, asked: Sequence[Asked], samples: Sequence[Sample]) -> Sequence[float | None]:
        """Of each reply its reward; None where there is none to be had."""
        ...


class GradeReward:
    """The grade that the task gives, 0 to 1; a grader that raises gives 0, and is counted."""

    name = "task"

    def __init__(self) -> None:
        self.raised = 0

    def __call__(self, asked: Sequence[Asked], samples: Sequence[Sample]) -> list[float | None]:
        with ThreadPoolExecutor(GRADERS) as pool:  # some wait for programs
            each = pool.map(lambda one, sample: grade_safely(one.task, one.problem, sample.reply), asked, samples)
            grades = list(each)
        self.raised += sum(grade.failed for grade in grades)
        return [grade.score for grade in grades]


class ModelReward:
    """The score that a reward model gives to prompt and reply.

    Raises:
        UserError: the model has no head for that, or reads other tokens than the one that is trained.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer):
        self.name = "model"
        source = open_model(path)
        if source.config.num_labels != 1:
            raise UserError(f"{path} is no reward model; train one with objective=reward")
        if not reads_alike(source.tokenizer(), tokenizer):
            raise UserError(
                f"the reward model {path} has other tokens than the model that is trained; use one of its kin"
            )
        # One device of this process, whatever the run is laid over: of several processes the first alone asks.
        self._mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
        with jax.set_mesh(self._mesh):
            self._model = read_model(source, self._mesh)
        self._score = jax.jit(_last_scores)

    def __call__(self, asked: Sequence[Asked], samples: Sequence[Sample]) -> list[float | None]:
        longest = max(len(sample.tokens) for sample in samples)
        length = 1 << max(longest - 1, 15).bit_length()
        found: list[float | None] = []
        with jax.set_mesh(self._mesh):
            for start in range(0, len(samples), ROWS):
                part = samples[start : start + ROWS]
                tokens, lengths = np.zeros((ROWS, length), np.int32), np.ones(ROWS, np.int32)
                for row, sample in enumerate(part):
                    lengths[row] = len(sample.tokens)
                    tokens[row, : lengths[row]] = sample.tokens
                found += np.asarray(self._score(self._model, tokens, lengths))[: len(part)].tolist()
        return found


def _last_scores(model: Transformer, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """A reward model's score at the last token of each row."""
    place_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    positions_BT = jnp.broadcast_to(place_T, tokens_BT.shape)
    segments_BT = (place_T < lengths_B[:, None]).astype(jnp.int32)
    hidden_BTD = forward(model, Batch(tokens_BT, positions_BT, segments_BT)).hidden_BTD
    last_B1D = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
    return score_hidden(model, last_B1D)[:, 0]


class JudgeReward:
    """A number, 0 to 10, that a language model at an OpenAI-compatible endpoint says; as a reward 0 to 1."""

    def __init__(self, url: str, config: RLConfig, client: httpx.Client | None = None):
        self.name, self._config = "judge", config
        self._endpoint = Endpoint(url, "judge", config.judge_model, client)

    @property
    def failures(self) -> int:
        """Times that it did not answer, or said no number."""
        return self._endpoint.failures

    def __call__(self, asked: Sequence[Asked], samples: Sequence[Sample]) -> list[float | None]:
        with self._endpoint:
            return [self._ask(one.problem, sample) for one, sample in zip(asked, samples, strict=True)]

    def _ask(self, problem: Problem, sample: Sample) -> float | None:
        tries = JUDGE_TRIES if self._config.judge_down == "skip" else 0
        return self._endpoint.until(lambda: self._once(problem, sample), tries)

    def _once(self, problem: Problem, sample: Sample) -> float:
        talk = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in problem.prompt)
        body: dict[str, Any] = {
            "messages": [
                {"role": "system", "content": self._config.judge_prompt},
                {"role": "user", "content": f"{talk}\n\nReply to rate:\n{sample.reply}"},
            ],
            "temperature": 0,
        }
        said = self._endpoint.post("chat/completions", body)["choices"][0]["message"]["content"]
        numbers = re.findall(r"\d+(?:\.\d+)?", said or "")
        if not numbers:
            raise ValueError(f"no number in {said!r}")
        return min(float(numbers[-1]), 10.0) / 10


def make_rewards(config: RLConfig, tokenizer: Tokenizer) -> list[Reward]:
    """The sources that the config names. UserError for a kind that there is not."""
    found: list[Reward] = []
    for spec in config.rewards:
        kind, _, where = spec.partition(":")
        if kind == "task" and not where:
            found.append(GradeReward())
        elif kind == "model" and where:
            found.append(ModelReward(Path(where), tokenizer))
        elif kind == "judge" and where:
            found.append(JudgeReward(where, config))
        else:
            hint = did_you_mean(kind, KINDS) or "; there is task, model:DIR and judge:URL"
            raise UserError(f"rl.rewards has {spec!r}{hint}")
    return found


def give(
    rewards: Sequence[Reward], weights: Sequence[float], asked: Sequence[Asked], samples: Sequence[Sample]
) -> None:
    """Writes to each reply what it is worth: the weighted sum, or that it is skipped where a part is missing."""
    each = [reward(asked, samples) for reward in rewards]
    factors = list(weights) or [1.0] * len(rewards)
    for index, sample in enumerate(samples):
        parts = {reward.name: values[index] for reward, values in zip(rewards, each, strict=True)}
        known = {name: value for name, value in parts.items() if value is not None}
        sample.parts, sample.skipped = known, len(known) < len(parts)
        if not sample.skipped:
            sample.reward = sum(factor * value for factor, value in zip(factors, known.values(), strict=True))
