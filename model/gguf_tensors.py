"""How tensors under the names of GGUF correspond to weights of ours, by the rules of `model.hf.rules`.

llama.cpp keeps the rotary pairs of its architecture `llama` side by side, as Meta's code and llama2.c do; those of
the Qwen architectures lie half a head apart, as ours do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from model.config import ModelConfig
from model.hf.placing import Reading
from model.hf.rules import Get, Matrix, Part, Same, Shapes, to_halves


@dataclass(frozen=True)
class Bias:
    """`[N * H]` of theirs as `[N, H]`. rotary: as in `Part`."""

    theirs: str
    name: str
    rotary: int = 0

    @property
    def ours(self) -> tuple[str, ...]:
        return (self.name,)

    def expected(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        return {self.theirs: (prod(shapes[self.name]),)}

    def read(self, get: Get, shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]:
        heads = get(self.theirs).reshape(shapes[self.name])
        yield self.name, to_halves(heads, 1, self.rotary) if self.rotary else heads


@dataclass(frozen=True)
class Experts:
    """A matrix for each expert in one tensor, outputs before inputs; ours has `[E, D, F]`, whichever of them D is."""

    theirs: str
    name: str
    turned: bool = True

    @property
    def ours(self) -> tuple[str, ...]:
        return (self.name,)

    def expected(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        experts, width, hidden = shapes[self.name]
        return {self.theirs: (experts, hidden, width) if self.turned else (experts, width, hidden)}

    def read(self, get: Get, shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]:
        yield self.name, get(self.theirs).swapaxes(1, 2) if self.turned else get(self.theirs)


def model_rules(config: ModelConfig, *, interleaved: bool) -> list[Reading]:
    """The whole table of a model in list form. interleaved: rotary pairs lie side by side in the file."""
    rules: list[Reading] = [Same("token_embd.weight", "embedding_VD"), Same("output_norm.weight", "norm.weight")]
    if not config.tie_embeddings:
        rules.append(Matrix("output.weight", (Part("head_DV"),)))
    rotary = config.head_dim if interleaved else 0
    for layer in range(config.num_layers):
        rules += _attention(config, f"blk.{layer}.", f"stacks.0.blocks.{layer}.", rotary)
        rules += _feed_forward(config, layer, f"blk.{layer}.", f"stacks.0.blocks.{layer}.")
    return rules


def _attention(config: ModelConfig, theirs: str, block: str, rotary: int) -> list[Reading]:
    ours = f"{block}attention."
    rules: list[Reading] = [
        Same(f"{theirs}attn_norm.weight", f"{block}attention_norm.weight"),
        Matrix(f"{theirs}attn_q.weight", (Part(f"{ours}q_DNH", rotary=rotary),)),
        Matrix(f"{theirs}attn_k.weight", (Part(f"{ours}k_DKH", rotary=rotary),)),
        Matrix(f"{theirs}attn_v.weight", (Part(f"{ours}v_DKH"),)),
        Matrix(f"{theirs}attn_output.weight", (Part(f"{ours}o_NHD", inputs=2),)),
    ]
    if config.qkv_bias:
        rules += [
            Bias(f"{theirs}attn_q.bias", f"{ours}q_bias_NH", rotary),
            Bias(f"{theirs}attn_k.bias", f"{ours}k_bias_KH", rotary),
            Bias(f"{theirs}attn_v.bias", f"{ours}v_bias_KH"),
        ]
    if config.output_bias:
        rules.append(Same(f"{theirs}attn_output.bias", f"{ours}o_bias_D"))
    if config.qk_norm:
        rules += [Same(f"{theirs}attn_{name}_norm.weight", f"{ours}{name}_norm.weight") for name in ("q", "k")]
    return rules


def _feed_forward(config: ModelConfig, layer: int, theirs: str, block: str) -> list[Reading]:
    ours = f"{block}feed_forward."
    norm = Same(f"{theirs}ffn_norm.weight", f"{block}feed_forward_norm.weight")
    names = {"gate": "gate_DF", "up": "up_DF", "down": "down_FD"}
    if not config.is_moe(layer):
        return [norm, *(Matrix(f"{theirs}ffn_{name}.weight", (Part(ours + own),)) for name, own in names.items())]
    names = {"gate": "gate_EDF", "up": "up_EDF", "down": "down_EDF"}
    router = Matrix(f"{theirs}ffn_gate_inp.weight", (Part(f"{ours}router_DE"),))
    matrices = (Experts(f"{theirs}ffn_{name}_exps.weight", ours + own, name != "down") for name, own in names.items())
    return [norm, router, *matrices]
