"""Held-out prompts that are answered while a run trains, so that one can read what it has learnt."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from serve.engine import Engine
from serve.sampling_params import SamplingParams
from train.data.loader import DataSets
from train.handover import model_of
from train.samples_file import write_samples
from train.setup import Job, say
from train.state import TrainState

BEGINNING = 32
"""Tokens of a held-out text that are its prompt, where there is no conversation."""
SLOTS = 16
"""Replies that are drawn at the same time."""


class Sampler:
    """Answers the same prompts whenever it is asked; its programs are compiled once.

    Args:
        job: of conversations, pairs, judged replies or text. `run.samples` says how many prompts, `run.sample_tokens`
            how long replies are.
    """

    def __init__(self, job: Job) -> None:
        run, self.job = job.run, job
        self.prompts: list[list[int]] = []
        for prompt in held_out_prompts(job.data, run.objective):
            if len(self.prompts) == run.samples:
                break
            if len(prompt) < run.model.max_positions and prompt not in self.prompts:
                self.prompts.append(prompt)
        if len(self.prompts) < run.samples:
            say(f"samples={run.samples}: there are no more than {len(self.prompts)} different held-out prompts")
        self.engine: Engine | None = None

    def show(self, state: TrainState, step: int) -> None:
        """Writes the replies of these weights to `samples.jsonl`."""
        if not self.prompts:
            return
        run, tokenizer = self.job.run, self.job.tokenizer
        model = model_of(run, self.job.skeleton, state)
        if self.engine is None:
            longest = max(map(len, self.prompts)) + run.sample_tokens
            self.engine = Engine(
                model,
                tokenizer,
                mesh=self.job.mesh if self.job.mesh.size > 1 else None,
                slots=min(len(self.prompts), SLOTS),
                context=min(longest, run.model.max_positions),
            )
        else:
            self.engine.update(model)
        found = self.engine.generate(self.prompts, SamplingParams(temperature=0.0, max_tokens=run.sample_tokens))
        self.engine.forget()
        if jax.process_index() == 0:
            shown = [
                {"prompt": tokenizer.decode(prompt), "reply": tokenizer.decode(reply.content)}
                for prompt, reply in zip(self.prompts, found, strict=True)
            ]
            write_samples(self.job.out, step, shown)


def held_out_prompts(data: DataSets, objective: str) -> Iterator[list[int]]:
    """Tokens of each held-out document up to the first that is learnt; of plain text its beginning. The same order at
    every call.

    Rows of pairs have the chosen reply and the rejected one, or a judged reply and a mismatched one: the first counts.
    """
    paired = objective in ("dpo", "kto")
    with data.validation_batches() as batches:
        for batch in batches:
            for tokens, weights, segments in zip(batch["tokens"], batch["weights"], batch["segments"], strict=True):
                for segment in range(1, segments.max() + 1, 2 if paired else 1):
                    (places,) = np.nonzero(segments == segment)
                    if objective == "pretrain":
                        if len(places) > BEGINNING:
                            yield tokens[places[:BEGINNING]].tolist()
                        continue
                    (learnt,) = np.nonzero(weights[places] > 0)
                    if len(learnt):
                        yield tokens[places[: learnt[0] + 1]].tolist()
