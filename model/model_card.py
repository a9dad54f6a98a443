"""The card of a model that `qmax convert` writes: README.md as Hugging Face reads it, facts first, then how to load it.

The header is that of https://huggingface.co/docs/hub/model-cards. A licence and a base model are repeated where the
source's own card names them, and never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.hf.families import family_of_config
from model.load import RunSource, Source, read_origin
from model.lora_config import LoraConfig

CARD = "README.md"
LICENCE = ("license", "license_name", "license_link")
MEASURED = {
    "validation_loss": "validation loss",
    "validation_accuracy": "validation accuracy",
    "validation_reward": "validation reward",
}
"""What a run says of held-out rows: its name in metrics.jsonl -> in the card."""
PLAIN = re.compile(r"(?!(?:true|false|yes|no|on|off|null)$)[A-Za-z][\w./-]*", re.IGNORECASE)
"""Words that YAML takes for text without quotes."""

Fields = dict[str, str | list[str]]
"""The header of a card, as much of it as is asked for."""


def model_card(source: Source, name: str, tokens: int, dtype: str) -> bytes:
    """README.md of a model directory.

    Args:
        source: what is converted.
        name: of the directory.
        tokens: of its tokenizer; 0 where there is none.
        dtype: what most of its weights are stored as.
    """
    config, labelled = source.config, bool(source.config.num_labels)
    family = family_of_config(config)
    header: Fields = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if labelled else "text-generation",
        "tags": ["qmax", family.model_type, *(["mixture-of-experts"] if config.moe.num_experts else [])],
        **inherited(source),
    }
    facts = {"architecture": f"`{family.name_of(config)}`", **sizes(config), "weights": dtype}
    facts["tokenizer"] = f"{tokens:,} tokens" if tokens else "none"
    rows = [f"| {what} | {value} |" for what, value in facts.items()]
    parts = [
        f"# {name}",
        "\n".join(["| | |", "| --- | --- |", *rows]),
        "## Where it comes from",
        "\n\n".join(history(source)),
        "## How to load it",
        *loading(source, name, tokenizer=bool(tokens)),
    ]
    return page(header, parts)


def adapter_card(source: RunSource, name: str, base: str, parameters: int) -> bytes:
    """README.md of a directory of PEFT's: adapters for the model `base`, of so many `parameters`."""
    header: Fields = {
        "library_name": "peft",
        "base_model": base,
        "pipeline_tag": "text-generation",
        "tags": ["qmax", "lora", f"base_model:adapter:{base}"],
        **inherited(source),
    }
    model = f"`{base}`"
    if (Path(base) / "checkpoints").is_dir():
        model += " (a run of qmax, which `qmax convert` makes a directory for transformers of)"
    code = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(base)})\n"
        f"model = PeftModel.from_pretrained(model, {json.dumps(name)})"
    )
    parts = [
        f"# {name}",
        f"Adapters of low rank for {model}: {adapters(source.lora)}, {parameters:,} parameters.",
        "## Where they come from",
        "\n\n".join(history(source)),
        "## How to load them",
        f"```python\n{code}\n```",
        f"With qmax: `qmax serve {base} --adapter tuned={name}`.",
    ]
    return page(header, parts)


def sizes(config: ModelConfig) -> dict[str, str]:
    """What a reader wants to know of a model's sizes."""
    total, active, moe = config.parameters_total, config.parameters_active, config.moe
    found = {
        "parameters": f"{total:,}" + (f", of which a token uses {active:,}" if active != total else ""),
        "layers": f"{config.num_layers} of width {config.hidden_size:,}",
        "attention": f"{config.num_heads} heads, {config.num_kv_heads} of keys and values",
    }
    if len(config.attention_pattern) > 1:
        found["attention"] += f", layers in turn {', '.join(config.attention_pattern)}"
    if config.latent.kv_rank:
        found["attention"] = f"{config.num_heads} heads, latent ({config.latent.kv_rank} numbers a token)"
    if moe.num_experts:
        found["experts"] = f"{moe.num_experts} in {config.num_moe_layers} layers, {moe.experts_per_token} a token"
        found["experts"] += ", and a shared one" if moe.shared_intermediate_size else ""
    if config.num_labels:
        found["labels"] = str(config.num_labels)
    if config.mtp_layers:
        found["multi-token prediction"] = f"a block of {config.mtp_parameters:,} parameters more"
    return found | {"context": f"{config.max_positions:,} positions"}


def adapters(lora: LoraConfig) -> str:
    """`rank 8, alpha 16, of q k v o`."""
    return f"rank {lora.rank}, alpha {lora.alpha:g}, of {' '.join(lora.targets)}"


