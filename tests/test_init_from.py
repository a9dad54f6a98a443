"""Law: a run that starts from another model starts with exactly its weights, whatever form and place both have."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from kill_campaign import write_project
from text_fixtures import byte_tokenizer, sentences

from configs.override import apply_overrides, load_config
from configs.run import DataConfig, Run
from errors import UserError
from model.config import ModelConfig, MoEConfig
from model.convert_verb import convert
from model.forward import Batch, forward, unembed
from model.load import load_model, open_model, read_model
from model.quantization import quantize
from model.tokenizer import Tokenizer
from model.tokenizer_extension import extend_tokenizer, spelled_before
from model.tree import Arrays, make_skeleton, unstack
from sharding.mesh import MeshConfig, make_mesh
from train.loop import save, train
from train.main import train_run
from train.setup import find_start, prepare_job
from train.state import is_stacked
from train.upcycle import upcycle

ROOT = Path(__file__).resolve().parent.parent
DENSE = ("--model.moe.num-experts", "0", "--model.moe.selection-bias", "false", "--loss.bias-update-rate", "0")
FAMILY = ("--model.moe.dense-layers=", "--model.moe.selection-bias", "false", "--loss.bias-update-rate", "0")
Words = tuple[str, ...]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with runs `moe`, `stacked` and `dense`, and `hf`, a Hugging Face directory; weights are random."""
    place = tmp_path_factory.mktemp("project")
    write_project(place)
    make_source(config(place), place / "moe")
    make_source(config(place, "--layers", "stacked", "--model.num-layers", "4"), place / "stacked")
    make_source(config(place, *DENSE), place / "dense")
    make_source(config(place, *FAMILY), place / "family")
    convert(open_model(place / "family"), place / "hf", "float32")
    return place


def make_source(run: Run, out: Path) -> None:
    """A run that was saved before its first step, with every array random, norms and biases too."""
    job = prepare_job(run, out, *find_start(run, out, resume=False))
    draw = np.random.default_rng(5)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), job.abstract)
    drawn = {
        part: {n: draw.normal(0, 0.3, a.shape).astype(np.float32) for n, a in getattr(zeros, part).items()}
        for part in ("params", "extra")
    }
    state = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), zeros.replace(**drawn), job.abstract)
    job.data.close()
    save(job, state, 1, None)
    job.checkpoints.close()


def config(place: Path, *words: str) -> Run:
    """The project's config with other values."""
    return apply_overrides(load_config(str(place / "small.py")), list(words))


def begin(run: Run, out: Path) -> tuple[Run, Arrays]:
    """The resolved run, and the weights and biases that it begins with, in list form."""
    job = prepare_job(run, out, *find_start(run, out, resume=False))
    with jax.set_mesh(job.mesh):
        state = job.start()
    job.data.close()
    arrays = {**state.params, **state.extra}
    assert all(a.sharding == job.abstract.params[n].sharding for n, a in state.params.items())
    return job.run, unstack(arrays, job.run.model) if is_stacked(job.run) else arrays


def source_weights(path: Path) -> Arrays:
    """All arrays of a model in list form on one device."""
    source = open_model(path)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return source.weights(dict.fromkeys(make_skeleton(source.config, stacked=False).shapes, one), "float32")


