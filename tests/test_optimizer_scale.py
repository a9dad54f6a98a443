"""Laws of the optimizer at scale: moments in bfloat16 and cut over `data`, sums of gradients, rounding at random."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from kill_campaign import assert_same, records, write_project
from test_init_from import source_weights
from test_resume import copy_until

import qmax
from configs.run import OptimizerConfig
from errors import UserError
from model.load import load_model
from model.tree import Arrays
from sharding.mesh import AXES, MeshConfig, make_mesh
from sharding.rules import batch_sharding
from tests.tiny import DENSE, MOE, Trainer, make_rows, make_run
from train.hlo import read_program
from train.optimizer import is_matrix, make_optimizer, schedule
from train.rounding import round_at_random, store
from train.state import flatten, make_skeleton
from train.step import accumulate

ONE = make_mesh(MeshConfig())
BF16 = np.dtype(ml_dtypes.bfloat16)
STEADY = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, clip_norm=0.0, schedule="constant")
DATA, THREE = MeshConfig(data=4), MeshConfig(data=2, fsdp=2, expert=2)


def moments(state: Any) -> dict[str, jax.Array]:
    """Arrays of the optimizer that are shaped like weights, by path."""
    flat = flatten(state)
    return {
        name: leaf for name, leaf in flat.items() if name.startswith("opt.") and leaf.ndim and "ns_coeffs" not in name
    }


# ---- moments in bfloat16 -----------------------------------------------------
def random_like(arrays: Arrays, seed: int) -> Arrays:
    draw = np.random.default_rng(seed)
    return {name: jnp.asarray(draw.normal(size=a.shape).astype(np.float32)) for name, a in arrays.items()}


def several_updates(optimizer: optax.GradientTransformation, params: Arrays, steps: int = 5) -> tuple[Arrays, Any]:
    """Parameters and state after updates by gradients that are random."""
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(random_like(params, step), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params, state


def test_float32_moments_are_those_of_optax() -> None:
    skeleton = make_skeleton(make_run(DENSE))
    params = random_like({name: jnp.zeros(shape) for name, shape in skeleton.shapes.items()}, 9)
    mask = {name: is_matrix(skeleton.axes[name]) for name in params}
    rate, decay = schedule(STEADY, 100, STEADY.learning_rate), STEADY.weight_decay
    plain = optax.adamw(rate, b1=STEADY.beta1, b2=STEADY.beta2, eps=STEADY.eps, weight_decay=decay, mask=mask)
    found = several_updates(make_optimizer(STEADY, 100, skeleton), params)
    expected = several_updates(plain, params)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, expected)))


def test_bfloat16_moments_are_stored_and_nothing_more() -> None:
    """By hand in numpy: each moment is rounded when it is stored, and the update sees it before that."""
    config = replace(STEADY, moment_dtype="bfloat16", weight_decay=0.0)
    skeleton = make_skeleton(make_run(DENSE))
    params = random_like({name: jnp.zeros(shape) for name, shape in skeleton.shapes.items()}, 9)
    found, state = several_updates(make_optimizer(config, 100, skeleton), params)
    b1, b2 = np.float32(config.beta1), np.float32(config.beta2)
    for name in params:
        weight = np.asarray(params[name])
        mu, nu = np.zeros(weight.shape, BF16), np.zeros(weight.shape, BF16)
        for step in range(5):
            gradient = np.asarray(random_like(params, step)[name])
            mean = (1 - b1) * gradient + b1 * mu.astype(np.float32)
            square = (1 - b2) * gradient**2 + b2 * nu.astype(np.float32)
            corrected = mean / (1 - b1 ** (step + 1)), square / (1 - b2 ** (step + 1))
            weight = weight - np.float32(config.learning_rate) * corrected[0] / (np.sqrt(corrected[1]) + config.eps)
            mu, nu = mean.astype(BF16), square.astype(BF16)
        # Where the sums of XLA and numpy differ in the last bit of float32, a few moments fall to the other neighbour.
        assert np.mean(~np.isclose(found[name], weight, rtol=1e-4, atol=1e-5)) < 0.01, name
        np.testing.assert_allclose(found[name], weight, rtol=0, atol=1e-3)
        stored = [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if f"['{name}']" in jax.tree_util.keystr(path)
        ]
        assert [leaf.dtype for leaf in stored] == [BF16, BF16]
        for ours, theirs in zip(stored, (mu, nu), strict=True):
            assert np.mean(np.asarray(ours) != theirs) < 0.01


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.full)])
def test_every_moment_is_stored_in_bfloat16(name: Any) -> None:
    runs = [make_run(MOE, optimizer=replace(STEADY, name=name, moment_dtype=kind)) for kind in ("float32", "bfloat16")]
    exact, coarse = (Trainer(run, ONE) for run in runs)
    for step in range(3):
        rows = make_rows(exact.run, step)
        assert abs(exact(rows)["loss"] - coarse(rows)["loss"]) < 0.02
    assert {leaf.dtype for leaf in moments(exact.state).values()} == {np.dtype("float32")}
    assert {leaf.dtype for leaf in moments(coarse.state).values()} == {BF16}
    coefficients = [leaf.dtype for path, leaf in flatten(coarse.state).items() if "ns_coeffs" in path]
    assert coefficients == [np.dtype("float32")] * (name == "muon")


# ---- moments cut over data ---------------------------------------------------
def part_sizes(cut: Trainer, whole: Trainer) -> dict[str, tuple[int, int]]:
    """Bytes on a device of each matrix and of its moments, of one trainer and of another."""
    matrices = tuple(f".{name}" for name, axes in cut.skeleton.axes.items() if is_matrix(axes))
    ours, theirs = (
        moments(one.state) | {f"params.{name}": leaf for name, leaf in one.state.params.items()} for one in (cut, whole)
    )
    pairs = ((name, (ours[name], leaf)) for name, leaf in theirs.items())
    found = {
        name: tuple(array.addressable_shards[0].data.nbytes for array in both)
        for name, both in pairs
        if name.endswith(matrices)
    }
    assert len(found) >= 2 * len(matrices)
    return found


def on_mesh(mesh: MeshConfig, start: Trainer, **changes: Any) -> Trainer:
    """The run of `start` on a mesh, from its weights."""
    return Trainer(replace(start.run, mesh=mesh, **changes), make_mesh(mesh), start.state)


CASES = [
    pytest.param({}, DATA, "adamw", marks=pytest.mark.full),
    pytest.param({}, THREE, "adamw", marks=pytest.mark.full),
    ({"layers": "stacked", "accumulate": 2}, DATA, "adamw"),
    pytest.param({"layers": "stacked"}, THREE, "muon", marks=pytest.mark.full),
    ({"layers": "stacked"}, replace(THREE, cut_over_data=True), "adamw"),
]


@pytest.mark.parametrize(("form", "mesh", "name"), CASES, ids=str)
@pytest.mark.full
def test_moments_cut_over_data_change_no_result(form: dict[str, Any], mesh: MeshConfig, name: Any) -> None:
    optimizer = OptimizerConfig(name=name, learning_rate=1e-3, warmup_steps=1)
    one = Trainer(make_run(MOE, optimizer=optimizer, **form), ONE)
    cut, whole = (on_mesh(mesh, one, optimizer=replace(optimizer, shard_over_data=over)) for over in (True, False))
    for path, (part, all_of) in part_sizes(cut, whole).items():
        assert part * mesh.data == all_of or (mesh.cut_over_data and part == all_of), path
    for step in range(3):
        rows = make_rows(one.run, step)
        expected = one(rows)
        found = cut(jax.device_put(rows, batch_sharding(cut.mesh)))
        for metric in ("loss", "gradient_norm", "parameter_norm", "update_norm"):
            assert abs(found[metric] - expected[metric]) <= 2e-5 * abs(expected[metric]), (step, metric)
    for name, value in one.state.params.items():
        # Three updates of 1e-3; near a gradient of zero Adam turns rounding into a whole one.
        difference = np.abs(np.asarray(cut.state.params[name]) - np.asarray(value))
        assert difference.max() <= 1e-3 and difference.mean() <= 1e-6, name


def test_what_does_not_divide_lies_as_its_weight() -> None:
    mesh = MeshConfig(data=8)
    narrow = replace(DENSE, hidden_size=20)
    run = make_run(narrow, mesh=mesh)
    trainer = Trainer(run, make_mesh(mesh))
    assert all(leaf.sharding.is_fully_replicated for leaf in moments(trainer.state).values())
    rows = jax.device_put(make_rows(run), batch_sharding(trainer.mesh))
    assert np.isfinite(trainer(rows)["loss"])


def test_the_program_gathers_new_weights_over_data() -> None:
    """On a CPU XLA keeps an all-reduce and cuts its result, so that bytes of gradients are what they were.

    For a TPU the compiler makes reduce-scatters of some of them, as `qmax plan` shows.
    """
    found = {}
    for over_data in (True, False):
        run = make_run(DENSE, mesh=DATA, optimizer=replace(STEADY, shard_over_data=over_data))
        trainer = Trainer(run, make_mesh(DATA))
        rows = jax.device_put(make_rows(trainer.run), batch_sharding(trainer.mesh))
        with jax.set_mesh(trainer.mesh):
            text = trainer.step.lower(trainer.state, rows).compile().as_text()
        assert text is not None
        program = read_program(text, dict(zip(AXES, DATA.shape, strict=True)))
        kinds = {one.kind: one.bytes for one in program.collectives if one.axes == ("data",)}
        assert all(one.axes == ("data",) for one in program.collectives)
        found[over_data] = kinds
    weights = sum(a.nbytes for n, a in trainer.state.params.items() if is_matrix(trainer.skeleton.axes[n]))
    assert found[False]["all-reduce"] >= weights > found[False].get("all-gather", 0)
    assert found[True]["all-gather"] >= weights
    # Each gradient is reduced once, by whatever means: nothing is reduced again for the update.
    assert found[True].get("all-reduce", 0) + found[True].get("reduce-scatter", 0) <= found[False]["all-reduce"] * 1.05


# ---- sums of gradients -------------------------------------------------------
def sums(trainer: Trainer, dtype: str) -> Arrays:
    rows = jax.tree.map(jnp.asarray, make_rows(trainer.run))

    def of(state: Any) -> Arrays:
        return accumulate(8, trainer.skeleton, trainer.loss, state, rows, dtype=dtype)[0]

    return jax.jit(of)(trainer.state)


def test_gradients_are_summed_in_the_type_asked_for() -> None:
    trainer = Trainer(make_run(DENSE, accumulate=8), ONE)
    exact, coarse = (sums(trainer, dtype) for dtype in ("float32", "bfloat16"))
    for name, value in exact.items():
        assert value.dtype == np.float32 and coarse[name].dtype == BF16
        difference = np.abs(np.asarray(coarse[name], np.float32) - np.asarray(value)).max()
        assert 0 < difference <= 8 * 2.0**-8 * np.abs(np.asarray(value)).max(), name
    coarse_run = Trainer(replace(trainer.run, accumulate_dtype="bfloat16"), ONE)
    rows = make_rows(trainer.run)
    a, b = trainer(rows), coarse_run(rows)
    assert a["loss"] == b["loss"] and np.isclose(a["gradient_norm"], b["gradient_norm"], rtol=1e-2)
    assert a["gradient_norm"] != b["gradient_norm"]


def test_bfloat16_weights_are_summed_in_float32() -> None:
    trainer = Trainer(make_run(DENSE, accumulate=8, parameter_dtype="bfloat16"), ONE)
    assert {leaf.dtype for leaf in sums(trainer, "float32").values()} == {np.dtype("float32")}


# ---- rounding at random --------------------------------------------------------
def rounded(x: Any, seed: int = 0) -> np.ndarray:
    x = jnp.asarray(x, jnp.float32)
    bits = jax.random.bits(jax.random.key(seed), x.shape, jnp.uint16)
    return np.asarray(jax.jit(round_at_random)(x, bits))


def test_rounding_at_random_has_no_bias() -> None:
    """The mean of many roundings is the number, within four standard errors; each is one of two neighbours."""
    draws = 1 << 16
    tiny = float(ml_dtypes.finfo(BF16).smallest_subnormal)
    for x in (1.0 + 2.0**-10, -3.14159, 1e-3, 0.9999, 255.9, 1e30, -7e-39, 0.3 * tiny):
        exact = float(np.float32(x))
        found = rounded(np.full(draws, x), seed=3).astype(np.float64)
        low, high = np.unique(found) if len(np.unique(found)) == 2 else (found[0], found[0])
        assert low < exact < high and high == float(np.nextafter(BF16.type(low), BF16.type(np.inf)))
        assert abs(found.mean() - exact) <= 4 * found.std() / np.sqrt(draws)


def test_what_bfloat16_holds_is_left_alone() -> None:
    """Every bfloat16 there is, infinities and NaN among them, whatever the bits."""
    every = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    exact = every.astype(np.float32)
    for bits in (0, 1, 0xFFFF):
        found = np.asarray(jax.jit(round_at_random)(exact, np.full(exact.shape, bits, np.uint16)))
        wide = found.astype(np.float32)
        assert np.array_equal(np.isnan(wide), np.isnan(exact))
        assert np.array_equal(found[~np.isnan(wide)].view(np.uint16), every[~np.isnan(exact)].view(np.uint16))
    odd = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001], np.uint32).view(np.float32)
    assert np.isnan(np.asarray(jax.jit(round_at_random)(odd, np.full(4, 0xFFFF, np.uint16)))).all()
    largest = np.array([np.finfo(np.float32).max], np.float32)
    assert np.asarray(round_at_random(jnp.asarray(largest), jnp.zeros(1, jnp.uint16)))[0] == ml_dtypes.finfo(BF16).max


def test_bits_depend_on_seed_step_path_and_place_and_on_no_mesh() -> None:
    x = jnp.full((64, 32), 1.0 + 2.0**-8, jnp.float32)
    like = jnp.zeros(x.shape, jnp.bfloat16)

    def at(seed: int, step: int, name: str, sharding: Any = None) -> np.ndarray:
        given = x if sharding is None else jax.device_put(x, sharding)
        run = jax.jit(lambda given, step: store({name: given}, {name: like}, seed, step)[name])
        found = run(given, jnp.int32(step))
        assert sharding is None or found.sharding.is_equivalent_to(sharding, 2)
        return np.asarray(found)

    first = at(0, 7, "a")
    assert 0.4 < np.mean(first == 1) < 0.6  # half way between two numbers, each element on its own
    assert np.array_equal(first, at(0, 7, "a"))
    for other in (at(1, 7, "a"), at(0, 8, "a"), at(0, 7, "b")):
        assert 0.4 < np.mean(first == other) < 0.6
    mesh = make_mesh(THREE)
    for spec in (("data", ("fsdp", "expert")), (None, "expert"), (("expert", "data", "fsdp"), None)):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        assert np.array_equal(first, at(0, 7, "a", sharding))


@pytest.mark.full
def test_what_is_no_matrix_stays_float32() -> None:
    biased = replace(MOE, moe=replace(MOE.moe, bias=True), qkv_bias=True)
    trainer = Trainer(make_run(biased, parameter_dtype="bfloat16"), ONE)
    trainer(make_rows(trainer.run))
    coarse = {name.rpartition(".")[2] for name, leaf in trainer.state.params.items() if leaf.dtype == BF16}
    exact = {name.rpartition(".")[2] for name, leaf in trainer.state.params.items() if leaf.dtype == np.float32}
    assert coarse >= {"embedding_VD", "head_DV", "q_DNH", "o_NHD", "gate_EDF", "down_EDF", "gate_DF"}
    expert = {"gate_bias_EF", "up_bias_EF", "down_bias_ED"}
    assert (
        exact
        == {"weight", "router_DE", "router_bias_E", "shared_gate_D", "q_bias_NH", "k_bias_KH", "v_bias_KH"} | expert
    )
    assert {leaf.dtype for leaf in moments(trainer.state).values()} == {np.dtype("float32")}


def test_updates_below_half_a_step_still_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to the nearest a small learning rate trains norms and router alone; at random, all, like float32."""
    optimizer = OptimizerConfig(learning_rate=2e-4, warmup_steps=0, schedule="constant", weight_decay=0.0)
    run = make_run(DENSE, optimizer=optimizer)
    start = Trainer(make_run(DENSE, optimizer=optimizer, parameter_dtype="bfloat16"), ONE)
    begin = jax.tree.map(np.asarray, start.state.params)
    wide = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in start.state.params.items()}
    exact = Trainer(run, ONE, replace(start.state, params=wide))
    with monkeypatch.context() as patch:
        patch.setattr("train.rounding.round_at_random", lambda x, bits: x.astype(jnp.bfloat16))
        nearest = Trainer(start.run, ONE, start.state)
        nearest(make_rows(run))  # compiled while the other rounding is in place
        nearest.state = jax.device_put(start.state)
        losses = {"nearest": [nearest(make_rows(run))["loss"] for _ in range(60)]}
    losses |= {"random": [start(make_rows(run))["loss"] for _ in range(60)]}
    losses |= {"exact": [exact(make_rows(run))["loss"] for _ in range(60)]}
    gap = {kind: abs(losses[kind][-1] - losses["exact"][-1]) for kind in ("nearest", "random")}
    assert losses["exact"][0] - losses["exact"][-1] > 0.1, losses["exact"][-1]
    assert gap["random"] < 0.2 * gap["nearest"], gap
    name = "stacks.0.blocks.0.feed_forward.down_FD"
    moved = {
        kind: (np.asarray(trainer.state.params[name], np.float32) - begin[name].astype(np.float32)).ravel()
        for kind, trainer in (("nearest", nearest), ("random", start), ("exact", exact))
    }
    # How far each went in the direction that float32 took.
    share = {kind: moved[kind] @ moved["exact"] / (moved["exact"] @ moved["exact"]) for kind in moved}
    assert 0.8 < share["random"] < 1.2, share


