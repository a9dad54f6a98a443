"""Law: transformers and we give a text the same scores, from its files and from ours."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from model.convert_verb import convert
from model.load import open_model, read_model
from sharding.mesh import MeshConfig, make_mesh

from . import carry, hf_families

pytestmark = [
    pytest.mark.skipif(os.environ.get("QMAX_PARITY") != "1", reason="./run.sh test --parity"),
    # What torch and transformers warn of is theirs to mend.
    pytest.mark.filterwarnings("default"),
]

TOLERANCE = 1e-4
PAD = 5
NAMES = ["qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "llama", "gpt_oss", "deepseek_v3"]


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_a_text(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of 12 and 7 tokens; transformers finds the end of the second by its padding."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model_class, config_class, options = hf_families.FAMILIES[name]
    stem = {"qwen3_5": "Qwen3_5Text"}.get(name, model_class.removesuffix("ForCausalLM"))
    labels = 1 if name == "qwen3" else 3
    own = f"{stem}ForSequenceClassification", config_class, {**options, "num_labels": labels, "pad_token_id": PAD}
    monkeypatch.setitem(hf_families.FAMILIES, name, own)
    built = hf_families.build(name, 3)
    hf_families.save(built, tmp_path / "theirs")
    source = open_model(tmp_path / "theirs")
    assert source.config.num_labels == labels
    convert(source, tmp_path / "ours")
    again = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    )
    assert type(again) is type(built) and again.config.num_labels == labels

    tokens_BT, lengths = carry.example(source.config, 3)
    tokens_BT = np.where(tokens_BT == PAD, PAD + 1, tokens_BT)
    real_BT = np.arange(tokens_BT.shape[1]) < lengths[:, None]
    model = read_model(source, make_mesh(MeshConfig()), dtype="float32")
    scores_BTV = np.asarray(carry.logits(model, carry.batch_of(tokens_BT, lengths)))
    ours = scores_BTV[np.arange(len(lengths)), lengths - 1]
    for theirs in (built, again.eval()):
        found = hf_families.logits(theirs, np.where(real_BT, tokens_BT, PAD), real_BT.astype(np.int64))
        assert found.shape == (2, labels)
        assert np.abs(found - ours).max() <= TOLERANCE
