"""One step of reinforcement learning: draw, reward, compare, learn, hand the new weights to the engine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from errors import UserError
from serve.engine import Engine
from sharding.rules import batch_share
from train.data.order import derive, permute
from train.handover import logprobs_of, model_of
from train.reference import Reference
from train.rl.advantages import advantages, is_equal
from train.rl.rewards import Asked, GradeReward, JudgeReward, give, make_rewards
from train.rl.rollout import Rollout
from train.rl.rows import lay_out, make_rows, of_samples, row_counts
from train.rl.samples import Sample
from train.setup import Job
from train.state import TrainState
from train.tasks.catalogue import open_task
from train.tools import tools_named

Metrics = dict[str, Any]
BINS = 10
"""Of the histograms in the log."""


class Learner:
    """What stays from step to step.

    Raises:
        UserError: a task, tool, reward or reference that the config names cannot be used.
    """

    def __init__(self, job: Job, state: TrainState):
        run, self.job = job.run, job
        self.config, self.length = run.rl, run.data.sequence_length
        self.tasks = [open_task(spec) for spec in self.config.tasks]
        self.rewards = make_rewards(self.config, job.tokenizer)
        self.engine = Engine(
            model_of(run, job.skeleton, state),
            job.tokenizer,
            mesh=job.mesh if job.mesh.size > 1 else None,
            slots=min(self.config.slots, self.config.prompts * self.config.samples),
            context=min(self.length + 1, run.model.max_positions),
            record_experts=self.config.replay,
        )
        self.rollout = Rollout(
            self.engine, job.tokenizer, self.config, tools_named(self.config.tools), self.engine.context
        )
        self.problems = [self._that_fit(self._asked("train", index)) for index in range(len(self.tasks))]
        self.held_out = self._that_fit([one for index in range(len(self.tasks)) for one in self._asked("test", index)])
        needed = self.config.kl > 0
        path = self.config.reference_model
        self.reference = Reference(run, job.skeleton, job.mesh, path, "rl.reference_model") if needed else None
        self.update = job.compiled_step()
        everywhere = NamedSharding(job.mesh, P())
        score = partial(logprobs_of, temperature=self.config.temperature)
        self.score = jax.jit(
            lambda s, rows: score(job.skeleton.merge(s.params, s.extra), rows), out_shardings=everywhere
        )
        self.seconds: dict[str, float] = {}

    # ---- problems ---------------------------------------------------------
    def _asked(self, split: Any, index: int) -> list[Asked]:
        task = self.tasks[index]
        return [Asked(task, problem) for problem in task.problems(split)]

    def _that_fit(self, asked: Sequence[Asked]) -> list[Asked]:
        found = [one for one in asked if self.rollout.fits(self.rollout.encode(one.problem))]
        if asked and not found:
            raise UserError(
                f"no prompt of {asked[0].task.name} leaves room for rl.max_new_tokens={self.config.max_new_tokens} in "
                f"{self.rollout.limit} tokens; raise data.sequence_length"
            )
        return found

    def prompts(self, step: int, turn: int) -> list[Asked]:
        """The problems of a step, and those that are drawn in the place of others: a pure function of both numbers."""
        first = ((step - 1) * (1 + self.config.resample) + turn) * self.config.prompts
        found: list[Asked] = []
        for k in range(first, first + self.config.prompts):
            own, index = self.problems[k % len(self.problems)], k // len(self.problems)
            epoch, place = divmod(index, len(own))
            key = derive(self.job.run.seed, "problems", k % len(self.problems), epoch)
            found.append(own[int(permute(np.array([place]), len(own), key)[0])])
        return found

    # ---- a step -----------------------------------------------------------
    def step(self, state: TrainState, number: int) -> tuple[TrainState, Metrics]:
        """Step `number`, from 1; the state is used up."""
        self.seconds = {}
        with self._timed("rollout"):
            samples, about = self.draw(number)
        with self._timed("scoring"):
            about |= self.look_up(state, samples)
        values = self.compare(samples)
        with self._timed("update"):
            state, metrics = self.learn(state, samples, values)
        with self._timed("handover"):
            self.hand_over(state)
        return state, metrics | about | {f"seconds_{name}": spent for name, spent in self.seconds.items()}

    def hand_over(self, state: TrainState) -> None:
        """The engine draws from these weights from now on."""
        self.engine.update(model_of(self.job.run, self.job.skeleton, state))
        jax.block_until_ready(self.engine.device.leaves)

    def draw(self, number: int) -> tuple[list[Sample], Metrics]:
        """The rewarded replies of a step, group after group."""
        useful: list[list[Sample]] = []
        spare: list[list[Sample]] = []
        drawn = 0
        for turn in range(1 + self.config.resample):
            asked = self.prompts(number, turn)
            seed = derive(self.job.run.seed, "rollout", number, turn)
            prompts = [self.rollout.encode(one.problem) for one in asked]
            samples = self.rollout.draw(prompts, seed, samples=self.config.samples)
            self.reward([asked[sample.group] for sample in samples], samples)
            drawn += len(asked)
            for start in range(0, len(samples), self.config.samples):
                group = samples[start : start + self.config.samples]
                rewards = np.array([sample.reward for sample in group if not sample.skipped])
                (spare if is_equal(rewards) else useful).append(group)
            if len(useful) >= self.config.prompts:
                break
        equal = len(spare) / drawn
        groups = [*useful, *spare][: self.config.prompts]
        for index, group in enumerate(groups):
            for sample in group:
                sample.group = index
        return [sample for group in groups for sample in group], {"equal_groups": equal, "groups_drawn": drawn}

    def reward(self, asked: Sequence[Asked], samples: Sequence[Sample]) -> None:
        """What each reply is worth; of several processes the first decides."""
        if jax.process_index() == 0:
            give(self.rewards, self.config.reward_weights, asked, samples)
        if jax.process_count() > 1:
            own = np.array([[sample.reward, sample.skipped] for sample in samples], np.float64)
            for sample, (reward, skipped) in zip(samples, multihost_utils.broadcast_one_to_all(own), strict=True):
                sample.reward, sample.skipped = float(reward), bool(skipped)

    def look_up(self, state: TrainState, samples: Sequence[Sample]) -> Metrics:
        """Writes to replies what the reference says of them and, where several updates follow, the trainer."""
        for sample in samples:
            sample.old = sample.reference = None
        config, found = self.config, Metrics()
        several = config.updates > 1
        if not several and self.reference is None:
            return found
        layout = self._layout(samples)
        rows = self._place(make_rows(samples, [0.0] * len(samples), layout, self.length, config))
        if self.reference is not None:
            values = of_samples(np.asarray(self.reference(state, rows)), samples, layout)
            for sample, own in zip(samples, values, strict=True):
                sample.reference = own
                if config.kl_estimator == "k1":
                    sample.reward -= config.kl * float(((sample.logprobs - own) * sample.drawn).sum())
        if several:
            plain, tempered = (of_samples(np.asarray(x), samples, layout) for x in self.score(state, rows))
            gaps = [np.abs(a - s.logprobs)[s.drawn] for a, s in zip(plain, samples, strict=True)]
            every = np.concatenate(gaps)
            found = {"logprob_gap": float(every.mean()), "logprob_gap_max": float(every.max())}
            for sample, own in zip(samples, tempered, strict=True):
                sample.old = own
        return found

    def compare(self, samples: Sequence[Sample]) -> list[float]:
        """The advantage of each reply."""
        shape = self.config.prompts, self.config.samples
        rewards = np.array([sample.reward for sample in samples]).reshape(shape)
        there = np.array([not sample.skipped for sample in samples]).reshape(shape)
        return advantages(rewards, there, self.config).reshape(-1).tolist()

    def learn(
        self, state: TrainState, samples: Sequence[Sample], values: Sequence[float]
    ) -> tuple[TrainState, Metrics]:
        """The optimizer steps on these replies, each with some of the groups."""
        updates, each = self.config.updates, list[Metrics]()
        for update in range(updates):
            own = [index for index, sample in enumerate(samples) if sample.group % updates == update]
            part = [samples[index] for index in own]
            rows = make_rows(part, [values[index] for index in own], self._layout(part), self.length, self.config)
            batch = self._place(rows)
            with jax.transfer_guard("disallow"):
                state, metrics = self.update(state, batch)
            each.append(metrics)
        return state, together(jax.device_get(each)) | self._of_replies(samples)

    def _layout(self, samples: Sequence[Sample]) -> Any:
        mesh = self.job.run.mesh
        return lay_out(samples, self.length, row_counts(len(samples), self.job.run.accumulate * mesh.batch_shards))

    def _place(self, rows: dict[str, Any]) -> dict[str, jax.Array]:
        return self.job.place(self._share(rows))

    def _share(self, rows: dict[str, Any]) -> dict[str, Any]:
        """This host's part of a batch."""
        share, shares = batch_share(self.job.mesh)
        count = len(rows["tokens"]) // shares
        return {name: value[share * count : (share + 1) * count] for name, value in rows.items()}

    def _of_replies(self, samples: Sequence[Sample]) -> Metrics:
        """What is logged of replies and of what they are worth."""
        rewards = np.array([sample.reward for sample in samples])
        found = self._of_lengths(samples) | {
            "reward": rewards.mean(),
            "reward_deviation": rewards.std(),
            "reward_histogram": np.histogram(rewards, BINS)[0],
            "reward_range": np.array([rewards.min(), rewards.max()]),
        }
        for name in samples[0].parts if len(self.rewards) > 1 else ():
            found[f"reward_{name}"] = np.mean([sample.parts[name] for sample in samples if name in sample.parts])
        if any(sample.skipped for sample in samples):
            found["skipped_replies"] = np.mean([sample.skipped for sample in samples])
        for reward in self.rewards:
            if isinstance(reward, GradeReward) and reward.raised:
                found["graders_raised"] = reward.raised
            if isinstance(reward, JudgeReward) and reward.failures:
                found["judge_failures"] = reward.failures
        return found

    def _of_lengths(self, samples: Sequence[Sample]) -> Metrics:
        """What is logged of replies, whatever is learnt from them."""
        lengths = np.array([sample.length for sample in samples])
        longest = self.config.max_new_tokens * (self.config.turns if self.config.tools else 1)
        found: Metrics = {
            "reply_tokens": lengths.mean(),
            "cut_replies": np.mean([sample.cut for sample in samples]),
            "length_histogram": np.histogram(lengths, BINS, (0, longest))[0],
        }
        if self.config.tools:
            found["tool_calls"] = np.mean([sample.calls for sample in samples])
        return found

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    # ---- held-out problems ------------------------------------------------
    def validate(self, state: TrainState) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Mean reward of greedy replies to held-out problems, and some of these replies."""
        asked = self.held_out[: self.config.validation_problems]
        if not asked:
            return {}, []
        prompts = [self.rollout.encode(one.problem) for one in asked]
        samples = self.rollout.draw(prompts, 0, samples=1, greedy=True)
        self.reward(asked, samples)
        self.engine.forget()
        shown = [
            {"prompt": one.problem.prompt, "reply": sample.reply, "reward": sample.reward}
            for one, sample in zip(asked[:8], samples, strict=False)
        ]
        found = {"validation_reward": float(np.mean([sample.reward for sample in samples]))}
        found |= {"validation_reply_tokens": float(np.mean([s.length for s in samples]))}
        if not any(isinstance(reward, GradeReward) for reward in self.rewards):
            # What the task itself says of replies that others reward: whether these rewards are worth following.
            found["validation_grade"] = float(np.mean(np.array(GradeReward()(asked, samples), np.float64)))
        return found | self.of_answers(state, samples), shown

    def of_answers(self, state: TrainState, samples: Sequence[Sample]) -> dict[str, float]:
        """What else is logged of replies to held-out problems; where `validation_loss` is, it decides which is best."""
        del state, samples
        return {}


def together(each: Sequence[Metrics]) -> Metrics:
    """One record of several updates: sums of tokens, the largest of peaks, the last of counters, means of all else."""
    last = dict(each[-1])
    for name in last:
        values = [np.asarray(one[name]) for one in each]
        if name == "tokens":
            last[name] = sum(values)
        elif name.endswith("_max"):
            last[name] = max(values)
        elif name not in ("bad_steps", "parameter_norm"):
            last[name] = sum(value.astype(np.float64) for value in values) / len(values)
    return last
