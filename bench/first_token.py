"""The first token of a fresh process: `python -m bench.first_token MODEL BEGAN PROMPT`, as `qmax generate` comes to it.

BEGAN is when the process was started, by the clock that all processes share (`time.monotonic`), and PROMPT a number of
tokens. The last line on stdout is the result: seconds of each part, one after the other, in order.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Does it and prints the seconds. Nothing is imported before it is timed."""
    path, last, length = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    parts: dict[str, list[float]] = {}

    def passed(part: str) -> None:
        nonlocal last
        now = time.monotonic()
        parts[part] = [now - last]
        last = now

    passed("python")
    import jax

    passed("import jax")
    import serve.generate_verb  # noqa: F401
    from model.load import open_decoder
    from serve.engine import Engine
    from serve.kept import Kept
    from serve.sampling_params import SamplingParams
    from sharding.runtime import configure_jax

    passed("import the rest")
    configure_jax()
    model, tokenizer = open_decoder(path)
    passed("open")
    engine = Engine(model, tokenizer, slots=1, kept=Kept.beside_jax())
    jax.block_until_ready((engine.device.leaves, engine.device.state))
    passed("read weights, programs meanwhile")
    for shape in engine.device.programs.shapes[:2]:  # the second token's is sent for before the first is read
        assert engine.device.programs[shape]
    passed("programs")
    prompt = [4 + index % (tokenizer.vocab_size - 4) for index in range(length)]
    next(engine.stream(prompt, SamplingParams(temperature=0.0, max_tokens=2, stop_ids=())))
    passed("first token")
    print(json.dumps({"samples": parts}), flush=True)


if __name__ == "__main__":
    main()