# ---- where it comes from --------------------------------------------------------
def history(source: Source) -> list[str]:
    """Paragraphs about what was converted, without the directories above it, which are nobody's business."""
    if not isinstance(source, RunSource):
        return [f"Converted from `{source.path.absolute().name}` by `qmax convert`."]
    run = json.loads((source.path / "config.json").read_text(encoding="utf-8"))["run"]
    records = list(read_records(source.path / "metrics.jsonl", source.step))
    facts = [
        f"objective {run.get('objective', 'pretrain')}",
        f"step {source.step:,} of {run.get('steps', source.step):,}",
    ]
    if seen := tokens_seen(records, source.step):
        facts.append(f"{seen} tokens seen")
    for key, words in MEASURED.items():
        values = [record[key] for record in records if isinstance(record.get(key), (int, float))]
        facts += [f"last {words} {values[-1]:.4g}"] if values else []
    found = [f"Trained by qmax in the run `{source.path.absolute().name}`: {', '.join(facts)}."]
    base, how = read_origin(source.path)
    if base:
        cut = ", whose feed-forward layers were cut into experts" if how == "upcycle" else ""
        found.append(f"It began as `{Path(base).name}`{cut}.")
    if source.lora.rank:
        found.append(f"Adapters were trained: {adapters(source.lora)}.")
    return found


def read_records(path: Path, step: int) -> Iterator[dict[str, Any]]:
    """Records of metrics.jsonl up to a step; none where there is no such file."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step:
            yield record


def tokens_seen(records: Sequence[Mapping[str, Any]], steps: int) -> str:
    """Tokens of all steps; an estimate where not every step was logged, "" where none was."""
    counts = [record["tokens"] for record in records if isinstance(record.get("tokens"), int)]
    if not counts:
        return ""
    if len(counts) == steps:
        return f"{sum(counts):,}"
    return f"about {round(sum(counts) / len(counts) * steps):,}"


def inherited(source: Source) -> Fields:
    """Licence and base model of the source's own card; of a run, the licence of what it began as."""
    if not isinstance(source, RunSource):
        return read_card(source.path, (*LICENCE, "base_model"))
    path, seen = source.path, set[Path]()
    while (path / "checkpoints").is_dir() and path not in seen:
        seen.add(path)
        base = read_origin(path)[0]
        if not base:
            return {}
        path = Path(base)
    return read_card(path, LICENCE)


def read_card(path: Path, keys: Sequence[str]) -> Fields:
    """Texts and lists of texts under `keys` in the header of a directory's card; what is anything else is left out."""
    card = path / CARD
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
    header = re.match(r"---\n(.*?\n)---\s*(\n|$)", text, re.DOTALL)
    found: Fields = {}
    key = ""
    for line in header.group(1).splitlines() if header else ():
        if field := re.match(r"(\w+):(?:\s+(.*))?$", line):
            key, value = field.group(1), _scalar(field.group(2) or "")
            if key in keys and value:
                found[key] = value
        elif (item := re.match(r"\s*-\s+(.*)$", line)) and key in keys and (value := _scalar(item.group(1))):
            before = found.get(key, [])
            if isinstance(before, list):
                found[key] = [*before, value]
    return found


def _scalar(text: str) -> str:
    """A text of YAML that stands in one line; "" for what is none."""
    quoted = re.match(r"""(["'])([^"'\\]*)\1\s*(?:#.*)?$""", text)
    if quoted:
        return quoted.group(2)
    plain = re.sub(r"\s+#.*$", "", text).strip()
    return "" if not plain or plain[0] in "[{&*!|>%@`\"'#" or ": " in plain else plain


# ---- how it is written -----------------------------------------------------------
def loading(source: Source, name: str, *, tokenizer: bool) -> list[str]:
    """Paragraphs on how to load a model directory, by transformers and by qmax."""
    labelled = bool(source.config.num_labels)
    kind = "AutoModelForSequenceClassification" if labelled else "AutoModelForCausalLM"
    code = f"from transformers import {kind}{', AutoTokenizer' if tokenizer else ''}\n\n"
    code += f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})\n" if tokenizer else ""
    code += f"model = {kind}.from_pretrained({json.dumps(name)})"
    if not tokenizer:
        return [f"```python\n{code}\n```", "There is no tokenizer here: it has to be put beside the weights."]
    if labelled:
        ours = f"With qmax it starts a run (`--init-from {name}`) or rewards one (`--rl.rewards model:{name}`)."
        return [f"```python\n{code}\n```", ours]
    words = [f'qmax generate {name} --prompt "Once upon a time"', f"qmax serve {name}"]
    if not isinstance(source, RunSource) or objective_of(source) != "pretrain":
        words.insert(0, f"qmax chat {name}")
    return [f"```python\n{code}\n```", "With qmax:", "```\n" + "\n".join(words) + "\n```"]


def objective_of(source: RunSource) -> str:
    """What a run learned from."""
    run = json.loads((source.path / "config.json").read_text(encoding="utf-8"))["run"]
    return str(run.get("objective", "pretrain"))


def page(header: Fields, parts: Sequence[str]) -> bytes:
    """A card: its header, and paragraphs."""
    lines = ["---"]
    for key, value in header.items():
        lines += (
            [f"{key}: {_yaml(value)}"] if isinstance(value, str) else [f"{key}:", *(f"- {_yaml(v)}" for v in value)]
        )
    return ("\n".join([*lines, "---", ""]) + "\n" + "\n\n".join(parts) + "\n").encode()


def _yaml(text: str) -> str:
    """A text of YAML: JSON where it could be read as something else."""
    return text if PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