def assert_equal(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(np.asarray(found[name]), np.asarray(expected[name])), name


MESHES = [(), ("--mesh.fsdp", "2", "--mesh.tensor", "2"), ("--mesh.expert", "4", "--accumulate", "1")]


@pytest.mark.parametrize("layers", ["list", "stacked"])
@pytest.mark.parametrize("mesh", MESHES, ids=["one", "fsdp x tensor", "expert"])
@pytest.mark.parametrize("name", ["moe", "stacked", "hf"])
def test_weights_arrive_as_they_are(name: str, layers: str, mesh: Words, place: Path, tmp_path: Path) -> None:
    """From a list, a stack or safetensors, to a list or a stack, on any mesh; selection biases come along."""
    words = ("--init-from", str(place / name), "--init-model", "source", "--layers", layers, *mesh)
    run, found = begin(config_of_source(place, *words), tmp_path / "out")
    expected = source_weights(place / name)
    assert_equal(found, expected)
    assert run.model == open_model(place / name).config
    biases = [array for path, array in found.items() if path.endswith(".bias_E")]
    assert bool(biases) == (name != "hf")
    assert all(np.any(np.asarray(bias)) for bias in biases)


def config_of_source(place: Path, *words: str) -> Run:
    """A config that says nothing of the model."""
    base = config(place)
    run = Run(data=base.data, optimizer=base.optimizer, checkpoint=base.checkpoint, steps=4, validate_every=0)
    return apply_overrides(replace(run, accumulate=2), list(words))


def test_a_config_with_sizes_starts_the_same(place: Path, tmp_path: Path) -> None:
    run, found = begin(config(place, "--init-from", str(place / "moe"), "--data.tokenizer="), tmp_path / "out")
    assert_equal(found, source_weights(place / "moe"))
    assert Tokenizer.load(tmp_path / "out" / "tokenizer").fingerprint == byte_tokenizer().fingerprint
    assert run.model.vocab_size == 320


@pytest.mark.parametrize("how", ["same", "upcycle"])
def test_resume_does_not_need_the_source(how: str, place: Path, tmp_path: Path) -> None:
    """The record holds every size; what stopped goes on to the same bits after the source is gone."""
    words = ["--init-from", str(tmp_path / "source"), "--init-model", "source", "--data.tokenizer=", "--init-how", how]
    if how == "upcycle":
        words += ["--model.moe.num-experts", "4", "--model.moe.intermediate-size", "20"]
    shutil.copytree(place / ("dense" if how == "upcycle" else "moe"), tmp_path / "source")
    run = config_of_source(place, *words, "--checkpoint.every", "1", "--steps", "2")
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    train_run(run, whole, resume=False)
    shutil.rmtree(tmp_path / "source")
    shutil.copytree(whole, torn)
    shutil.rmtree(torn / "checkpoints" / "2")
    train_run(run, torn, resume=True)
    assert_equal(source_weights(torn), source_weights(whole))
    recorded = json.loads((torn / "config.json").read_text())["run"]
    assert recorded["init_model"] == "config"
    assert recorded["model"]["hidden_size"] == 32
    assert recorded["model"]["moe"]["num_experts"] == 4


@pytest.mark.parametrize("layers", ["list", "stacked"])
@pytest.mark.parametrize("dense_layers", [(), ("--model.moe.dense-layers", "0")], ids=["all", "but the first"])
def test_upcycling_takes_the_dense_models_weights(
    layers: str, dense_layers: Words, place: Path, tmp_path: Path
) -> None:
    """What begins is what `upcycle` makes of the dense model and of a run that begins at random."""
    sizes = ("--model.moe.intermediate-size", "20", "--model.moe.shared-intermediate-size", "24")
    words = (*sizes, "--model.moe.dense-layers=", "--mesh.fsdp", "2", "--layers", layers, *dense_layers)
    run = config(place, *words)
    _, random = begin(run, tmp_path / "random")
    _, found = begin(replace(run, init_from=str(place / "dense"), init_how="upcycle"), tmp_path / "upcycled")
    on_one = {name: jax.numpy.asarray(np.asarray(array)) for name, array in random.items()}
    assert_equal(found, upcycle(source_weights(place / "dense"), on_one, 0.5, run.seed))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mesh", MESHES[:2], ids=["one", "fsdp x tensor"])
def test_new_tokens_begin_as_the_mean_of_those_they_replace(
    mesh: Words, tied: bool, place: Path, tmp_path: Path
) -> None:
    base = ("--model.tie-embeddings", str(tied).lower(), "--steps", "1")
    make_source(config(place, *base), tmp_path / "base")
    old = Tokenizer.load(tmp_path / "base" / "tokenizer")
    new = extend_tokenizer(old, sentences(200), 60, tmp_path / "larger", progress=False)
    words = ("--init-from", str(tmp_path / "base"), "--data.tokenizer", str(tmp_path / "larger"), *mesh)
    run, found = begin(config(place, *base, *words), tmp_path / "out")
    _, random = begin(config(place, *base, *words[2:]), tmp_path / "random")
    before = source_weights(tmp_path / "base")
    spelled = spelled_before(old, new)
    assert len(spelled) == 60
    assert run.model.vocab_size == 384 > new.vocab_size
    rows = {"embedding_VD": 0} if tied else {"embedding_VD": 0, "head_DV": 1}
    for name, axis in rows.items():
        ours, theirs, fresh = (np.moveaxis(np.asarray(a[name]), axis, 0) for a in (found, before, random))
        assert np.array_equal(ours[: old.vocab_size], theirs[: old.vocab_size])
        for token, parts in spelled.items():
            np.testing.assert_allclose(ours[token], theirs[list(parts)].mean(axis=0), rtol=1e-5, atol=1e-7)
        assert np.array_equal(ours[new.vocab_size :], fresh[new.vocab_size :])
    assert_equal(
        {name: array for name, array in found.items() if name not in rows},
        {name: array for name, array in before.items() if name not in rows},
    )


def test_the_loss_of_the_reference_is_reported_beside(place: Path, tmp_path: Path) -> None:
    """On the same text it is the validation loss."""
    text = str(place / "a.jsonl")
    run = config(place, "--data.validation", text, "--data.reference", text, "--steps", "1")
    last = train_run(run, tmp_path / "out", resume=False)["last"]
    assert isinstance(last, dict)
    assert last["reference_loss"] == last["validation_loss"]
    assert last["reference_bits_per_byte"] == last["bits_per_byte"]


REFUSED = {
    "width": (
        "--init-from PLACE/moe --model.hidden-size 64 --model.moe.scale 3",
        r"PLACE/moe is of another architecture .* \(model.hidden_size is 32 there and 64 here\): \d+ arrays differ",
    ),
    "experts": ("--init-from PLACE/dense", r"num_experts is 0 there and 4 here\): \d+ arrays differ, the first is"),
    "bias": (
        "--init-from PLACE/moe --model.moe.selection-bias false",
        r"selection_bias is true there and false here\): 1 arrays differ, .*bias_E, \[4\] there and missing here",
    ),
    "routed already": ("--init-from PLACE/moe --init-how upcycle", "PLACE/moe is a mixture of experts already"),
    "dense layers of another width": (
        "--init-from PLACE/dense --init-how upcycle --model.intermediate-size 64",
        r"intermediate_size is 48 there and 64 here\): .*feed_forward.down_FD, \[48, 32\] there and \[64, 32\] here",
    ),
    "nothing to upcycle to": (
        "--init-from PLACE/dense --init-how upcycle --model.moe.num-experts 0 --model.moe.selection-bias false",
        "set model.moe.num_experts",
    ),
    "fewer rows": ("--init-from PLACE/moe --model.vocab-size 300", "320 rows of vocabulary .* is 300"),
    "sizes twice": ("--init-from PLACE/moe --init-model source", "init_model=source takes the sizes of PLACE/moe, and"),
    "no source": ("--init-model source --init-from=", "init_model=source needs init_from"),
    "nothing there": ("--init-from PLACE/nothing", "init_from: PLACE/nothing does not exist; name a run"),
    "share": ("--upcycle-fresh 1.5", r"upcycle_fresh=1.5 must lie in \[0, 1\]"),
    "tokens": ("--init-from PLACE/moe --data.tokenizer PLACE/swapped", "PLACE/swapped are not those that init_from"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_one_sentence(name: str, place: Path, tmp_path: Path) -> None:
    words, sentence = REFUSED[name]
    place_of_other_tokens(place / "swapped")
    base = () if "selection-bias" not in words else ("--loss.bias-update-rate", "0")
    with pytest.raises(UserError) as refusal:
        begin(config(place, *base, *words.replace("PLACE", str(place)).split()), tmp_path / "out")
    told = str(refusal.value).replace(str(place), "PLACE")
    assert not (tmp_path / "out").exists()
    assert re.search(sentence, told), told


def place_of_other_tokens(directory: Path) -> None:
    """The tokenizer of bytes with two of them exchanged."""
    files = byte_tokenizer().files
    data = json.loads(files["tokenizer.json"])
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    Tokenizer(files | {"tokenizer.json": json.dumps(data).encode()}, "swapped").save(directory)


def test_fields_that_change_no_array_are_told(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model.rope.theta", "5000", "--model.max-positions", "64", "--model.moe.every", "1")
    begin(config(place, "--init-from", str(place / "moe"), *words), tmp_path / "out")
    told = capsys.readouterr().err
    assert "not as it was trained: model.rope.theta is 1000000.0 there and 5000.0 here\n" in told


def test_training_goes_on_from_the_source(place: Path, tmp_path: Path) -> None:
    """With a learning rate of next to nothing, the held-out loss is that of the source computed apart."""
    still = ("--optimizer.learning-rate", "1e-12", "--optimizer.weight-decay", "0", "--steps", "1")
    run = config(place, *still, "--init-from", str(place / "hf"), *FAMILY, "--validation-batches", "100")
    job = prepare_job(run, tmp_path / "out", *find_start(run, tmp_path / "out", resume=False))
    rows = list(job.data.validation_batches())
    found = train(job, resume=False)["last"]["validation_loss"]
    model = read_model(open_model(place / "hf"), make_mesh(MeshConfig(), jax.devices()[:1]))
    sums = np.zeros(2)
    score = jax.jit(lambda model, batch: jax.nn.log_softmax(unembed(model, forward(model, Batch(*batch)).hidden_BTD)))
    for batch in rows:
        logprobs = np.asarray(score(model, (batch["tokens"], batch["positions"], batch["segments"])))
        picked = np.take_along_axis(logprobs, batch["targets"][..., None], axis=-1)[..., 0]
        sums += (-picked * batch["weights"]).sum(), batch["weights"].sum()
    assert abs(found - sums[0] / sums[1]) <= 1e-5


def test_a_trained_model_is_fine_tuned_by_a_config_without_sizes(tmp_path: Path) -> None:
    """A published model with sizes and tokenizer of its own: the first loss on stories is of one who knows them."""
    stories = str(ROOT / "configs" / "demo_data" / "pretrain_en_tinystories.jsonl.gz")
    data = DataConfig(sources=(stories,), sequence_length=128, batch_size=4)
    source = ROOT / "tests" / "data" / "stories260K.bin"
    run = Run(data=data, init_from=str(source), init_model="source", steps=1, validate_every=0)
    result = train_run(run, tmp_path / "out", resume=False)["last"]
    assert isinstance(result, dict)
    assert result["loss"] < 2.5  # one that knows nothing has ln 512 = 6.2
    model, tokenizer = load_model(tmp_path / "out")
    assert model.config == open_model(source).config
    assert tokenizer.fingerprint == open_model(source).tokenizer().fingerprint


def test_defaults_are_dense_and_small() -> None:
    """A config that says nothing of the model may still name a source."""
    run = Run(data=DataConfig(sequence_length=8192), init_from="somewhere", init_model="source")
    assert run.model == ModelConfig()
    with pytest.raises(UserError, match=r"model.moe too"):
        replace(run, model=ModelConfig(moe=MoEConfig(num_experts=4, intermediate_size=8)))


@pytest.mark.parametrize("layers", ["list", "stacked"])
def test_a_language_model_becomes_one_with_labels(
    layers: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """All but the head, which begins at random and small; and what is one already is taken whole."""
    words = ("--init-from", str(place / "stacked"), "--init-model", "source", "--layers", layers)
    run, found = begin(config_of_source(place, *words, "--model.num-labels", "1"), tmp_path / "out")
    assert "its head is left out, and one of model.num_labels=1 begins at random" in capsys.readouterr().err
    head, expected = np.asarray(found.pop("head_DV")), source_weights(place / "stacked")
    assert run.model == replace(open_model(place / "stacked").config, num_labels=1)
    expected.pop("head_DV", None)
    assert_equal(found, expected)
    assert head.shape == (run.model.hidden_size, 1) and 0 < head.std() < 2 / run.model.hidden_size**0.5
    if layers == "list":
        make_source(replace(run, init_from=""), tmp_path / "labelled")
        again = config_of_source(place, "--init-from", str(tmp_path / "labelled"), "--init-model", "source")
        taken, whole = begin(again, tmp_path / "again")
        assert taken.model == run.model
        assert_equal(whole, source_weights(tmp_path / "labelled"))
        with pytest.raises(UserError, match=r"model.num_labels is 1 there and 0 here.*head_DV, \[\d+, 1\] there"):
            begin(replace(again, model=replace(run.model, num_labels=0), init_model="config"), tmp_path / "no")


@pytest.mark.parametrize("layers", ["list", "stacked"])
def test_a_vocabulary_grows_before_it_is_rounded(layers: str, place: Path, tmp_path: Path) -> None:
    """Beside adapters, in 8 bits: old rows are the nearest to the source's, new ones those of the run alone."""
    config = open_model(place / "moe").config
    rows = config.vocab_size + 64
    words = ("--model.vocab-size", str(rows), "--lora.rank", "2", "--lora.base", "int8", "--layers", layers)
    _, found = begin(config_of(place, *words), tmp_path / "out")
    source = source_weights(place / "moe")
    for name, over in (("embedding_VD", (1,)), ("head_DV", (0,))):
        wanted = quantize(source[name], over)
        values, scale = (np.asarray(found[f"{name}.{part}"]) for part in ("values", "scale"))
        assert values.shape[over[0] - 1] == rows and values.dtype == np.int8
        cut = np.s_[: config.vocab_size] if name == "embedding_VD" else np.s_[:, : config.vocab_size]
        np.testing.assert_array_equal(values[cut], wanted.values)
        np.testing.assert_array_equal(scale[cut], wanted.scale)
        assert np.abs(values).max() == 127 and (scale > 0).all()
    with pytest.raises(UserError, match=r"set lora\.rank 0"):
        config_of(place, "--lora.rank", "2", "--init-how", "upcycle")


def config_of(place: Path, *words: str) -> Run:
    """A config that starts from the run `moe`."""
    return config(place, "--init-from", str(place / "moe"), *words)
