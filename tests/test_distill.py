"""Laws of distillation: divergences as worked by hand; a student that is its teacher has nothing to learn; where the
teacher sits and how many devices there are changes nothing; a stopped run ends as one that nobody disturbed."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from math import log
from pathlib import Path
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kill_campaign import hashes, records, story, write_project
from serving import Served, serving
from test_resume import interrupt

import qmax
from configs.alignment import DistillConfig
from configs.run import LossConfig
from model.load import load_model
from model.transformer import Transformer
from model.tree import Skeleton
from serve.api.app import Settings
from serve.engine import Engine
from sharding.mesh import MeshConfig, make_mesh
from sharding.rules import batch_sharding
from tests.tiny import DENSE, MOE, Trainer, make_rows, make_run
from train.distillation import IDS, LEAST, SAID, distill_loss, divergence, in_classes, tell, tell_rows
from train.losses import no_parts, totals

Words = tuple[str, ...]


# ---- divergences by hand ----------------------------------------------------------
def test_both_divergences_by_hand() -> None:
    """Of 1/2 1/4 1/4 from 1/4 1/2 1/4: 1/2 ln 2 - 1/4 ln 2; and of what is all on one class, ln 2 and no more."""
    teacher, student = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.log(jnp.array([0.25, 0.5, 0.25]))
    assert divergence(teacher, student, "forward") == pytest.approx(0.25 * log(2), rel=1e-6)
    skewed = jnp.log(jnp.array([0.7, 0.2, 0.1]))
    forward = 0.7 * log(0.7 / 0.25) + 0.2 * log(0.2 / 0.5) + 0.1 * log(0.1 / 0.25)
    reverse = 0.25 * log(0.25 / 0.7) + 0.5 * log(0.5 / 0.2) + 0.25 * log(0.25 / 0.1)
    assert divergence(skewed, student, "forward") == pytest.approx(forward, rel=1e-6)
    assert divergence(skewed, student, "reverse") == pytest.approx(reverse, rel=1e-6)
    certain = jnp.array([0.0, -jnp.inf])
    assert divergence(certain, jnp.log(jnp.array([0.5, 0.5])), "forward") == pytest.approx(log(2))


def test_all_but_the_likeliest_tokens_are_one_class() -> None:
    """Of .5 .2 .2 .1 the first and the last: .5 .1 and .4; a token that is not given is no class."""
    logprobs = jnp.log(jnp.array([[[0.5, 0.2, 0.2, 0.1]]]))
    found = jnp.exp(in_classes(logprobs, jnp.array([[[0, 3, -1]]])))
    np.testing.assert_allclose(found, [[[0.5, 0.1, 0.0, 0.4]]], rtol=1e-6)
    ids, said = tell(logprobs, jnp.array([[3]]), 1, 1.0)
    assert ids.tolist() == [[[0]]]
    np.testing.assert_allclose(jnp.exp(said), [[[0.5, 0.5, 0.1]]], rtol=1e-6)


def test_the_rest_is_exact_where_it_is_nearly_nothing() -> None:
    """1 less the sum of the others would be 0 in float32; its gradient is 1 for the token that is all of it."""
    logprobs = jax.nn.log_softmax(jnp.array([[[0.0, -20.0, LEAST * 2]]]))
    ids = jnp.array([[[0, 2]]])
    assert in_classes(logprobs, ids)[0, 0, -1] == pytest.approx(-20, abs=1e-3)
    slope = jax.grad(lambda x: in_classes(x, ids)[0, 0, -1])(logprobs)
    np.testing.assert_allclose(slope[0, 0], [0, 1, 0], atol=1e-3)


# ---- the loss -----------------------------------------------------------------
RUN = make_run(MOE, objective="pretrain")
PLAIN = LossConfig(balance=0, router_z_loss=0)


WAYS = (("reverse", 0), ("forward", 5))
RARE_REVERSE = ["forward", pytest.param("reverse", marks=pytest.mark.full)]


@cache
def model(kind: str, seed: int) -> Transformer:
    """A random model."""
    return Transformer(MOE if kind == "moe" else DENSE, jax.random.key(seed))


def loss_of(
    config: DistillConfig, student: Transformer, teacher: Transformer | None, rows: dict[str, Any]
) -> tuple[float, dict[str, float], float]:
    """Loss, its parts, and the largest gradient of any weight."""
    rows = {name: jnp.asarray(value) for name, value in rows.items()}

    skeleton = Skeleton(student)
    params, extra = skeleton.split(student)

    def of(params: dict[str, jax.Array], teacher: Transformer | None) -> Any:
        own = skeleton.merge(params, extra)
        return distill_loss(own, rows, totals(rows), no_parts(own), config, PLAIN, teacher)

    (loss, parts), slopes = jax.jit(jax.value_and_grad(of, has_aux=True))(params, teacher)
    slope = max(float(jnp.abs(slope).max()) for slope in slopes.values())
    return float(loss), {name: float(value) for name, value in parts.more.items()}, slope


@pytest.mark.parametrize(
    ("direction", "top_k"),
    [("forward", 0), ("reverse", 5), *(pytest.param(*case, marks=pytest.mark.full) for case in WAYS)],
)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(direction: Any, top_k: int) -> None:
    one = model("dense", 0)
    config = DistillConfig("x", top_k=top_k, direction=direction, temperature=2.0)
    loss, parts, slope = loss_of(config, one, one, make_rows(RUN))
    assert abs(loss) <= 1e-6 and slope <= 1e-6
    assert parts["agreement"] == pytest.approx(1) and parts["nll"] == pytest.approx(parts["teacher_nll"], rel=1e-6)


@pytest.mark.parametrize("direction", RARE_REVERSE)
def test_all_tokens_as_the_likeliest_give_the_whole_divergence(direction: Any) -> None:
    """And in memory or in the rows what the teacher says is the same; and numpy says so of all logits at once."""
    student, teacher, rows = model("dense", 0), model("moe", 1), make_rows(RUN)
    config = DistillConfig("x", direction=direction, temperature=1.5, mix=0.5)
    whole, parts, slope = loss_of(config, student, teacher, rows)
    every = replace(config, top_k=DENSE.vocab_size)
    assert loss_of(every, student, teacher, rows)[::2] == pytest.approx((whole, slope), rel=1e-5)
    few, told = replace(config, top_k=7), jax.tree.map(jnp.asarray, rows)
    kept = {**rows, **jax.jit(partial(tell_rows, top_k=7, temperature=1.5))(teacher, told)}
    assert kept[IDS].shape == (8, 16, 7) and kept[SAID].shape == (8, 16, 9)
    live, on_disk = loss_of(few, student, teacher, rows), loss_of(few, student, None, kept)
    assert live[::2] == pytest.approx(on_disk[::2], rel=1e-5) and 0 < live[1]["kl"] < parts["kl"]
    assert live[1] == pytest.approx(on_disk[1], rel=1e-5)

    from model.forward import Batch, forward, unembed

    batch = Batch(told["tokens"], told["positions"], told["segments"])
    logits = [np.asarray(unembed(m, forward(m, batch).hidden_BTD), np.float64) for m in (teacher, student)]
    p, q = (x / 1.5 - np.log(np.exp(x / 1.5).sum(-1, keepdims=True)) for x in logits)
    first, second = (p, q) if direction == "forward" else (q, p)
    kl = (np.exp(first) * (first - second)).sum(-1)
    nll = np.log(np.exp(logits[1]).sum(-1)) - np.take_along_axis(logits[1], rows["targets"][..., None], -1)[..., 0]
    mean = [float((x * rows["weights"]).sum() / rows["weights"].sum()) for x in (kl, nll)]
    assert [parts["kl"], parts["nll"]] == pytest.approx(mean, rel=1e-4)
    assert whole == pytest.approx(1.5**2 * mean[0] + 0.5 * mean[1], rel=1e-4)


def test_a_teacher_with_fewer_rows_of_vocabulary_says_nothing_of_the_others() -> None:
    student = Transformer(replace(DENSE, vocab_size=96), jax.random.key(0))
    loss, _, slope = loss_of(DistillConfig("x", direction="reverse"), student, model("dense", 1), make_rows(RUN))
    assert np.isfinite(loss) and loss > 0.1 and np.isfinite(slope)


class Taught(Trainer):
    """A trainer with a teacher; its weights are one of the arrays of each step."""

    def __init__(self, config: DistillConfig, teacher: Transformer, *args: Any) -> None:
        self.config, self.teacher = config, teacher
        super().__init__(*args)

    def loss(self, model: Any, rows: Any, sums: Any, before: Any) -> Any:
        return distill_loss(model, rows, sums, before, self.config, self.run.loss, self.teacher)


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        (DistillConfig("x", top_k=5, direction="reverse"), MeshConfig(1, 2, 2, 2)),
        pytest.param(DistillConfig("x", mix=0.3), MeshConfig(2, 1, 2, 2), marks=pytest.mark.full),
        pytest.param(DistillConfig("x", top_k=5), MeshConfig(2, 2, 1, 1, 2), marks=pytest.mark.full),
        pytest.param(DistillConfig("x", direction="reverse"), MeshConfig(8), marks=pytest.mark.full),
    ],
)
@pytest.mark.full
def test_many_devices_give_what_one_gives(config: DistillConfig, mesh: MeshConfig) -> None:
    run, many = make_run(MOE, accumulate=1), make_mesh(mesh)
    one = Taught(config, model("dense", 5), run, make_mesh(MeshConfig()))
    other = Taught(config, model("dense", 5), replace(run, mesh=mesh), many, one.state)
    rows = make_rows(run)
    wanted, found = one(rows), other(jax.device_put(rows, batch_sharding(many)))
    for name in ("loss", "kl", "gradient_norm", "entropy", "agreement", "teacher_nll"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5), name


# ---- runs -----------------------------------------------------------------------
STEPS = 4
SMALL = ("--data.weights=", "--data.sequence-length", "64", "--steps", str(STEPS), "--checkpoint.every", "2")
SMALL += ("--checkpoint.keep", "9", "--validate-every", "2", "--optimizer.learning-rate", "1e-2", "--seed", "1")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project with words to say again as a task."""
    config = write_project(tmp_path_factory.mktemp("distill"))
    rows = [{"prompt": word, "answer": word * 2} for word in ("the", "a", "cat", "sat", "on", "mat", "dog", "ran")]
    (config.parent / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config


@pytest.fixture(scope="module")
def teacher(config: Path) -> Path:
    """A model that has read a little."""
    out = config.parent / "teacher"
    words = ("--steps", "8", "--checkpoint.every", "8", "--optimizer.learning-rate", "1e-2", "--data.sequence-length")
    assert qmax.main(["train", str(config), "--out", str(out), *words, "64", "--validate-every", "0"]) == 0
    return out


@pytest.fixture(scope="module")
def served(teacher: Path) -> Iterator[Served]:
    """The teacher behind an address."""
    own, tokenizer = load_model(teacher)
    with serving(Served(Settings()), Engine(own, tokenizer, slots=2), tokenizer=tokenizer) as shared:
        yield shared


def train(config: Path, out: Path, teacher: Path | str, *words: str) -> int:
    """Exit code of a distillation on the conversations beside the config, in this process."""
    chats = ("--data.sources", str(config.parent / "chats.jsonl"), "--distill.teacher", str(teacher))
    chats += ("--rl.tasks", f"jsonl:{config.parent / 'words.jsonl'}?grader=chrf")
    return qmax.main(["train", str(config), "--out", str(out), "--objective", "distill", *SMALL, *chats, *words])


ON_POLICY = ("--distill.on-policy", "true", "--accumulate", "1", "--rl.prompts", "4", "--rl.samples", "2")
ON_POLICY += ("--rl.max-new-tokens", "6", "--rl.validation-problems", "4", "--distill.direction", "reverse")


def told(out: Path) -> list[dict[str, Any]]:
    """What every step says of the divergence."""
    names = ("loss", "kl", "nll", "teacher_nll", "entropy", "agreement", "validation_kl", "gradient_norm")
    return [{name: record[name] for name in names if name in record} for record in records(out)]


@pytest.mark.full
def test_wherever_the_teacher_sits_the_student_learns_the_same(
    config: Path, teacher: Path, served: Served, tmp_path: Path
) -> None:
    """At an endpoint as kept on disk, with as many tokens; and with the whole vocabulary live, the agreement is as of
    few at the first step."""
    kept, asked, live = tmp_path / "kept", tmp_path / "asked", tmp_path / "live"
    top = ("--distill.top-k", "5", "--distill.mix", "0.1")
    assert train(config, kept, teacher, *top) == 0
    assert train(config, asked, f"{served.address}/v1", *top) == 0
    assert train(config, live, teacher, "--data.cache", str(tmp_path / "cache")) == 0
    for one, other in zip(told(kept), told(asked), strict=True):
        assert one.keys() == other.keys() and one == pytest.approx(other, rel=2e-3, abs=1e-4)
    first, *_, last = told(live)
    assert first["teacher_nll"] == pytest.approx(told(kept)[0]["teacher_nll"], rel=1e-4)
    assert first["agreement"] == pytest.approx(told(kept)[0]["agreement"], abs=1e-6)
    assert told(kept)[0]["kl"] < first["kl"] and last["kl"] < first["kl"] and last["validation_kl"] > 0
    files = sorted(path.parent.name for path in (config.parent / "cache").rglob("*.npy"))
    assert set(files) >= {IDS, SAID}
    before = {path: path.stat().st_mtime_ns for path in (config.parent / "cache").rglob("*.npy")}
    assert train(config, tmp_path / "again", teacher, *top, "--steps", "1") == 0
    assert before == {path: path.stat().st_mtime_ns for path in (config.parent / "cache").rglob("*.npy")}


@pytest.mark.parametrize(
    "words",
    [pytest.param(("--distill.top-k", "4"), marks=pytest.mark.full, id="rows"), pytest.param(ON_POLICY, id="replies")],
)
@pytest.mark.full
def test_a_stopped_run_ends_as_one_that_nobody_disturbed(
    config: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Words
) -> None:
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    assert train(config, undisturbed, teacher, *words) == 0
    with monkeypatch.context() as patched:
        interrupt(patched, signal.SIGTERM, 4)
        assert train(config, stopped, teacher, *words) == 0
    assert 0 < hashes(stopped)[0] < STEPS
    assert train(config, stopped, teacher, *words, "--resume") == 0
    assert hashes(stopped) == hashes(undisturbed)
    assert [story(record) for record in records(stopped)] == [story(record) for record in records(undisturbed)]


@pytest.mark.full
def test_on_its_own_replies_a_student_comes_closer_to_its_teacher(
    config: Path, teacher: Path, served: Served, tmp_path: Path
) -> None:
    """On prompts that it never learns from; and a teacher at an endpoint says the same of the first replies."""
    words = (*ON_POLICY, "--distill.top-k", "20")
    assert train(config, tmp_path / "live", teacher, *words, "--steps", "12") == 0
    found = records(tmp_path / "live")
    held_out = [record["validation_kl"] for record in found if "validation_kl" in record]
    assert held_out[-1] < 0.85 * held_out[0]
    assert "validation_reward" in found[-1] and "reward" not in found[-1] and found[-1]["reply_tokens"] >= 1
    assert train(config, tmp_path / "asked", f"{served.address}/v1", *words, "--steps", "1") == 0
    for one, other in zip(told(tmp_path / "asked"), told(tmp_path / "live"), strict=False):
        both = one.keys() & other.keys()
        assert {name: one[name] for name in both} == pytest.approx(
            {name: other[name] for name in both}, rel=2e-3, abs=1e-4
        )


# ---- what is refused ----------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--distill.teacher=",), "distill.teacher"),
        (("--distill.teacher", "nowhere"), "distill.teacher"),
        (("--distill.teacher", "http://x/v1"), "from 1 to 20"),
        (("--distill.teacher", "http://x/v1", "--distill.top-k", "21"), "from 1 to 20"),
        (("--distill.teacher", "http://x/v1", "--distill.top-k", "2", "--distill.temperature", "2"), "temperature"),
        (("--distill.top-k", "9999"), "distill.top_k=9999"),
        (("--distill.on-policy", "true", "--rl.tasks="), "rl.tasks"),
        (("--distill.on-policy", "true", "--rl.kl", "1"), "rl.kl"),
        (("--distill.on-policy", "true", "--distill.mix", "1"), "distill.mix"),
        (("--distill.temperature", "0"), "distill.temperature"),
        (("--model.vocab-size", "300"), "rows of vocabulary"),
        (("--data.sequence-length", "128", "--model.max-positions", "256", "--mesh.tensor", "3"), "mesh"),
    ],
)
def test_what_cannot_be_distilled_is_refused(
    config: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Words, said: str
) -> None:
    assert train(config, tmp_path / "run", teacher, *words) == 2
    shown = capsys.readouterr().err
    assert said in shown and "Traceback" not in shown and not (tmp_path / "run" / "config.json").exists()


