"""Law: a model with labels is the language model with another head, there and back through transformers' files."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qmax
from errors import UserError
from model.config import ModelConfig
from model.convert_verb import convert
from model.forward import continuation, forward, unembed
from model.hf.families import FAMILIES, family_of_config
from model.load import load_model, open_model, read_model
from model.lora_config import LoraConfig
from model.transformer import Transformer
from model.tree import Skeleton, make_skeleton
from sharding.mesh import MeshConfig, make_mesh
from tests.test_hf import CONFIGS, read, settings_changed, write
from tests.tiny import DENSE, MOE, make_rows, make_run
from train.losses import next_token
from train.optimizer import muon_dimensions

WITH_LABELS = {
    name: replace(config, num_labels=3, mtp_layers=0)
    for name, config in CONFIGS.items()
    if next(family for family in FAMILIES if family.model_type == name).classifier
}


@pytest.mark.parametrize("config", [DENSE, replace(DENSE, tie_embeddings=True), MOE], ids=["dense", "tied", "moe"])
def test_the_arithmetic_is_that_of_the_module(config: ModelConfig) -> None:
    """Beside the embedding there are 32 weights for each label, never the embedding itself."""
    labelled = replace(config, num_labels=5)
    skeleton = make_skeleton(labelled, stacked=False)
    assert labelled.parameters_total == sum(prod(skeleton.shapes[name]) for name in skeleton.weights)
    untied = replace(config, tie_embeddings=False)
    assert labelled.parameters_total - untied.parameters_total == 32 * (5 - 64)
    assert labelled.flops_per_token(7) - untied.flops_per_token(7) == 2 * 32 * (5 - 64)
    assert skeleton.axes["head_DV"] == ("embed", None) and skeleton.shapes["head_DV"] == (32, 5)


def test_scores_are_products_with_the_head() -> None:
    config = replace(DENSE, tie_embeddings=True, num_labels=2)
    model = jax.jit(lambda: Transformer(config, jax.random.key(0)))()
    assert model.head_DV is not None and 0 < np.std(model.head_DV[...]) < 2 / 32**0.5
    hidden_BTD = forward(model, continuation(jnp.arange(6)[None], jnp.zeros(1, jnp.int32))).hidden_BTD
    by_hand = np.asarray(hidden_BTD, np.float64) @ np.asarray(model.head_DV[...], np.float64)
    np.testing.assert_allclose(unembed(model, hidden_BTD), by_hand, atol=1e-5)


@pytest.mark.parametrize("name", WITH_LABELS)
def test_what_is_written_is_read_back(name: str, tmp_path: Path) -> None:
    config = WITH_LABELS[name]
    weights = write(tmp_path / "a", config)
    source, found = open_model(tmp_path / "a"), read(tmp_path / "a")
    assert source.config.num_labels == 3 and source.config.layout == name
    assert found.keys() == weights.keys()
    assert all(np.array_equal(found[key], weights[key]) for key in weights)
    settings = json.loads((tmp_path / "a/config.json").read_text())
    assert settings["architectures"] == [family_of_config(config).classifier] and settings["num_labels"] == 3
    assert settings["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    settings_changed(tmp_path / "a", pad_token_id=7)
    assert convert(open_model(tmp_path / "a"), tmp_path / "b")["architecture"] == settings["architectures"][0]
    assert json.loads((tmp_path / "b/config.json").read_text())["pad_token_id"] == 7


def test_two_labels_go_without_saying(tmp_path: Path) -> None:
    write(tmp_path / "a", replace(CONFIGS["qwen3"], num_labels=2))
    settings_changed(tmp_path / "a", num_labels=None, id2label=None, label2id=None)
    assert open_model(tmp_path / "a").config.num_labels == 2
    read(tmp_path / "a")
    settings_changed(tmp_path / "a", id2label={"0": "good"})
    with pytest.raises(UserError, match=r"score\.weight \(2, 16\) instead of \(1, 16\)"):
        read(tmp_path / "a")


def test_it_writes_no_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "a", replace(CONFIGS["qwen3"], num_labels=1))
    with pytest.raises(UserError, match=r"is a model for sequence classification \(num_labels=1\)"):
        load_model(tmp_path / "a")
    (tmp_path / "in.jsonl").write_text('{"tokens": [1, 2]}\n')
    score = ["score", str(tmp_path / "a"), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]
    for words in (["generate", str(tmp_path / "a"), "--prompt", "a"], ["chat", str(tmp_path / "a")], score):
        assert qmax.main(words) == 2, words
        assert "is a model for sequence classification" in capsys.readouterr().err, words
    model = read_model(open_model(tmp_path / "a"), make_mesh(MeshConfig()))
    run = make_run(model.config)
    none = jnp.zeros(())
    with pytest.raises(UserError, match="predicts no tokens"):
        next_token(model, make_rows(run), none, none, run.loss)  # pyright: ignore[reportArgumentType]


def test_what_cannot_be_is_refused() -> None:
    for changes, said in (
        ({"num_labels": -1}, "must not be negative"),
        ({"num_labels": 1, "mtp_layers": 1}, "mtp_lay"),
    ):
        with pytest.raises(UserError, match=said):
            replace(DENSE, **changes)
    with pytest.raises(UserError, match="not exported"):
        family_of_config(replace(CONFIGS["olmoe"], num_labels=1))


def test_beside_adapters_the_head_is_trained() -> None:
    config = replace(DENSE, num_labels=1)
    skeleton = Skeleton(jax.eval_shape(lambda: Transformer(config, jax.random.key(0), lora=LoraConfig(rank=2))))
    assert {name for name in skeleton.weights if not name.endswith((".a", ".b"))} == {"head_DV"}
    assert muon_dimensions("head_DV", skeleton.axes["head_DV"], 2) is None
