"""Law: a model directory is read exactly or refused whole, and what is written is read back with the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from errors import UserError
from model.config import LatentAttentionConfig, LinearAttentionConfig, ModelConfig, MoEConfig, RopeConfig, mscale
from model.convert_verb import convert
from model.hf.families import FAMILIES, family_of_config, settings_of
from model.hf.quantised import FP4
from model.hf.reading import Checkpoint
from model.hf.safetensors import Directory, header_of, write_tensor
from model.hf.tables import model_rules
from model.hf.writing import write_checkpoint
from model.load import layout, open_model, read_model
from model.moe import MoE
from model.sizes import NAMED
from model.tree import make_skeleton
from sharding.mesh import MeshConfig, make_mesh

BASE = ModelConfig(
    vocab_size=48, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=24
)
ROUTED = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=10)
SHARED = replace(ROUTED, shared_intermediate_size=12)
HYBRID = replace(
    BASE,
    num_layers=4,
    attention_pattern=("linear", "full"),
    linear=LinearAttentionConfig(num_key_heads=2, num_value_heads=4, key_dim=4, value_dim=6),
    attention_gate=True,
    norm="zero_centred",
    rope=RopeConfig(theta=1e7, share=0.25),
)
YARN = RopeConfig(theta=1e4, scaling="yarn", factor=4.0, original_max_positions=64)
CONFIGS = {
    "qwen2": replace(BASE, qk_norm=False, qkv_bias=True, tie_embeddings=True, rope=YARN),
    "qwen3": BASE,
    "llama": replace(
        BASE,
        qk_norm=False,
        rope=RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_positions=64),
    ),
    "qwen2_moe": replace(BASE, qk_norm=False, qkv_bias=True, moe=replace(SHARED, dense_layers=(0,))),
    "qwen3_moe": replace(BASE, moe=ROUTED),
    "qwen3_next": replace(HYBRID, moe=SHARED, mtp_layers=1, layout="qwen3_next"),
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": replace(HYBRID, moe=SHARED, intermediate_size=10, mtp_layers=1),
    "olmoe": replace(
        BASE, qk_norm_whole=True, qkv_clip=3.0, intermediate_size=10, moe=replace(ROUTED, normalize=False)
    ),
    "gpt_oss": replace(
        BASE,
        attention_pattern=("sliding", "full"),
        sliding_window=5,
        sinks=True,
        qk_norm=False,
        qkv_bias=True,
        output_bias=True,
        norm="float32",
        intermediate_size=10,
        rope=replace(YARN, truncate=False),
        moe=replace(ROUTED, bias=True, activation="clamped"),
    ),
    "deepseek_v3": replace(
        BASE,
        num_layers=3,
        num_kv_heads=4,
        head_dim=4,
        qk_norm=False,
        latent=LatentAttentionConfig(kv_rank=6, query_rank=10, nope_dim=6, rope_dim=4, value_dim=5),
        rope=replace(YARN, attention_factor=1.0),
        attention_multiplier=mscale(4.0, 0.7) ** 2,
        moe=replace(
            SHARED,
            shared_intermediate_size=10,
            shared_gate=False,
            score="sigmoid",
            selection_bias=True,
            scale=2.5,
            num_groups=2,
            dense_layers=(0,),
        ),
        mtp_layers=1,
    ),
}


def weights_of(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Random weights of a model, all different from what a new one begins with."""
    rng = np.random.default_rng(seed)
    shapes = make_skeleton(config, stacked=False).shapes
    return {name: jax.numpy.asarray(rng.normal(size=shape, scale=0.3), np.float32) for name, shape in shapes.items()}


def write(folder: Path, config: ModelConfig, *, dtype: str = "float32", **more: Any) -> dict[str, Any]:
    """A directory with random weights, which are returned."""
    weights = weights_of(config)
    write_checkpoint(folder, config, make_skeleton(config, stacked=False).shapes, weights, {}, dtype=dtype, **more)
    return weights