def test_a_teacher_with_other_tokens_is_refused(
    config: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data.tokenizer", str(Path("configs/demo_data/tiny_tokenizer").resolve()))
    assert train(config, tmp_path / "run", teacher, *words) == 2
    assert "another tokenizer" in capsys.readouterr().err
    with serving(Served(Settings())) as shared:
        assert train(config, tmp_path / "run", f"{shared.address}/v1", "--distill.top-k", "5") == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_an_endpoint_is_asked_until_it_answers_and_what_it_refuses_is_told(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errors import UserError
    from model.tokenizer import Tokenizer
    from train.teacher import PROBE, EndpointTeacher

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    tokenizer = Tokenizer.load(config.parent / "tokenizer")
    statuses, prefix = [503, 429, 500], "token_id:"

    def respond(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "big"}]})
        if statuses:
            return httpx.Response(statuses.pop(0))
        asked = json.loads(request.content)
        ids = tokenizer.encode(PROBE) if asked["prompt"] == PROBE else asked["prompt"]
        tops = [None, *({f"{prefix}{own}": -3.0, f"{prefix}7": -1.0, f"{prefix}9": -2.0} for own in ids[1:])]
        said = {"tokens": [f"{prefix}{one}" for one in ids], "token_logprobs": [None] + [-3.0] * (len(ids) - 1)}
        return httpx.Response(200, json={"choices": [{"logprobs": {**said, "top_logprobs": tops}}]})

    run = make_run(replace(DENSE, vocab_size=512), distill=DistillConfig("http://x/v1", top_k=2))
    client = httpx.Client(transport=httpx.MockTransport(respond))
    teacher = EndpointTeacher(run, tokenizer, client)
    rows = make_rows(make_run(DENSE))
    rows["weights"][0] = 0
    found = teacher.tell(rows)
    there = (rows["segments"] > 0) & (np.arange(8) > 0)[:, None]
    assert (found[IDS][there] == [7, 9]).all() and (found[IDS][~there] == -1).all()
    wanted = [-1, -2, log(1 - np.exp(-1) - np.exp(-2)), -3]
    np.testing.assert_allclose(found[SAID][there], np.broadcast_to(wanted, (there.sum(), 4)), rtol=1e-6)
    statuses.append(400)
    with pytest.raises(UserError, match="refuses to score"):
        teacher.tell(rows)
    prefix = ""
    with pytest.raises(UserError, match="return_tokens_as_token_ids"):
        EndpointTeacher(run, tokenizer, client)
