"""Law: from the same weights, the model gives transformers' logits, loss and every gradient (stored in goldens/).

float32; logits within 1e-5; a gradient within 1e-5 of its leaf's largest magnitude.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parity import carry, hf_models
from parity.make_goldens import sampled

FOLDER = Path(__file__).parent / "goldens"
TOLERANCE = 1e-5


def test_every_family_has_a_golden():
    assert {path.stem for path in FOLDER.glob("*.npz")} == set(hf_models.CASES)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2 * 2**20


@pytest.mark.parametrize("name", hf_models.CASES)
def test_training_step(name: str):
    golden, config = np.load(FOLDER / f"{name}.npz"), hf_models.CASES[name].config
    tokens_BT, lengths = carry.example(config, int(golden["seed"]))
    assert (tokens_BT == golden["tokens"]).all()
    assert (lengths == golden["lengths"]).all()
    rows = carry.batch_of(tokens_BT, lengths)
    # One family is stacked and rematerialised here; that both forms agree is a law of its own.
    form = {"stacked": True, "remat": "block"} if name == "qwen3_moe_alternating_yarn" else {}
    model = carry.build(config, carry.draw(config, int(golden["seed"])), **form)

    real_BT = rows["segments"] > 0
    difference = np.abs(np.asarray(carry.logits(model, rows)) - golden["logits"])[real_BT]
    assert difference.max() <= TOLERANCE

    loss, gradients = carry.training_step(model, rows)
    assert loss == pytest.approx(float(golden["loss"]), abs=TOLERANCE)
    assert list(golden["names"]) == sorted(gradients)
    start = 0
    for leaf, norm, largest in zip(golden["names"], golden["norms"], golden["maxima"], strict=True):
        ours = sampled(gradients[leaf])
        theirs = golden["samples"][start : start + ours.size]
        start += ours.size
        assert np.abs(ours - theirs).max() <= TOLERANCE * largest, leaf
        assert np.linalg.norm(gradients[leaf].astype(np.float64)) == pytest.approx(norm, rel=TOLERANCE), leaf
        assert np.abs(gradients[leaf]).max() == pytest.approx(largest, rel=TOLERANCE), leaf
    assert start == golden["samples"].size


@pytest.mark.parametrize("name", hf_models.CASES)
def test_carrying_weights_there_and_back_changes_nothing(name: str):
    config = hf_models.CASES[name].config
    weights = carry.draw(config, seed=1)
    assert sum(array.size for array in weights.values()) == config.parameters_total
    back = carry.to_hf(carry.to_ours(weights, config), config)
    assert back.keys() == weights.keys()
    assert all((back[leaf] == weights[leaf]).all() for leaf in weights)