def read(folder: Path) -> dict[str, np.ndarray]:
    """All weights of a directory."""
    source = open_model(folder)
    skeleton = make_skeleton(source.config, stacked=False)
    places = layout(skeleton, make_mesh(MeshConfig(), jax.devices()[:1]))
    return {name: np.asarray(a) for name, a in source.weights(places, "float32").items()}


def raw(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a directory by their names."""
    directory = Directory(folder)
    return {name: np.array(directory.view(name)) for name in directory.entries}


def put(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Replaces the tensors of a directory of one file."""
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(header_of({name: (value.dtype, value.shape) for name, value in tensors.items()}))
        for value in tensors.values():
            write_tensor(stream, value)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_back(name: str, tmp_path: Path):
    """Weights, config and, once more converted, every tensor; through many small files, too."""
    config = CONFIGS[name]
    assert family_of_config(config).model_type == name
    weights = write(tmp_path / "a", config, shard_bytes=5000)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 3
    found = read(tmp_path / "a")
    assert found.keys() == weights.keys()
    assert all(np.array_equal(found[key], weights[key]) for key in weights)
    again = open_model(tmp_path / "a").config
    assert again.attention_multiplier == pytest.approx(config.attention_multiplier, rel=1e-9)
    assert replace(again, layout=config.layout, attention_multiplier=config.attention_multiplier) == config
    convert(open_model(tmp_path / "a"), tmp_path / "b")
    first, second = raw(tmp_path / "a"), raw(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(first[key].tobytes() == second[key].tobytes() for key in first)


def test_each_family_is_here():
    assert {family.model_type for family in FAMILIES} == set(CONFIGS)


@pytest.mark.parametrize("name", NAMED)
def test_settings_of_the_published_sizes_lead_back_to_them(name: str):
    config = NAMED[name]
    family = family_of_config(config)
    settings = json.loads(json.dumps(settings_of(config, family)))
    again = replace(family.read(settings), mtp_layers=config.mtp_layers, layout=config.layout)
    close = again.attention_multiplier == pytest.approx(config.attention_multiplier, rel=1e-6)
    assert close and replace(again, attention_multiplier=1.0) == replace(config, attention_multiplier=1.0)


def test_bfloat16_is_kept(tmp_path: Path):
    write(tmp_path / "a", CONFIGS["deepseek_v3"], dtype="bfloat16")
    convert(open_model(tmp_path / "a"), tmp_path / "b")
    first, second = raw(tmp_path / "a"), raw(tmp_path / "b")
    assert {value.dtype.name for value in first.values()} == {"bfloat16", "float32"}  # the selection bias
    assert all(first[key].dtype == second[key].dtype for key in first)
    assert all(first[key].tobytes() == second[key].tobytes() for key in first)


@pytest.mark.parametrize("turned", [False, True])
def test_experts_in_one_tensor(turned: bool, tmp_path: Path):
    """Whichever way their dimensions lie: told by shape."""
    config = CONFIGS["qwen3_moe"]
    weights = write(tmp_path / "a", config)
    tensors = raw(tmp_path / "a")
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        each = {
            part: np.stack([tensors.pop(f"{prefix}{e}.{part}_proj.weight") for e in range(4)])
            for part in ("gate", "up", "down")
        }
        both, down = np.concatenate([each["gate"], each["up"]], axis=1), each["down"]
        tensors[f"{prefix}gate_up_proj"] = both.swapaxes(1, 2) if turned else both
        tensors[f"{prefix}down_proj"] = down.swapaxes(1, 2) if turned else down
    put(tmp_path / "a", tensors)
    found = read(tmp_path / "a")
    assert all(np.array_equal(found[key], weights[key]) for key in weights)


def test_fp8_blocks(tmp_path: Path):
    """Each 128 x 128 block times its factor, whole or cut off at the edge; worked out by loops."""
    config = replace(BASE, hidden_size=160, head_dim=40, intermediate_size=24)
    write(tmp_path / "a", config)
    tensors, rng = raw(tmp_path / "a"), np.random.default_rng(1)
    name = "model.layers.0.self_attn.q_proj.weight"
    small = rng.normal(size=(160, 160)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.5, 2, (2, 2)).astype(np.float32)
    put(tmp_path / "a", {**tensors, name: small, f"{name}_scale_inv": scales})
    expected = small.astype(np.float32)
    for i in range(160):
        for j in range(160):
            expected[i, j] *= scales[i // 128, j // 128]
    found = read(tmp_path / "a")["stacks.0.blocks.0.attention.q_DNH"]
    assert np.array_equal(found.reshape(160, 160), expected.T)


def test_mxfp4(tmp_path: Path):
    """Two numbers of four bits in a byte, the low one first, times a power of two for each 32."""
    config = replace(CONFIGS["gpt_oss"], hidden_size=32, moe=replace(CONFIGS["gpt_oss"].moe, intermediate_size=32))
    config = replace(config, intermediate_size=32)
    write(tmp_path / "a", config)
    tensors, rng = raw(tmp_path / "a"), np.random.default_rng(1)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    shape = tensors.pop(name).shape  # [E, D, 2F]
    blocks = rng.integers(0, 256, (shape[0], shape[2], shape[1] // 32, 16)).astype(np.uint8)
    scales = rng.integers(120, 132, blocks.shape[:3]).astype(np.uint8)
    put(tmp_path / "a", {**tensors, f"{name}_blocks": blocks, f"{name}_scales": scales})
    expected = np.zeros(shape, np.float32)
    values = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    for e, row, group, byte in np.ndindex(blocks.shape):
        for half in (0, 1):
            code = int(blocks[e, row, group, byte]) >> 4 * half & 15
            number = values[code & 7] * (-1 if code & 8 else 1) * 2.0 ** (int(scales[e, row, group]) - 127)
            expected[e, 32 * group + 2 * byte + half, row] = number
    found = read(tmp_path / "a")
    assert np.array_equal(found["stacks.0.blocks.0.feed_forward.gate_EDF"], expected[..., ::2])
    assert np.array_equal(found["stacks.0.blocks.0.feed_forward.up_EDF"], expected[..., 1::2])
    assert len(FP4) == 16


def settings_changed(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def test_both_generations_of_rotary_settings(tmp_path: Path):
    write(tmp_path / "a", CONFIGS["qwen2"])
    before = open_model(tmp_path / "a").config
    settings = json.loads((tmp_path / "a" / "config.json").read_text())
    together = {**settings["rope_scaling"], "rope_theta": settings["rope_theta"]}
    settings_changed(tmp_path / "a", rope_parameters=together, rope_scaling=None, rope_theta=None)
    assert open_model(tmp_path / "a").config == before
    settings_changed(tmp_path / "a", rope_parameters={**together, "rope_type": "dynamic"})
    with pytest.raises(UserError, match="scales rotary positions by 'dynamic'"):
        open_model(tmp_path / "a")


NORM = "model.layers.1.input_layernorm.weight"


def renamed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {("model.layers.1.other.weight" if name == NORM else name): value for name, value in tensors.items()}


def reshaped(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**tensors, NORM: tensors[NORM][:-1], "lm_head.weight": tensors["lm_head.weight"].T}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, rf"1 missing: {NORM}; 1 not used: model\.layers\.1\.other\.weight$"),
        (reshaped, r"2 of the wrong shape: lm_head\.weight \(16, 48\) instead of \(48, 16\), .*\(15,\) instead of"),
        (
            lambda tensors: {"lm_head.weight": tensors["lm_head.weight"]},
            r"24 missing: model\.embed_tokens.* and 12 more",
        ),
    ],
)
def test_all_that_is_wrong_is_said_at_once(change: Callable[..., Any], words: str, tmp_path: Path):
    write(tmp_path / "a", BASE)
    put(tmp_path / "a", change(raw(tmp_path / "a")))
    with pytest.raises(UserError, match=words):
        read(tmp_path / "a")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def torn(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00\x01\x02")


def lying(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[NORM]["shape"] = [10**15, 16]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: "../model.safetensors"}}))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, r"is truncated: the tensor .* ends after the file"),
        (torn, "is truncated or no safetensors file"),
        (lying, rf"the tensor {NORM} has not the bytes that its shape"),
        (outside, r"names the file '\.\./model\.safetensors' for .*; only \.safetensors beside it"),
        (pickled, "its .bin files are pickles, which are not read"),
        (lambda f: settings_changed(f, architectures=["Qwen3ForCausalLn"]), "did you mean 'Qwen3ForCausalLM'"),
        (lambda f: settings_changed(f, architectures=["BertModel"]), "BertModel is not known; known are DeepseekV3"),
        (lambda f: settings_changed(f, hidden_act="gelu"), "hidden_act='gelu'; only 'silu' is supported"),
        (lambda f: settings_changed(f, num_hidden_layers=None), "lacks 'num_hidden_layers'"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: shutil.rmtree(f), "does not exist"),
    ],
)
def test_a_damaged_directory_is_refused(damage: Callable[[Path], Any], words: str, tmp_path: Path):
    write(tmp_path / "a", BASE)
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=words):
        read(tmp_path / "a")


