"""Law: a row with an adapter is answered as by the model that has it added, whatever the rows beside it have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import qmax
from errors import UserError
from model.adapter_export import convert_adapter, modules_of, settings_of, write_adapter
from model.adapters import Adapter, read_adapter
from model.config import ModelConfig
from model.forward import continuation, forward, unembed
from model.hf.families import family_of_config
from model.hf.rules import Matrix
from model.hf.safetensors import header_of, write_tensor
from model.hf.tables import model_rules
from model.load import load_model, open_model
from model.lora import merge
from model.lora_config import TARGETS, LoraConfig
from model.transformer import Transformer
from model.tree import Skeleton, make_skeleton
from serve.engine import Engine
from serve.sampling_params import SamplingParams
from tests.test_hf import CONFIGS
from tests.test_lora import MODELS
from tests.tiny import DENSE

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, stop_ids=())


class Words:
    vocab_size = 64
    stop_ids = (1,)


def drawn(config: ModelConfig, rank: int, seed: int) -> Adapter:
    """An adapter of everything that can have one by name."""
    skeleton, draw = make_skeleton(config, stacked=False), np.random.default_rng(seed)
    parts = {}
    for name, sums in skeleton.sums.items():
        if 0 in sums and name.rpartition(".")[2].rpartition("_")[0] in TARGETS:
            shape = skeleton.shapes[name]
            own = shape[: len(sums)], shape[len(sums) :]
            a, b = (draw.standard_normal((rank, *dims)).astype(np.float32) * 0.2 for dims in own)
            parts[name] = a, b
    return Adapter(parts, 0.5)


def added(model: Transformer, adapter: Adapter) -> Transformer:
    """The model with the adapter in its weights."""
    skeleton = Skeleton(model)
    weights, state = skeleton.split(model)
    arrays: dict[str, Any] = {}
    for name, leaf in weights.items():
        own = adapter.parts.get(name)
        arrays |= {name: leaf} if own is None else {f"{name}.base": leaf, f"{name}.a": own[0], f"{name}.b": own[1]}
    config = LoraConfig(rank=2, alpha=2 * adapter.scale)
    return skeleton.merge(merge(arrays, skeleton.sums, config), state)


@jax.jit
def logprobs(model: Transformer, row: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(unembed(model, forward(model, continuation(row, jnp.zeros(1, jnp.int32))).hidden_BTD))


@pytest.mark.parametrize(
    "kind", ["dense", "moe", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("latent", "hybrid"))]
)
def test_rows_with_adapters_are_the_models_with_them_added(kind: str) -> None:
    config = MODELS[kind]
    model = jax.jit(lambda: Transformer(config, jax.random.key(1), stacked=False))()
    adapters = [drawn(config, 2, 1), drawn(config, 3, 2)]
    engine = Engine(model, Words(), slots=4, adapters=adapters)
    prompt = list(range(2, 30))
    requests = [engine.request(prompt, GREEDY, adapter=number) for number in (1, 0, 2, 1)]
    for _ in engine._until_done(requests):  # with numbers of adapters, which `generate` does not take
        pass
    whole = [model, *(added(model, one) for one in adapters)]
    for number, request in zip((1, 0, 2, 1), requests, strict=True):
        expected_TV = np.asarray(logprobs(whole[number], jnp.asarray([request.known])))[0, len(prompt) - 1 : -1]
        assert request.tokens == expected_TV.argmax(-1).tolist()
        np.testing.assert_allclose(request.logprobs, expected_TV.max(-1), atol=1e-4)
    assert len({tuple(request.tokens) for request in requests}) == 3, "the adapters make a difference"


def write_peft(path: Path, config: ModelConfig, tensors: Mapping[str, np.ndarray], **settings: Any) -> Path:
    path.mkdir(exist_ok=True)
    given = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none", **settings}
    (path / "adapter_config.json").write_text(json.dumps(given))
    named = {f"base_model.model.{name}": array for name, array in tensors.items()}
    with (path / "adapter_model.safetensors").open("wb") as stream:
        stream.write(header_of({name: (array.dtype, array.shape) for name, array in named.items()}))
        for array in named.values():
            write_tensor(stream, array)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_a_directory_of_peft_is_read_as_it_says(name: str, tmp_path: Path) -> None:
    """By its definition: the checkpoint's matrix W becomes W + alpha / r * B A."""
    config = CONFIGS[name]
    skeleton, draw = make_skeleton(config, stacked=False), np.random.default_rng(3)
    shapes, sums = skeleton.shapes, skeleton.sums
    tensors, wanted = {}, {}
    for rule in model_rules(config, family_of_config(config)):
        if not isinstance(rule, Matrix) or rule.taps:
            continue
        if any(name.rpartition(".")[2].rpartition("_")[0] not in TARGETS or name not in sums for name in rule.ours):
            continue
        ((theirs, (rows, columns)),) = rule.expected(shapes).items()
        a, b = (draw.standard_normal(size).astype(np.float32) for size in ((2, columns), (rows, 2)))
        stem = theirs.removesuffix(".weight")
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        wanted |= dict(rule.read(lambda _, a=a, b=b: 1.5 * b @ a, shapes))
    found = read_adapter(write_peft(tmp_path / "peft", config, tensors), config)
    assert found.parts.keys() == wanted.keys() and len(wanted) >= 6
    for name, (a, b) in found.parts.items():
        np.testing.assert_allclose(found.scale * np.tensordot(a, b, ((0,), (0,))), wanted[name], atol=1e-5)


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_for_peft_is_read_back(name: str, stabilized: bool, tmp_path: Path) -> None:
    """To the same bits, also where several weights of ours are one matrix there."""
    config, lora = CONFIGS[name], LoraConfig(rank=3, alpha=5.0, rank_stabilized=stabilized)
    adapter = Adapter(drawn(config, lora.rank, 1).parts, lora.scale)
    modules = modules_of(adapter.parts, config, tmp_path)
    settings = settings_of(modules, config, lora, "models/base")
    write_adapter(tmp_path / "peft", modules, settings, np.dtype("float32"))
    found = read_adapter(tmp_path / "peft", config)
    assert found.parts.keys() == adapter.parts.keys() and found.scale == pytest.approx(lora.scale)
    for path, pair in adapter.parts.items():
        for wanted, read in zip(pair, found.parts[path], strict=True):
            np.testing.assert_array_equal(read, wanted)