@pytest.mark.full
def test_bfloat16_weights_are_the_same_on_any_mesh() -> None:
    one = Trainer(make_run(MOE, parameter_dtype="bfloat16", optimizer=STEADY), ONE)
    many = on_mesh(THREE, one)
    for step in range(3):
        rows = make_rows(one.run, step)
        a, b = one(rows), many(jax.device_put(rows, batch_sharding(many.mesh)))
        assert abs(a["loss"] - b["loss"]) <= 2e-4 * a["loss"]
    for name, value in one.state.params.items():
        # The same bits are added to nearly the same numbers: few fall to the other side.
        assert np.mean(np.asarray(value) != np.asarray(many.state.params[name])) < 0.02 or value.dtype != BF16, name


# ---- runs ------------------------------------------------------------------------
SCALED = (
    *("--parameter-dtype", "bfloat16", "--accumulate-dtype", "bfloat16", "--optimizer.moment-dtype", "bfloat16"),
    *("--steps", "8", "--checkpoint.every", "4", "--checkpoint.keep", "9"),
)


@pytest.mark.full
def test_a_run_in_bfloat16_resumes_moves_and_is_read(tmp_path: Any) -> None:
    """Saved, gone on with to the same bits, moved to another mesh, generated from, and started from."""
    config = write_project(tmp_path / "project")

    def train(out: str, *words: str) -> int:
        return qmax.main(["train", str(config), "--out", str(tmp_path / out), *SCALED, *words])

    assert train("whole") == 0
    copy_until(tmp_path / "whole", 4, tmp_path / "torn")
    copy_until(tmp_path / "whole", 4, tmp_path / "moved")
    assert train("torn", "--resume") == 0
    assert_same(tmp_path / "torn", tmp_path / "whole")
    mesh = ("--mesh.data", "2", "--mesh.fsdp", "2")
    assert train("moved", "--resume", *mesh) == 0
    losses = [[record["loss"] for record in records(tmp_path / out)] for out in ("moved", "whole")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-3)

    read = source_weights(tmp_path / "whole")
    assert {leaf.dtype for leaf in read.values()} == {np.dtype("float32")}
    matrix = np.asarray(read["embedding_VD"])
    assert np.array_equal(matrix, matrix.astype(BF16).astype(np.float32))
    model, tokenizer = load_model(tmp_path / "whole")
    assert model.embedding_VD[...].shape[0] >= tokenizer.vocab_size
    assert train("after", "--init-from", str(tmp_path / "whole"), "--layers", "stacked", *mesh) == 0
    assert records(tmp_path / "after")[0]["loss"] < losses[1][0]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the cat sat"}\n')
    assert qmax.main(["score", str(tmp_path / "after"), "--input", str(rows), "--output", str(tmp_path / "s")]) == 0
    words = ["generate", str(tmp_path / "after"), "--prompt", "the", "--max-tokens", "4"]
    assert qmax.main(words) == 0
    assert train("torn", "--resume", "--steps", "9", "--parameter-dtype", "float32") == 2


# ---- what cannot be ----------------------------------------------------------------
def test_what_would_lose_its_updates_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer.beta2=0.999 .* at most 0.996 goes with"):
        OptimizerConfig(beta2=0.999, moment_dtype="bfloat16")
    with pytest.raises(UserError, match=r"optimizer.muon_momentum=0.998"):
        OptimizerConfig(name="muon", muon_momentum=0.998, moment_dtype="bfloat16")
    assert OptimizerConfig(muon_momentum=0.998, beta2=0.99, moment_dtype="bfloat16")
    run = make_run(DENSE)
    data = replace(run.data, batch_size=256)
    with pytest.raises(UserError, match=r"accumulate=256 with accumulate_dtype=bfloat16"):
        replace(run, data=data, accumulate=256, accumulate_dtype="bfloat16")
    assert replace(run, data=data, accumulate=256).accumulate == 256
