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

IMPORTED = time.monotonic()
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


@torch.inference_mode()
def arrivals(model, prompts, times, new, experts, repeats):
    """Completed tokens per second and mean latency of greedy replies to requests that come at these times.

    Two ways to make batches take turns. `who waits`: when idle, all that have come by then. `all`: one batch, when the
    last has come. All prompts are of one length and all replies too, so no row is filled up or waits for another.
    """
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, experts_implementation=experts, attn_implementation="sdpa"
    ).eval()
    more = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def generate(rows):
        ids = torch.tensor([prompts[row] for row in rows])
        out = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, **more)
        return out[:, ids.shape[1] :].tolist()

    def serve(least):
        start, end, done, latency, replies = time.perf_counter(), 0.0, 0, [], []
        while done < len(times):
            now = time.perf_counter() - start
            came = sum(at <= now for at in times) - done
            if came < min(least, len(times) - done):
                time.sleep(max(0.0, times[done + min(least, len(times) - done) - 1] - now))
                continue
            replies += generate(range(done, done + came))
            end = time.perf_counter() - start
            latency += [end - at for at in times[done : done + came]]
            done += came
        return end - times[0], sum(latency) / len(latency), replies

    policies = {"who waits": 1, "all": len(times)}
    samples = {f"{what}, {name}": [] for name in policies for what in ("rate", "latency")}
    generate(range(len(times)))
    begin, replies = time.monotonic(), []
    for _ in range(repeats):
        for name, least in policies.items():
            seconds, latency, replies = serve(least)
            samples[f"rate, {name}"].append(len(times) * new / seconds)
            samples[f"latency, {name}"].append(latency)
    return {"samples": samples, "replies": replies, "spans": [(begin, time.monotonic())]}


def start(model, began, prompt):
    """Seconds to the first token of a process that was started at `began`, by parts."""
    parts = {"import": [IMPORTED - began]}
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded = time.monotonic()
    with torch.inference_mode():
        network.generate(torch.arange(4, 4 + prompt)[None], max_new_tokens=1, do_sample=False, pad_token_id=0)
    parts |= {"read weights": [loaded - IMPORTED], "first token": [time.monotonic() - loaded]}
    return {"samples": parts}


def layer(part, config, experts, batch, seq, repeats):
    """Tokens per second of the experts or the attention of one layer, forward and backward; the best implementation."""
    tried = {}
    for name in experts if part == "experts" else experts[:1]:
        model = build(config, name).model
        block = model.layers[0].mlp if part == "experts" else model.layers[0].self_attn
        x = torch.randn(batch, seq, config["hidden_size"], requires_grad=True)
        dy = torch.randn_like(x)
        rotation = model.rotary_emb(x, torch.arange(seq)[None])

        def step(block=block, x=x, dy=dy, rotation=rotation):
            block.zero_grad(set_to_none=True)
            x.grad = None
            out = block(x) if part == "experts" else block(x, position_embeddings=rotation, attention_mask=None)
            (out[0] if isinstance(out, tuple) else out).backward(dy)

        clock = Clock()
        step()
        step()
        tried[name] = clock.take(step, repeats), clock.spans
    best = min(tried, key=lambda name: statistics.median(tried[name][0]))
    seconds, spans = tried[best]
    return {"rates": [batch * seq / s for s in seconds], "spans": spans, "experts": best}


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


JOBS = (train, decode, prefill, layer, delta, arrivals, start)


def main():
    """Measures the job in the first argument and prints the result."""
    job = json.loads(sys.argv[1])
    what = job.pop("what")
    result = next(one for one in JOBS if one.__name__ == what)(**job)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({**result, "versions": versions, "threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    main()