def test_a_copy_that_differs_is_refused(tmp_path: Path):
    write(tmp_path / "a", CONFIGS["deepseek_v3"])
    tensors = raw(tmp_path / "a")
    tensors["model.layers.3.embed_tokens.weight"][0, 0] += 1
    put(tmp_path / "a", tensors)
    with pytest.raises(UserError, match=r"model\.layers\.3\.embed_tokens\.weight of .* is not the copy of"):
        read(tmp_path / "a")


def test_nothing_half_written(tmp_path: Path):
    """A directory that holds something is left alone; one that cannot be finished does not appear."""
    write(tmp_path / "a", BASE)
    with pytest.raises(UserError, match="exists already"):
        write(tmp_path / "a", BASE)
    weights = dict(weights_of(BASE))
    del weights["norm.weight"]
    with pytest.raises(KeyError):
        write_checkpoint(tmp_path / "b", BASE, make_skeleton(BASE, stacked=False).shapes, weights, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_combination_without_a_family_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no architecture of transformers has this combination"):
        write(tmp_path / "a", replace(BASE, attention_gate=True))


def test_every_weight_has_one_rule():
    for config in CONFIGS.values():
        names = [name for rule in model_rules(config, family_of_config(config)) for name in rule.ours]
        assert sorted(names) == sorted(make_skeleton(config, stacked=False).shapes)


def test_over_a_mesh(tmp_path: Path):
    """Each device is given just its share, and the shares are those of the whole."""
    weights = write(tmp_path / "a", CONFIGS["qwen3_moe"])
    mesh = make_mesh(MeshConfig(expert=2, tensor=2), jax.devices()[:4])
    model = read_model(open_model(tmp_path / "a"), mesh, dtype="float32")
    layer = model.stacks[0].blocks[0].feed_forward
    assert isinstance(layer, MoE)
    gate = layer.gate_EDF[...]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 16, 5)}
    assert np.array_equal(gate, weights["stacks.0.blocks.0.feed_forward.gate_EDF"])


def test_a_view_is_not_read_until_it_is_used(tmp_path: Path):
    """Opening a checkpoint reads headers alone: its tensors may be larger than memory."""
    write(tmp_path / "a", BASE)
    checkpoint = Checkpoint(tmp_path / "a")
    view = checkpoint.read("model.embed_tokens.weight")
    assert not view.flags.owndata and not view.flags.writeable
