"""Law: a checkpoint of any family, as transformers saves it, computes the same here, and goes back as it came.

Every norm, bias, sink and decay is random. One seed stands (another: `QMAX_PARITY_SEED`): a few of many amplify
rounding beyond 1e-4.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model.cache import empty_cache
from model.convert_verb import convert
from model.forward import Batch, continuation, forward, predict_further, unembed
from model.hf.safetensors import Directory, header_of, write_tensor
from model.load import open_model, read_model
from sharding.mesh import MeshConfig, make_mesh

from . import hf_families

pytestmark = [
    pytest.mark.skipif(os.environ.get("QMAX_PARITY") != "1", reason="./run.sh test --parity"),
    pytest.mark.filterwarnings("default"),
]

SEED = int(os.environ.get("QMAX_PARITY_SEED") or 7)
TOLERANCE = 1e-4
FAMILIES = list(hf_families.FAMILIES)
LINEAR = [name for name in FAMILIES if name.startswith(("qwen3_next", "qwen3_5"))]


@pytest.fixture(autouse=True)
def _seed():
    print(f"QMAX_PARITY_SEED={SEED}")


@functools.cache
def example(name: str) -> tuple[Any, Path]:
    """The model in transformers, and the directory that it saved."""
    if not hf_families.is_known(name):
        pytest.skip(f"this release of transformers has no {name}")
    folder = Path(tempfile.mkdtemp(prefix=f"qmax-{name}-"))
    model = hf_families.build(name, SEED)
    hf_families.save(model, folder)
    return model, folder


@functools.cache
def ours(name: str):
    return load(example(name)[1])


def load(folder: Path):
    """Our model of a directory, in float32."""
    return read_model(open_model(folder), make_mesh(MeshConfig(), jax.devices()[:1]), dtype="float32")


def difference(found: Any, expected: np.ndarray, where: Any = ...) -> float:
    """The largest difference."""
    return float(np.abs(np.asarray(found) - expected)[where].max())


def tokens_of(length: int, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(SEED).integers(3, 128, (rows, length)).astype(np.int32)


@jax.jit
def whole(model: Any, tokens: Any, segments: Any) -> Any:
    positions = (segments.cumsum(1) - 1).clip(0)
    return unembed(model, forward(model, Batch(tokens, positions, segments)).hidden_BTD)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name: str):
    tokens = tokens_of(40)
    expected = hf_families.logits(example(name)[0], tokens)
    found = whole(ours(name), tokens, np.ones_like(tokens))
    assert difference(found, expected) <= TOLERANCE
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("name", LINEAR)
def test_around_the_edges_of_chunks(name: str, length: int):
    tokens = tokens_of(length)
    expected = hf_families.logits(example(name)[0], tokens)
    found = whole(ours(name), tokens, np.ones_like(tokens))
    assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_left_padding(name: str):
    tokens = tokens_of(21)
    mask = np.ones_like(tokens)
    mask[0, :9] = 0
    expected = hf_families.logits(example(name)[0], tokens, mask)
    found = whole(ours(name), tokens, mask)
    assert difference(found, expected, mask > 0) <= TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_and_decode(name: str):
    """Prompts of two lengths are read into a cache; then token after token."""
    tokens, model = tokens_of(30), ours(name)
    expected = hf_families.logits(example(name)[0], tokens)
    lengths = np.array([17, 9], np.int32)
    cache = empty_cache(model.config, 2, 40, np.dtype(np.float32))

    @jax.jit
    def step(model: Any, batch: Batch, cache: Any) -> Any:
        output = forward(model, batch, cache)
        return unembed(model, output.hidden_BTD), output.cache

    prompt = np.where(np.arange(17)[None] < lengths[:, None], tokens[:, :17], 0)
    valid = np.arange(17)[None] < lengths[:, None]
    logits, cache = step(model, continuation(prompt, cache.lengths_B, valid), cache)
    assert difference(logits, expected[:, :17], valid) <= TOLERANCE
    for _ in range(13):
        column = np.asarray(cache.lengths_B)
        batch = continuation(tokens[np.arange(2), column][:, None], cache.lengths_B)
        logits, cache = step(model, batch, cache)
        assert difference(logits[:, 0], expected[np.arange(2), column]) <= TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(name: str, tmp_path: Path):
    """Converted, every tensor has the same bits under the same name, and transformers loads it without a word."""
    import transformers

    model, folder = example(name)
    convert(open_model(folder), tmp_path / "out")
    before, after = Directory(folder), Directory(tmp_path / "out")
    assert sorted(before.entries.keys() ^ after.entries.keys()) == []
    for tensor in before.entries:
        old, new = before.view(tensor), after.view(tensor)
        assert old.dtype == new.dtype and old.tobytes() == new.tobytes(), tensor
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager", dtype="float32"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = tokens_of(24)
    expected = hf_families.logits(model, tokens)
    assert difference(hf_families.logits(again.eval(), tokens), expected) <= 1e-5
    assert open_model(tmp_path / "out").config == open_model(folder).config


MTP = {"qwen3_next": "mtp.layers.0.", "qwen3_5_moe": "mtp.layers.0.", "deepseek_v3": "model.layers.3."}
"""Families whose checkpoints hold a block for multi-token prediction, and where."""


def with_mtp(name: str, folder: Path) -> tuple[Any, Any]:
    """Adds the block to a saved checkpoint; the model in transformers, and its layer that computes the same.

    The block's own weights are those of the last layer once more; what joins its two inputs is random.
    """
    import copy

    import torch
    from transformers import modeling_layers

    if not hasattr(modeling_layers, "MtpLayer"):
        pytest.skip("this release of transformers has no such layer")
    model, saved = example(name)
    before = Directory(saved)
    tensors = {key: np.array(before.view(key)) for key in before.entries}
    last = f"model.layers.{model.config.num_hidden_layers - 1}."
    block = model.model.layers[-1]
    torch.manual_seed(SEED + 1)
    norm = type(model.model.norm)
    layer = modeling_layers.MtpLayer(model.config, lambda config, index: copy.deepcopy(block), norm, 0).float()
    with torch.no_grad():
        for part in (layer.enorm, layer.hnorm, layer.eh_proj, layer.post_norm):
            part.weight.copy_(torch.randn_like(part.weight) * 0.2)
    names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
    prefix = "mtp."
    if name == "deepseek_v3":
        names, prefix = ("enorm", "hnorm", "eh_proj", "shared_head.norm"), MTP[name]
        tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"]
    parts = (layer.enorm, layer.hnorm, layer.eh_proj, layer.post_norm)
    tensors |= {f"{prefix}{n}.weight": p.weight.detach().numpy() for n, p in zip(names, parts, strict=True)}
    tensors |= {MTP[name] + key.removeprefix(last): value for key, value in tensors.items() if key.startswith(last)}
    folder.mkdir()
    (folder / "config.json").write_bytes((saved / "config.json").read_bytes())
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(header_of({key: (value.dtype, value.shape) for key, value in tensors.items()}))
        for value in tensors.values():
            write_tensor(stream, value)
    return model, layer


@pytest.mark.parametrize("name", MTP)
def test_multi_token_prediction(name: str, tmp_path: Path):
    """The block is loaded, computes what transformers computes, and goes back with the same bits."""
    import torch

    model, layer = with_mtp(name, tmp_path / "in")
    own, tokens = load(tmp_path / "in"), tokens_of(19)
    assert own.config.mtp_layers == 1
    segments = np.ones_like(tokens)
    batch = Batch(tokens, np.cumsum(segments, axis=1) - 1, segments)
    hidden = forward(own, batch).hidden_BTD
    found = predict_further(own, batch, hidden)[0]
    with torch.no_grad():
        ids = torch.tensor(tokens)
        last = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        position_ids = torch.arange(18)[None]
        mask = torch.full((18, 18), float("-inf")).triu(1)[None, None]
        rotary = model.model.rotary_emb(last, position_ids)
        expected = layer(model.model.embed_tokens(ids[:, 1:]), last, rotary, mask, position_ids, None).numpy()
    assert difference(found[:, :-1], expected) <= TOLERANCE
    convert(open_model(tmp_path / "in"), tmp_path / "out")
    before, after = Directory(tmp_path / "in"), Directory(tmp_path / "out")
    assert sorted(before.entries.keys() ^ after.entries.keys()) == []
    assert all(before.view(key).tobytes() == after.view(key).tobytes() for key in before.entries)
