"""Law: PEFT computes with an exported adapter what we compute with the run, and so does the merged export."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import qmax
from model.hf.safetensors import Directory
from model.load import open_model, read_model
from model.tokenizer import Tokenizer
from sharding.mesh import MeshConfig, make_mesh

from . import carry, hf_families

pytestmark = [
    pytest.mark.skipif(os.environ.get("QMAX_PARITY") != "1", reason="./run.sh test --parity"),
    # What torch and transformers warn of is theirs to mend.
    pytest.mark.filterwarnings("default"),
]

TOLERANCE = 1e-4
NAMES = ["qwen3", "qwen2", "llama", "qwen3_5"]
"""The last has query and gate in one matrix, whose rank is that of both."""
TOKENIZER = Path("configs/demo_data/tiny_tokenizer")
CONFIG = """
from configs.run import DataConfig, OptimizerConfig, Run
from model.lora_config import LoraConfig

def run():
    return Run(
        init_from={base!r},
        init_model="source",
        lora=LoraConfig(rank=3, alpha=2.0, rank_stabilized={stabilized}),
        data=DataConfig(
            sources=("configs/demo_data/pretrain_en_tinystories.jsonl.gz",),
            tokenizer={tokenizer!r},
            sequence_length=32,
            batch_size=2,
        ),
        optimizer=OptimizerConfig(learning_rate=0.05, warmup_steps=0),
        steps=2,
    )
"""


@pytest.mark.parametrize("name", NAMES)
def test_peft_computes_the_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model_class, config_class, options = hf_families.FAMILIES[name]
    vocabulary = Tokenizer.load(TOKENIZER).vocab_size
    own = (model_class, config_class, {**options, "vocab_size": vocabulary})
    monkeypatch.setitem(hf_families.FAMILIES, name, own)
    base, run, adapter, merged = (tmp_path / part for part in ("base", "run", "adapter", "merged"))
    hf_families.save(hf_families.build(name, 3), base)
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(base=str(base), tokenizer=str(TOKENIZER), stabilized=name == "llama"))
    assert qmax.main(["train", str(config), "--out", str(run)]) == 0
    assert qmax.main(["convert", str(run), str(adapter), "--adapter"]) == 0
    assert qmax.main(["convert", str(run), str(merged), "--dtype", "float32"]) == 0

    model = read_model(open_model(run), make_mesh(MeshConfig()), dtype="float32")
    tokens_BT, lengths = carry.example(model.config, 3, (12, 12))
    ours = np.asarray(carry.logits(model, carry.batch_of(tokens_BT, lengths)))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    before = hf_families.logits(plain, tokens_BT)
    with_adapter = PeftModel.from_pretrained(plain, adapter).eval()
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, attn_implementation="eager").eval()
    assert np.abs(ours - before).max() > 100 * TOLERANCE, "the adapter makes a difference"
    assert np.abs(hf_families.logits(with_adapter, tokens_BT) - ours).max() <= TOLERANCE
    assert np.abs(hf_families.logits(whole, tokens_BT) - ours).max() <= TOLERANCE
    names = {key for key, _ in with_adapter.named_parameters() if ".lora_" in key}
    entries = Directory(adapter, "adapter_model.safetensors").entries
    written = {key.replace(".weight", ".default.weight") for key in entries}
    assert names == written, "PEFT gives an adapter to just the modules that have one"
