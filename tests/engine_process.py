"""One process of an engine over several: what it says, as JSON on stdout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax

from model.load import load_model
from serve.engine import Engine
from serve.prompts import Prompts
from serve.sampling_params import SamplingParams
from sharding.hosts import Hosts, join_hosts
from sharding.mesh import MeshConfig, make_mesh
from sharding.peers import together

MODEL = Path(__file__).resolve().parent / "data" / "stories260K.bin"
MESH = MeshConfig(data=2, tensor=2)
WORDS = ["Once upon a time", "Lily was", "The dog"]
ASKED = [
    SamplingParams(temperature=0.0, max_tokens=20),
    SamplingParams(temperature=0.9, seed=5, max_tokens=12, presence_penalty=1.0, logit_bias=((100, 1.5),)),
    SamplingParams(temperature=0.7, seed=6, max_tokens=16, top_logprobs=3),
]


def replies(mesh: MeshConfig | None, *, led: bool) -> dict[str, Any]:
    """What the engine says; nothing in a process that is led."""
    model, tokenizer = load_model(MODEL, mesh)
    engine = Engine(model, tokenizer, mesh=mesh and make_mesh(mesh), slots=2, context=256, led=led)
    if led and jax.process_index():
        engine.device.follow()
        return {}
    prompts = [tokenizer.encode(words) for words in WORDS]
    found = engine.generate(prompts, ASKED)
    scored, _ = Prompts(engine.device).logprobs(prompts[0], 0)
    assert not engine.step(), "there is nothing to do, and those who are led stay"
    engine.device.stop()
    return {
        "tokens": [one.tokens for one in found],
        "logprobs": [one.logprobs for one in found],
        "scored": scored[1:],
    }


if __name__ == "__main__":
    address, count, index, led = sys.argv[1:]
    join_hosts(Hosts(address, int(count), int(index)))
    with together():
        print(json.dumps(replies(MESH, led=led == "led")))