def test_modules_for_peft_by_hand() -> None:
    """Query and gate of Qwen3.5, one matrix of rank 2 with heads in turn, whose key has no adapter."""
    config = CONFIGS["qwen3_5_text"]
    shapes, draw = make_skeleton(config, stacked=False).shapes, np.random.default_rng(0)
    path = "stacks.0.blocks.1.attention."
    parts = {
        path + name: (draw.standard_normal((1, *shapes[path + name][:1])), draw.standard_normal((1, 4, 8)))
        for name in ("q_DNH", "gate_DNH")
    }
    modules = modules_of(parts, config, Path("run"))
    ((name, (a, b)),) = modules.items()
    assert name == "model.layers.1.self_attn.q_proj"
    assert a.shape == (2, 16) and b.shape == (64, 2)
    for head in range(4):
        np.testing.assert_allclose(b[16 * head : 16 * head + 8, 0], parts[path + "q_DNH"][1][0, head], rtol=1e-6)
        np.testing.assert_allclose(
            b[16 * head + 8 : 16 * head + 16, 1], parts[path + "gate_DNH"][1][0, head], rtol=1e-6
        )
        assert not b[16 * head : 16 * head + 8, 1].any() and not b[16 * head + 8 : 16 * head + 16, 0].any()
    settings = settings_of(modules, config, LoraConfig(rank=1, alpha=8.0), "base")
    assert settings["rank_pattern"] == {name: 2} and settings["alpha_pattern"] == {name: 16.0}
    assert settings["target_modules"] == [name], "layer 3 has a q_proj too, without an adapter"


@pytest.mark.parametrize(
    ("settings", "size", "said"),
    [
        ({"peft_type": "IA3"}, 32, "peft_type IA3"),
        ({"use_dora": True}, 32, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, 32, "modules_to_save"),
        ({"r": "two"}, 32, "adapter_config.json is damaged"),
        ({}, 33, "does not fit"),
    ],
)
def test_what_is_no_adapter_of_this_model(settings: dict[str, Any], size: int, said: str, tmp_path: Path) -> None:
    stem = "model.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": np.ones((2, size)), f"{stem}.lora_B.weight": np.ones((32, 2))}
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    path = write_peft(tmp_path / "peft", DENSE, tensors, **settings)
    with pytest.raises(UserError, match=said):
        read_adapter(path, DENSE)
    more = {f"{stem}.lora_A.weight": tensors[f"{stem}.lora_A.weight"]}
    with pytest.raises(UserError):
        read_adapter(write_peft(path, DENSE, more), DENSE)
    with pytest.raises(UserError, match="holds no adapter"):
        read_adapter(tmp_path, DENSE)


def test_an_adapter_that_was_trained_is_served_by_its_name(tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    assert qmax.main(["train", "configs/tiny.py", "--steps", "1", "--out", str(base)]) == 0
    words = ["--init-from", str(base), "--optimizer.learning-rate", "0.1", "--lora.rank", "2"]
    words += ["--lora.targets", "q", "o"]
    assert qmax.main(["train", "configs/tiny.py", "--steps", "2", "--out", str(tuned), *words]) == 0
    (model, tokenizer), (whole, _) = load_model(base), load_model(tuned)
    adapter = read_adapter(tuned, open_model(base).config)
    engine = Engine(model, tokenizer, slots=2, context=128, adapters=[adapter])
    prompt = tokenizer.encode("Once upon a time")
    request = engine.request(prompt, GREEDY, adapter=1)
    for _ in engine._until_done([request]):
        pass
    (expected,) = Engine(whole, tokenizer, slots=2, context=128).generate([prompt], GREEDY)
    assert request.tokens == expected.tokens
    np.testing.assert_allclose(request.logprobs, expected.logprobs, atol=1e-4)
    with pytest.raises(UserError, match="run without adapters"):
        read_adapter(base, model.config)

    assert qmax.main(["convert", str(tuned), str(tmp_path / "peft"), "--adapter"]) == 0
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base) and settings["target_modules"] == ["o_proj", "q_proj"]
    card = (tmp_path / "peft" / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["library_name"], header["base_model"]) == ("peft", str(base)) and "license" not in header
    assert "rank 2, alpha 16, of q o" in card and 'PeftModel.from_pretrained(model, "peft")' in card
    for path, pair in read_adapter(tmp_path / "peft", model.config).parts.items():
        for wanted, read in zip(adapter.parts[path], pair, strict=True):
            np.testing.assert_array_equal(read, wanted)
    for source, said in ((base, "no run with adapters"), (tuned, "exists already")):
        with pytest.raises(UserError, match=said):
            convert_adapter(open_model(source), tmp_path / "peft")


def test_experts_are_not_for_peft() -> None:
    config = CONFIGS["qwen3_moe"]
    path = "stacks.0.blocks.0.feed_forward.up_EDF"
    with pytest.raises(UserError, match=r"adapts experts .* leave --adapter away"):
        modules_of({path: (np.zeros((4, 2, 16)), np.zeros((4, 2, 10)))}, config, Path("run"))
