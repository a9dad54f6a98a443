"""Law: a GGUF file is the model that llama.cpp makes of it, and a damaged one is one sentence.

Expected numbers come from the gguf package, from ggml's formats written out here, and from llama.cpp's model written
in numpy (`gguf_fixtures`).
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_fixtures import BASE, MODELS, numpy_logits, random_weights, tensors_of, weights_of, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from model.config import MoEConfig, RopeConfig
from model.forward import Batch, forward, unembed
from model.gguf_file import GGUFSource, llama3_rope
from model.gguf_format import QUANTISED, dequantised
from model.layers import rope_frequencies
from model.load import open_model
from model.transformer import Transformer
from model.tree import make_skeleton

TOKENS = [1, 403, 407, 261, 378, 17, 511, 0, 261, 261, 99]
TINY = replace(BASE, vocab_size=16, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16)
TINY = replace(TINY, intermediate_size=32)


def logits_of(source: GGUFSource) -> np.ndarray:
    """Our logits `[T, V]` for TOKENS."""
    skeleton = make_skeleton(source.config, stacked=False)
    model: Transformer = skeleton.merge({n: jnp.asarray(w) for n, w in weights_of(source).items()}, {})
    tokens = jnp.asarray([TOKENS])
    batch = Batch(tokens, jnp.arange(len(TOKENS))[None], jnp.ones_like(tokens))
    return np.asarray(unembed(model, forward(model, batch).hidden_BTD)[0])


def opened(path: Path) -> GGUFSource:
    source = open_model(path)
    assert isinstance(source, GGUFSource)
    return source


# ---- architectures ----------------------------------------------------------------
@pytest.mark.parametrize("architecture", MODELS)
def test_every_architecture_is_what_llama_cpp_makes_of_it(architecture: str, tmp_path: Path) -> None:
    config = MODELS[architecture]
    weights = random_weights(config)
    path = write_gguf(tmp_path / "m.gguf", config, architecture, tensors_of(config, weights, architecture))
    source = opened(path)
    assert source.config == config
    loaded = weights_of(source)
    assert loaded.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)
    assert logits_of(source) == pytest.approx(numpy_logits(path, TOKENS), abs=1e-4)


def test_llama_with_biases_experts_and_tied_output(tmp_path: Path) -> None:
    config = replace(
        MODELS["llama"],
        qkv_bias=True,
        output_bias=True,
        tie_embeddings=True,
        moe=MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=64),
    )
    weights = random_weights(config)
    path = write_gguf(tmp_path / "m.gguf", config, "llama", tensors_of(config, weights, "llama"))
    assert opened(path).config == config
    assert logits_of(opened(path)) == pytest.approx(numpy_logits(path, TOKENS), abs=1e-4)


def test_weights_come_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    path = write_gguf(tmp_path / "m.gguf", TINY, "llama", tensors_of(TINY, weights, "llama"))
    for name, array in weights_of(opened(path), "bfloat16").items():
        np.testing.assert_array_equal(array, weights[name].astype(jnp.bfloat16), err_msg=name)


# ---- types of tensors -------------------------------------------------------------
@pytest.mark.parametrize("kind", ["F16", "BF16", *QUANTISED])
def test_every_type_of_tensor(kind: str, tmp_path: Path) -> None:
    """The weights are those that the gguf package makes of the same bytes."""
    config = replace(MODELS["qwen3moe"], num_layers=1)
    tensors, kinds, plain = tensors_of(config, random_weights(config), "qwen3moe"), {}, {}
    draw = np.random.default_rng(0)
    number = gguf.GGMLQuantizationType[kind]
    for name, array in tensors.items():
        if array.ndim == 1:
            plain[name] = array
            continue
        try:
            raw = gguf.quantize(array, number).view(np.uint8)
        except NotImplementedError:
            raw = random_blocks(array.shape, kind, draw)
        plain[name] = gguf.dequantize(raw, number).reshape(array.shape)
        tensors[name], kinds[name] = raw, kind
    path = write_gguf(tmp_path / "m.gguf", config, "qwen3moe", tensors, kinds)
    same = write_gguf(tmp_path / "same.gguf", config, "qwen3moe", plain)
    loaded, expected = weights_of(opened(path)), weights_of(opened(same))
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)


def random_blocks(shape: tuple[int, ...], kind: str, draw: np.random.Generator) -> np.ndarray:
    """Bytes `[..., columns]` of random blocks whose scales are small numbers."""
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = draw.integers(0, 256, (math.prod(shape) // elements, size), np.uint8)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]:
        blocks[:, at : at + 2] = draw.uniform(-0.01, 0.01, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def q8_0(b: bytes) -> list[float]:
    (d,) = struct.unpack("<e", b[:2])
    return [d * q for q in struct.unpack("<32b", b[2:])]


def q4_0(b: bytes) -> list[float]:
    (d,) = struct.unpack("<e", b[:2])
    return [d * (q - 8) for q in [*(x & 15 for x in b[2:]), *(x >> 4 for x in b[2:])]]


def q4_1(b: bytes) -> list[float]:
    d, m = struct.unpack("<2e", b[:4])
    return [d * q + m for q in [*(x & 15 for x in b[4:]), *(x >> 4 for x in b[4:])]]


def q4_k(b: bytes) -> list[float]:
    d, dmin = struct.unpack("<2e", b[:4])
    s, qs = b[4:16], b[16:]
    out: list[float] = []
    for j in range(8):
        if j < 4:
            scale, low = s[j] & 63, s[j + 4] & 63
        else:
            scale, low = s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4
        part = qs[j // 2 * 32 : j // 2 * 32 + 32]
        out += [d * scale * (x >> 4 if j % 2 else x & 15) - dmin * low for x in part]
    return out


def q6_k(b: bytes) -> list[float]:
    scales = struct.unpack("<16b", b[192:208])
    (d,) = struct.unpack("<e", b[208:])
    out = []
    for half, part, i in itertools.product(range(2), range(4), range(32)):
        low = b[half * 64 + part % 2 * 32 + i] >> (part // 2 * 4) & 15
        high = b[128 + half * 32 + i] >> (part * 2) & 3
        out.append(d * scales[half * 8 + part * 2 + i // 16] * ((low | high << 4) - 32))
    return out


@pytest.mark.parametrize("decode", [q8_0, q4_0, q4_1, q4_k, q6_k], ids=lambda f: f.__name__)
def test_blocks_hold_what_ggml_says(decode: Callable[[bytes], list[float]]) -> None:
    kind = decode.__name__.upper()
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    raw = np.random.default_rng(1).integers(0, 256, (50, size), np.uint8)
    places = {"Q4_1": (1, 3), "Q4_K": (1, 3), "Q6_K": (209,)}.get(kind, (1,))
    raw[:, places] &= 0xBB  # no exponent of 31: neither infinite nor no number
    expected = np.array([x for block in raw for x in decode(block.tobytes())])
    np.testing.assert_allclose(dequantised(raw.reshape(-1), kind), expected, rtol=1e-5, atol=1e-7)


def test_large_tensors_are_dequantised_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_blocks((7, 256), "Q4_K", np.random.default_rng(0)).reshape(-1)
    whole = dequantised(raw, "Q4_K")
    monkeypatch.setattr("model.gguf_format.CHUNK", 700)
    np.testing.assert_array_equal(dequantised(raw, "Q4_K"), whole)


def test_an_unread_type_is_named(tmp_path: Path) -> None:
    tensors = tensors_of(TINY, random_weights(TINY), "llama")
    tensors["output_norm.weight"] = tensors["output_norm.weight"].astype(np.float64)
    path = write_gguf(tmp_path / "m.gguf", TINY, "llama", tensors)
    with pytest.raises(UserError, match=r"of the type F64 \(such as output_norm.weight\); the types that are read"):
        open_model(path)


# ---- rotary positions ---------------------------------------------------------------
def llama3_factors(rope: RopeConfig, width: int) -> list[float]:
    """What llama.cpp's converter writes for a config.json with `rope_type: llama3`, from its source."""
    found = []
    for i in range(width // 2):
        wavelength = 2 * math.pi * rope.theta ** (2 * i / width)
        low = rope.original_max_positions / rope.low_freq_factor
        high = rope.original_max_positions / rope.high_freq_factor
        if wavelength < high:
            found.append(1.0)
        elif wavelength > low:
            found.append(rope.factor)
        else:
            smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
                rope.high_freq_factor - rope.low_freq_factor
            )
            found.append(1 / ((1 - smooth) / rope.factor + smooth))
    return found


META = RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_positions=8192)
SCALINGS = [
    (META, 128),
    (replace(META, factor=32.0), 64),
    (replace(META, original_max_positions=4096, theta=1e4), 64),
    (replace(META, original_max_positions=5000, high_freq_factor=9.0), 128),
    (replace(META, original_max_positions=3000, low_freq_factor=2.0, high_freq_factor=32.0), 128),
]


@pytest.mark.parametrize(("rope", "width"), SCALINGS)
def test_llama3_scaling_is_told_from_its_factors(rope: RopeConfig, width: int) -> None:
    factors = np.array(llama3_factors(rope, width), np.float32).astype(np.float64)
    found = llama3_rope(factors, RopeConfig(theta=rope.theta), width, "file")
    np.testing.assert_allclose(rope_frequencies(found, width)[0], rope_frequencies(rope, width)[0], rtol=1e-5)
    if rope.low_freq_factor == 1:
        assert found == rope


def test_llama3_scaling_in_a_file(tmp_path: Path) -> None:
    rope = RopeConfig(theta=1e4, scaling="llama3", factor=4.0, original_max_positions=8192)
    config = replace(MODELS["llama"], rope=rope)
    factors = llama3_factors(rope, config.head_dim)
    assert 1 < len(set(factors)) <= config.head_dim // 2
    tensors = tensors_of(config, random_weights(config), "llama")
    tensors["rope_freqs.weight"] = np.array(factors, np.float32)
    path = write_gguf(tmp_path / "m.gguf", config, "llama", tensors)
    assert opened(path).config == config
    assert logits_of(opened(path)) == pytest.approx(numpy_logits(path, TOKENS, dict(enumerate(factors))), abs=1e-4)


