"""Writes tests/goldens/*.npz from transformers: `python -m tests.parity.make_goldens`, in the parity environment.

A file holds what transformers gave, and the seeds from which `carry` draws the weights and the tokens again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import carry, hf_models

SEED = 20_261_125
SAMPLES = 251
"""Entries kept of a larger gradient, evenly spaced; a prime, so that they do not fall into one column."""
FOLDER = Path(__file__).parent.parent / "goldens"


def sampled(array: np.ndarray) -> np.ndarray:
    """The entries of an array that a golden keeps: all, or SAMPLES of them."""
    if array.size <= SAMPLES:
        return array.reshape(-1)
    return array.reshape(-1)[np.linspace(0, array.size - 1, SAMPLES).astype(int)]


def make(name: str, case: hf_models.Case, seed: int) -> None:
    """Runs one model and writes its file."""
    import torch
    import transformers

    tokens_BT, lengths = carry.example(case.config, seed)
    model = hf_models.build(case, carry.draw(case.config, seed))
    logits, loss, gradients = hf_models.run(model, tokens_BT, lengths)
    order = sorted(gradients)
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        seed=seed,
        versions=[f"transformers {transformers.__version__}", f"torch {torch.__version__}"],
        tokens=tokens_BT.astype(np.int32),
        lengths=lengths.astype(np.int32),
        logits=logits,
        loss=np.float32(loss),
        names=order,
        norms=np.array([np.linalg.norm(gradients[n].astype(np.float64)) for n in order]),
        maxima=np.array([np.abs(gradients[n]).max() for n in order]),
        samples=np.concatenate([sampled(gradients[n]) for n in order]),
    )


if __name__ == "__main__":
    for index, (name, case) in enumerate(hf_models.CASES.items()):
        make(name, case, SEED + index)
        print(f"{name}: {(FOLDER / f'{name}.npz').stat().st_size} bytes")
