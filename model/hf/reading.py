"""A Hugging Face directory to our weights, tensor by tensor, straight onto the devices that hold them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError
from model.config import ModelConfig
from model.hf.families import family_of_settings
from model.hf.placing import TensorFiles, compare, expected_tensors
from model.hf.quantised import Tensors, fp8_block
from model.hf.rules import Copy, ExpertsEach, ExpertsFused, Rule, Shapes
from model.hf.safetensors import Directory
from model.hf.settings import labels
from model.hf.tables import Experts, experts_layout, model_rules
from model.tokenizer import Tokenizer

IGNORED = re.compile(r"rotary_emb\.inv_freq$|^model\.visual\.|^visual\.")
"""Tensors that hold nothing a text model needs."""


class Checkpoint(TensorFiles):
    """A model directory with config.json and safetensors.

    Raises:
        UserError: config.json or a tensor file is missing or damaged, or the architecture is not known.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        settings = read_settings(self.path)
        self.family = family_of_settings(settings)
        text = settings.get("text_config")
        self.nested = isinstance(text, dict)
        self.settings: dict[str, Any] = {**settings, **text} if isinstance(text, dict) else settings
        self.tensors = Tensors(Directory(self.path), fp8_block(self.settings))
        self.names = {plain_name(name): name for name in self.tensors.shapes}
        self.config = self._config()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the weights."""
        return Tokenizer.load(self.path)

    def _config(self) -> ModelConfig:
        try:
            config = self.family.read(self.settings)
        except UserError as exc:
            raise UserError(f"{self.path / 'config.json'}: {exc}") from exc
        except (TypeError, ValueError, AttributeError) as exc:
            raise UserError(f"{self.path / 'config.json'} is damaged: {exc}") from exc
        beside = any(name.startswith("mtp.") for name in self.names)
        further = f"model.layers.{config.num_layers}.eh_proj.weight" in self.names
        tied = config.tie_embeddings and "lm_head.weight" not in self.names
        layers = int(beside or further)
        head = {"tie_embeddings": tied, "num_labels": labels(self.settings)}
        return replace(config, mtp_layers=layers, layout=self.family.model_type, **head)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor by its plain name."""
        return self.tensors.shapes[self.names[name]]

    def read(self, name: str) -> np.ndarray:
        """A tensor by its plain name; a view of its file where it needs no arithmetic."""
        return self.tensors.read(self.names[name])

    def experts(self) -> Experts:
        """How experts lie in this checkpoint, told from names and shapes."""
        fused = sorted(name for name in self.names if name.endswith("mlp.experts.gate_up_proj"))
        if self.family.model_type == "gpt_oss":
            return experts_layout(self.config, self.family)
        if not fused:
            return lambda theirs: ExpertsEach("", theirs)
        turned = self.shape(fused[0])[1] == self.config.hidden_size != 2 * self.config.moe.intermediate_size
        return lambda theirs: ExpertsFused("", theirs, turned)

    def rules(self, shapes: Shapes) -> list[Rule]:
        """The table of this checkpoint, after a check that it is complete.

        Raises:
            UserError: tensors that are missing, unknown or of another shape, all of them together; or one that should
                repeat another does not.
        """
        rules = model_rules(self.config, self.family, self.experts())
        copies = [rule for rule in rules if isinstance(rule, Copy)]
        compare(
            expected_tensors(rules, shapes),
            {plain: self.tensors.shapes[name] for plain, name in self.names.items()},
            str(self.path),
            optional={name for copy in copies for name in copy.expected(shapes)},
            ignored=[name for name in self.names if IGNORED.search(name)],
        )
        for copy in copies:
            self._check_copy(copy, rules, shapes)
        return rules

    def _check_copy(self, copy: Copy, rules: list[Rule], shapes: Shapes) -> None:
        """UserError if a tensor that should repeat another does not."""
        (name,) = copy.expected(shapes)
        if name not in self.names:
            return
        original = next(r for r in rules if not isinstance(r, Copy) and set(r.ours) & set(copy.rule.ours))
        (other,) = original.expected(shapes)
        if not np.array_equal(self.read(name), self.read(other)):
            raise UserError(f"{name} of {self.path} is not the copy of {other} that it should be")


def plain_name(name: str) -> str:
    """The name in a text-only checkpoint of a tensor of one with more modalities."""
    return re.sub(r"^(model\.language_model|language_model\.model)\.", "model.", name)


def read_settings(path: Path) -> dict[str, Any]:
    """config.json. UserError where it is missing or damaged."""
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError as exc:
        raise UserError(f"{path} holds no readable config.json: {exc.strerror}") from exc
    except ValueError as exc:
        raise UserError(f"{path / 'config.json'} is not JSON: {exc}") from exc
    if not isinstance(settings, dict):
        raise UserError(f"{path / 'config.json'} must hold a JSON object")
    return settings