def test_factors_of_one_scale_nothing(tmp_path: Path) -> None:
    tensors = tensors_of(TINY, random_weights(TINY), "llama")
    tensors["rope_freqs.weight"] = np.ones(TINY.head_dim // 2, np.float32)
    assert opened(write_gguf(tmp_path / "m.gguf", TINY, "llama", tensors)).config.rope == TINY.rope


@pytest.mark.parametrize("factors", [[1, 2, 1, 2, 1, 2, 1, 2], [0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0.5]])
def test_other_factors_are_refused(factors: list[float], tmp_path: Path) -> None:
    tensors = tensors_of(TINY, random_weights(TINY), "llama")
    tensors["rope_freqs.weight"] = np.array(factors, np.float32)
    path = write_gguf(tmp_path / "m.gguf", TINY, "llama", tensors)
    with pytest.raises(UserError, match="in another way than Llama 3 does"):
        open_model(path)


def test_yarn(tmp_path: Path) -> None:
    config = replace(TINY, qk_norm=True, layout="qwen3", max_positions=512)
    tensors = tensors_of(config, random_weights(config), "qwen3")
    scaling = [("type", "yarn"), ("factor", 4.0), ("original_context_length", 128)]
    more = [(f"qwen3.rope.scaling.{name}", value) for name, value in scaling]
    path = write_gguf(tmp_path / "m.gguf", config, "qwen3", tensors, more=more)
    yarn = replace(config.rope, scaling="yarn", factor=4.0, original_max_positions=128)
    assert opened(path).config == replace(config, rope=yarn)
    # llama.cpp multiplies its own `0.1 ln(factor) + 1` by attn_factor.
    changed = [("attn_factor", 0.5), ("yarn_beta_fast", 16.0), ("yarn_beta_slow", 2.0)]
    more += [(f"qwen3.rope.scaling.{name}", value) for name, value in changed]
    path = write_gguf(tmp_path / "m.gguf", config, "qwen3", tensors, more=more)
    rope = opened(path).config.rope
    assert (rope.beta_fast, rope.beta_slow) == (16.0, 2.0)
    assert rope_frequencies(rope, 16)[1] == pytest.approx(0.5 * (0.1 * math.log(4) + 1))


# ---- what is refused ----------------------------------------------------------------
def changed(
    tmp_path: Path,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    architecture: str = "llama",
    more: Iterable[tuple[str, Any]] = (),
) -> Path:
    """A tiny llama with some tensors exchanged, added or (None) left out."""
    found: dict[str, np.ndarray | None] = {**tensors_of(TINY, random_weights(TINY), "llama"), **(tensors or {})}
    kept = {name: array for name, array in found.items() if array is not None}
    return write_gguf(tmp_path / "m.gguf", TINY, architecture, kept, more=more)


def test_tensors_that_do_not_fit_are_listed_together(tmp_path: Path) -> None:
    path = changed(
        tmp_path,
        {
            "blk.0.attn_q.weight": None,
            "output_norm.weight": None,
            "blk.0.ffn_up.bias": np.zeros(32, np.float32),
            "blk.0.attn_v.weight": np.zeros((16, 64), np.float32),
        },
    )
    with pytest.raises(UserError) as caught:
        weights_of(open_model(path))
    said = str(caught.value)
    assert str(path) in said and "\n" not in said
    assert "2 missing: output_norm.weight, blk.0.attn_q.weight" in said
    assert "1 not used: blk.0.ffn_up.bias" in said
    assert "1 of the wrong shape: blk.0.attn_v.weight (16, 64) instead of (16, 32)" in said


REFUSED = [
    ("gemma3", {}, r"architecture 'gemma3'; known are llama, qwen2, qwen3, qwen3moe"),
    ("qwen33", {}, r"did you mean 'qwen3'"),
    ("llama", {"split.count": 3}, r"one of 3 parts of a model; .*`llama-gguf-split --merge"),
    ("llama", {"llama.rope.scaling.type": "longrope"}, r"scales rotary positions by 'longrope'"),
    ("llama", {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, r"by 'linear'"),
    ("llama", {"llama.rope.dimension_count": 8}, r"dimension_count=8 where heads are 16 wide"),
    ("llama", {"llama.expert_count": 4}, r"lacks llama.expert_used_count"),
    ("llama", {"llama.block_count": 1000}, r"1000 layers of 2 heads in"),
    ("llama", {"llama.attention.head_count": 0}, r"1 layers of 0 heads in"),
    ("llama", {"llama.context_length": 0}, r"max_positions=0 must be positive"),
    ("llama", {"llama.leaky": "", "general.alignment": 24}, r"general.alignment is 24"),
]


@pytest.mark.parametrize(("architecture", "metadata", "said"), REFUSED)
def test_what_is_not_supported_is_one_sentence(
    architecture: str, metadata: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        open_model(changed(tmp_path, architecture=architecture, more=metadata.items()))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a tiny file."""
    return changed(tmp_path_factory.mktemp("whole")).read_bytes()


def test_a_truncated_file_names_the_tensor(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"cut.gguf is truncated: the tensor blk.0.ffn_down.weight ends at byte"):
        open_model(tmp_path / "cut.gguf")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_damage_is_more_than_a_sentence(whole: bytes, tmp_path_factory: pytest.TempPathFactory, data) -> None:
    """A file cut anywhere is refused; one with a wrong byte is read or refused, and never more than its own size."""
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    header = whole.index(tensors_of(TINY, random_weights(TINY), "llama")["token_embd.weight"].tobytes())
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(UserError, match=r"damaged.gguf"):
            open_model(path)
        return
    at, value = data.draw(st.integers(0, header - 1)), data.draw(st.integers(0, 255))
    path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
    with suppress(UserError):
        weights_of(open_model(path))
