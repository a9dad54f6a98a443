"""Who teaches a run: a model in memory, a model whose words about every row are kept on disk, or one at an endpoint."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs.run import Run, check_divides
from errors import UserError
from model.load import check_language_model, open_model
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from train.asking import Endpoint
from train.beside import is_beside, paths_beside, write_beside
from train.distillation import IDS, SAID, tell_rows
from train.reference import fingerprint, read_frozen
from train.state import compute_dtype

if TYPE_CHECKING:
    from train.setup import Job

Rows = dict[str, np.ndarray]

AT_ONCE = 8
"""Texts that an endpoint is asked about at the same time."""
PROBE = "A fox jumps over 1,234 dogs: « déjà vu » – 你好, мир!\n\tx = {'y': [0.5]}"
"""A text that few tokenizers cut alike."""
AS_ID = "token_id:"
"""What a token is written as where its text would not say which it is."""
BUSY = (408, 429)
"""Answers about the request that are not final."""


class ModelTeacher:
    """A MODEL.

    Raises:
        UserError: it is none, or has another tokenizer, more tokens, or sizes that the run's mesh cannot cut.
    """

    def __init__(self, run: Run, tokenizer: Tokenizer):
        name = run.distill.teacher
        try:
            self._source = open_model(name)
            check_language_model(self._source)
            own = self._source.tokenizer()
        except UserError as exc:
            raise UserError(f"distill.teacher: {exc}") from exc
        config = self._source.config
        if own.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"the teacher {name} has another tokenizer than the student, so that their tokens cannot be compared; "
                f"choose a teacher of its kin, or train the student with the teacher's tokenizer"
            )
        if config.vocab_size > run.model.vocab_size:
            raise UserError(
                f"the teacher {name} has {config.vocab_size} rows of vocabulary and model.vocab_size is "
                f"{run.model.vocab_size}; make the student's at least as large"
            )
        if run.distill.top_k > config.vocab_size:
            raise UserError(
                f"distill.top_k={run.distill.top_k} is more than the teacher's {config.vocab_size} tokens; "
                "0 compares them all"
            )
        if run.data.sequence_length > config.max_positions:
            raise UserError(
                f"data.sequence_length={run.data.sequence_length} is longer than the {config.max_positions} positions "
                f"of the teacher {name}; shorten it"
            )
        try:
            check_divides(config, run.mesh)
        except UserError as exc:
            raise UserError(f"the teacher {name} does not fit the mesh: {exc}") from exc
        if config.vocab_size % run.mesh.tensor:
            raise UserError(
                f"{config.vocab_size} rows of the teacher's vocabulary do not divide over mesh.tensor={run.mesh.tensor}"
            )
        self._run, self._model = run, None
        # Of replies that are yet to be drawn nothing can be kept.
        self._keeps = run.distill.top_k > 0 and not run.distill.on_policy

    def model(self, mesh: jax.sharding.Mesh) -> Transformer:
        """Its weights on the mesh, in the type of the student's activations; read once."""
        if self._model is None:
            self._model = read_frozen(self._source, mesh, compute_dtype(self._run))
        return self._model

    def live(self, mesh: jax.sharding.Mesh) -> Transformer | None:
        """The model that a step needs; None where what it says is kept beside the rows."""
        return None if self._keeps else self.model(mesh)

    def tell(self, rows: Rows) -> Rows:
        """`rows` as they are: the model says what it has to in the step."""
        return rows

    def prepare(self, job: Job) -> None:
        """Gives all rows of the run what the teacher says of them, where that is to be kept."""
        config = self._run.distill
        if not self._keeps:
            return
        key = f"{fingerprint(config.teacher)} {config.top_k} {config.temperature}"
        arrays = {name: paths_beside(job, job.cache, name, key) for name in (IDS, SAID)}
        if not is_beside(job, job.cache, (IDS, SAID), key):
            how = partial(tell_rows, top_k=config.top_k, temperature=config.temperature)
            score = jax.jit(how, out_shardings=NamedSharding(job.mesh, P()))
            model = self.model(job.mesh)

            def told(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
                return score(model, {name: batch[name] for name in ("tokens", "positions", "segments", "targets")})

            write_beside(job, job.cache, key, "what the teacher says", told)
            self._model = None  # its memory is the student's from now on
        for name, paths in arrays.items():
            job.data.attach(name, paths)


class EndpointTeacher:
    """A model at an OpenAI-compatible endpoint that gives log-probabilities of prompts of token ids.

    That is `/v1/completions` with `echo`, `logprobs` and `return_tokens_as_token_ids`, as vLLM and `qmax serve` have
    it. Where it is down it is asked again until it answers.

    Raises:
        UserError: it answers otherwise, or cuts a text into other tokens.
    """

    def __init__(self, run: Run, tokenizer: Tokenizer, client: httpx.Client | None = None):
        self._top_k, self._vocab = run.distill.top_k, run.model.vocab_size
        self._endpoint = Endpoint(run.distill.teacher, "teacher", client=client)
        with self._endpoint:
            found = self._until(lambda: self._echo(PROBE)["tokens"])
        ids, own = [self._id(word) for word in found], tokenizer.encode(PROBE)
        if ids[-len(own) :] != own:  # some begin every text with a token
            raise UserError(
                f"the teacher at {self._endpoint.url} has another tokenizer than the student, so that their tokens "
                "cannot be compared; choose a teacher of its kin"
            )

    def live(self, mesh: jax.sharding.Mesh) -> None:
        """There is no model in memory."""

    def prepare(self, job: Job) -> None:
        """Nothing: rows are asked about as they come."""

    def tell(self, rows: Rows) -> Rows:
        """`rows` with the arrays `IDS` and `SAID`."""
        shape, top = rows["tokens"].shape, self._top_k
        ids, said = np.full((*shape, top), -1, np.int32), np.zeros((*shape, top + 2), np.float32)
        places: list[tuple[int, np.ndarray]] = []
        for row, segments in enumerate(rows["segments"]):
            numbers = np.unique(segments[(segments > 0) & (rows["weights"][row] > 0)])
            places += [(row, np.flatnonzero(segments == number)) for number in numbers]
        texts = [[*rows["tokens"][row, at].tolist(), int(rows["targets"][row, at[-1]])] for row, at in places]
        with self._endpoint, ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(self._score, texts))
        for (row, at), (own_ids, own_said) in zip(places, answers, strict=True):
            ids[row, at], said[row, at] = own_ids, own_said
        return {**rows, IDS: ids, SAID: said}

    def _score(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of each target of a text the likeliest tokens `[T, K]`, and what is said of them `[T, K + 2]`."""
        return self._until(lambda: self._once(tokens))

    def _once(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        answer, count = self._echo(tokens), len(tokens) - 1
        ids, said = np.full((count, self._top_k), -1, np.int32), np.full((count, self._top_k + 2), -np.inf, np.float32)
        for place in range(count):
            # The token itself is there too, beyond the likeliest.
            every = sorted(answer["top_logprobs"][place + 1].items(), key=lambda one: -one[1])[: self._top_k]
            ids[place, : len(every)] = [self._id(word) for word, _ in every]
            said[place, : len(every)] = [value for _, value in every]
        if ids.max(initial=0) >= self._vocab:
            raise UserError(
                f"the teacher at {self._endpoint.url} says token {ids.max()} and the student has {self._vocab}; choose "
                "a teacher with the student's tokenizer"
            )
        known = np.exp(said[:, : self._top_k].astype(np.float64)).sum(-1)
        said[:, -2] = np.log(np.maximum(1 - known, 2.0**-24))
        said[:, -1] = answer["token_logprobs"][1:]
        return ids, said

    def _echo(self, prompt: str | list[int]) -> dict[str, Any]:
        """The log-probabilities of a prompt, in the form of /v1/completions."""
        body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": self._top_k}
        try:
            answer = self._endpoint.post("completions", {**body, "return_tokens_as_token_ids": True})
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if 400 <= status < 500 and status not in BUSY:
                raise UserError(
                    f"the teacher at {self._endpoint.url} refuses to score a prompt ({status}: "
                    f"{error.response.text[:300]}); it needs /v1/completions with echo and logprobs={self._top_k}"
                ) from error
            raise
        return answer["choices"][0]["logprobs"]

    def _id(self, word: str) -> int:
        if not word.startswith(AS_ID):
            raise UserError(
                f"the teacher at {self._endpoint.url} gives tokens as text, which does not say which they are; it "
                "needs return_tokens_as_token_ids, as vLLM and `qmax serve` have it"
            )
        return int(word.removeprefix(AS_ID))

    def _until(self, once: Callable[[], Any]) -> Any:
        return self._endpoint.until(once)


Teacher = ModelTeacher | EndpointTeacher


def open_teacher(run: Run, tokenizer: Tokenizer) -> Teacher | None:
    """The teacher that the run names, checked; its weights are not read yet. None for other objectives."""
    if run.objective != "distill":
        return None
    if run.model.num_labels:
        raise UserError(
            f"model.num_labels={run.model.num_labels} makes a model for sequence classification, which predicts no "
            "tokens; set it to 0 to learn from a teacher"
        )
    return EndpointTeacher(run, tokenizer) if run.distill.at_endpoint else ModelTeacher(run, tokenizer)
