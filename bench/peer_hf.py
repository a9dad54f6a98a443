"""The Hugging Face side, run by an interpreter with torch and transformers; imports nothing of ours.

    PEER_PYTHON bench/peer_hf.py JOB

JOB is JSON: `what`, `config` (arguments of Qwen3MoeConfig) and what the measurement takes. The last line on stdout
is the result: rates, and when they were taken, by the clock that all processes share.
"""

import json
import statistics
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

LEARNING_RATE, DECAY, BETAS = 3e-4, 0.1, (0.9, 0.95)
FIRST_TOKEN = 4
LEAST_SECONDS = 1.0


class Clock:
    """Seconds of calls, and when they ran."""

    def __init__(self):
        self.spans = []

    def take(self, function, repeats):
        begin = time.monotonic()
        seconds = []
        while len(seconds) < repeats or sum(seconds) < LEAST_SECONDS:
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        self.spans.append((begin, time.monotonic()))
        return seconds


def build(config, experts):
    """A model with random weights, in float32."""
    torch.manual_seed(0)
    settings = transformers.Qwen3MoeConfig(**config)
    settings._experts_implementation = experts
    settings._attn_implementation = "sdpa"
    return transformers.Qwen3MoeForCausalLM(settings)


def train_one(config, experts, batch, seq, repeats):
    """Seconds of training steps with one implementation of the experts."""
    model = build(config, experts).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=DECAY, betas=BETAS, fused=True)
    ids = torch.randint(FIRST_TOKEN, config["vocab_size"], (batch, seq))

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    clock = Clock()
    step()
    step()
    return clock.take(step, repeats), clock.spans


def train(config, experts, batch, seq, repeats):
    """Tokens per second of a step with fused AdamW, with the fastest of the `experts` implementations."""
    tried = {name: train_one(config, name, batch, seq, repeats) for name in experts}
    best = min(tried, key=lambda name: statistics.median(tried[name][0]))
    seconds, spans = tried[best]
    others = {name: batch * seq / statistics.median(taken) for name, (taken, _) in tried.items()}
    return {"rates": [batch * seq / s for s in seconds], "spans": spans, "experts": best, "tried": others}


@torch.inference_mode()
def decode(config, experts, rows, prompt, new, repeats):
    """Tokens per second of greedy `generate`: the time of a whole reply less that of its first token."""
    model = build(config, experts[0]).eval()
    ids = torch.randint(FIRST_TOKEN, config["vocab_size"], (rows, prompt))
    more = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def generate(tokens):
        out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **more)
        assert out.shape == (rows, prompt + tokens)

    clock = Clock()
    generate(8)
    generate(1)
    first = statistics.median(clock.take(lambda: generate(1), repeats))
    whole = clock.take(lambda: generate(new), repeats)
    rates = [rows * (new - 1) / (seconds - first) for seconds in whole]
    return {"rates": rates, "spans": clock.spans, "experts": experts[0], "first_token_seconds": first}


@torch.inference_mode()
def prefill(config, experts, tokens, repeats):
    """Prompt tokens per second of a bare forward pass that fills a cache and gives the last token's logits."""
    model = build(config, experts[0]).eval()
    ids = torch.randint(FIRST_TOKEN, config["vocab_size"], (1, tokens))

    def run():
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)

    clock = Clock()
    run()
    run()
    rates = [tokens / seconds for seconds in clock.take(run, repeats)]
    return {"rates": rates, "spans": clock.spans, "experts": experts[0]}


def delta(config, tokens, repeats):
    """Tokens per second of one Gated DeltaNet layer of Qwen3-Next, forward and backward."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet  # pyright: ignore

    torch.manual_seed(0)
    layer = Qwen3NextGatedDeltaNet(transformers.Qwen3NextConfig(**config), 0).float()
    x = torch.randn(1, tokens, config["hidden_size"], requires_grad=True)
    dy = torch.randn_like(x)

    def step():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(dy)

    clock = Clock()
    step()
    step()
    return {"rates": [tokens / seconds for seconds in clock.take(step, repeats)], "spans": clock.spans}


def main():
    """Measures the job in the first argument and prints the result."""
    job = json.loads(sys.argv[1])
    result = {"train": train, "decode": decode, "prefill": prefill, "delta": delta}[job.pop("what")](**job)
    result["versions"] = {"transformers": transformers.__version__, "torch": torch.__version__}
    result["threads"] = torch.get_num_threads()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
