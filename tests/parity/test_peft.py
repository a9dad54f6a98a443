"""Law: PEFT computes with an exported adapter what we compute with the run, and merging is what both mean.

`QMAX_PARITY_SEED=N` repeats a run: every test prints the seed it used.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import qmax
from model.load import open_model, read_model
from model.tokenizer import Tokenizer
from sharding.mesh import MeshConfig, make_mesh

from . import carry, hf_families

pytestmark = [
    pytest.mark.skipif(os.environ.get("QMAX_PARITY") != "1", reason="./run.sh test --parity"),
    # What torch and transformers warn of is theirs to mend.
    pytest.mark.filterwarnings("default"),
]

SEED = int(os.environ.get("QMAX_PARITY_SEED") or secrets.randbits(31))
TOLERANCE = 1e-4
NAMES = ["qwen3", "qwen2", "llama", "qwen3_5"]
"""One with gates and queries in one matrix, whose rank is that of both."""


def trained(name: str, base: Path, out: Path, words: list[str]) -> None:
    """A run of two steps with adapters, from a model of transformers."""
    said = ["train", "configs/tiny.py", "--init-from", str(base), "--init-model", "source", "--steps", "2"]
    # The model has 128 rows, fewer than the tokenizer of the corpus has tokens: bytes alone are a vocabulary.
    said += ["--lora.rank", "3", "--lora.alpha", "7", "--optimizer.learning-rate", "0.1", *words]
    assert qmax.main([*said, "--out", str(out)]) == 0, name
