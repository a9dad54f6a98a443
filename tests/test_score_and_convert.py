"""Law: `score` gives what teacher forcing gives, for any batching; a run converted scores the same."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hf import CONFIGS, write

import qmax
from model.forward import Batch, forward, unembed
from model.hf.safetensors import Directory
from model.load import open_model, read_model
from sharding.mesh import MeshConfig, make_mesh
from train.scoring import Scorer

LENGTHS = (1, 2, 15, 16, 17, 40, 3, 33)


def model_at(path: Path):
    return read_model(open_model(path), make_mesh(MeshConfig(), jax.devices()[:1]), dtype="float32")


def rows_of(vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "qwen3_moe"
    write(path, CONFIGS["qwen3_moe"])
    return path


@jax.jit
def all_logits(model, tokens_BT):
    segments_BT = jnp.ones_like(tokens_BT)
    positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    return unembed(model, forward(model, Batch(tokens_BT, positions_BT, segments_BT)).hidden_BTD)


def by_hand(model, row: list[int]) -> list[float]:
    """Every logit of one row alone; what follows its end cannot be seen from it."""
    tokens_BT = np.zeros((1, max(LENGTHS)), np.int32)
    tokens_BT[0, : len(row)] = row
    logits = np.asarray(all_logits(model, tokens_BT))[0].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [table[t, row[t + 1]] for t in range(len(row) - 1)]


@pytest.mark.parametrize("batch_tokens", [16, 64, 4096])
def test_scores_are_teacher_forced(batch_tokens: int, directory: Path) -> None:
    model, rows = model_at(directory), rows_of(48)
    found = Scorer(model, batch_tokens).score(rows)
    for row, (logprobs, best) in zip(rows, found, strict=True):
        assert len(logprobs) == len(best) == len(row)
        assert logprobs[0] is None
        np.testing.assert_allclose(np.array(logprobs[1:], float), by_hand(model, row), atol=1e-5)


def run_score(directory: Path, rows: list[object], folder: Path, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    (folder / "in.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    words = ["score", str(directory), "--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")]
    code = qmax.main([*words, "--json", str(folder / "summary.json")])
    return code, capsys.readouterr().err


def test_the_verb(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = rows_of(48)
    code, _ = run_score(directory, [{"tokens": row} for row in rows], tmp_path, capsys)
    assert code == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == rows
    values = [value for line in lines for value in line["logprobs"][1:]]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["tokens_scored"] == len(values) == sum(LENGTHS) - len(LENGTHS)
    assert summary["perplexity"] == pytest.approx(np.exp(-np.mean(values)), rel=1e-6)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": [1, 48]}, "line 2 of .* holds the id 48, but tokens run from 0 to 47"),
        ({"tokens": []}, "line 2 of .* is empty"),
        ({"tokens": ["a"]}, 'line 2 of .*: "tokens" must be a list of whole numbers'),
        ({"words": 3}, 'line 2 of .* is not an object with "text" or "tokens"'),
        ({"text": 3}, 'line 2 of .*: "text" must be a string'),
        ({"tokens": [1] * 5000}, "line 2 of .* has 5000 tokens, but the model has 4096 positions"),
        ({"text": "hello"}, "holds neither tokenizer.model nor tokenizer.json"),
    ],
)
def test_bad_rows_are_refused(row, words, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, said = run_score(directory, [{"tokens": [1, 2]}, row], tmp_path, capsys)
    assert code == 2
    assert len(said.strip().splitlines()) == 1
    import re

    assert re.search(words, said), said
    assert not (tmp_path / "out.jsonl").exists()


def test_a_converted_run_is_the_run(tmp_path: Path) -> None:
    """Weights, tokens and scores; float32 keeps every bit, bfloat16 is what a directory usually holds."""
    assert qmax.main(["train", "configs/tiny.py", "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert qmax.main(["convert", str(tmp_path / "run"), str(tmp_path / "f32"), "--dtype", "float32"]) == 0
    run, exported = open_model(tmp_path / "run"), open_model(tmp_path / "f32")
    ours, theirs = (jax.tree.leaves(model_at(tmp_path / name)) for name in ("run", "f32"))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    text = "Once upon a time, 床前明月光 <think> é\n\n  x = 12"
    assert run.tokenizer().encode(text) == exported.tokenizer().encode(text)
    chat = [{"role": "user", "content": "Hello!"}]
    assert run.tokenizer().encode_chat(chat) == exported.tokenizer().encode_chat(chat)
    assert qmax.main(["convert", str(tmp_path / "run"), str(tmp_path / "bf16")]) == 0
    assert {entry.dtype.name for entry in Directory(tmp_path / "bf16").entries.values()} == {"bfloat16"}
    assert qmax.main(["convert", str(tmp_path / "run"), str(tmp_path / "bf16")]) == 2
    card = (tmp_path / "bf16" / "README.md").read_text()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen, loss = sum(record["tokens"] for record in records), records[-1]["validation_loss"]
    facts = f"objective pretrain, step 2 of 2, {seen:,} tokens seen, last validation loss {loss:.4g}."
    assert f"Trained by qmax in the run `run`: {facts}" in card
    assert "| tokenizer | 512 tokens |" in card and "qmax generate bf16" in card and "qmax chat" not in card
