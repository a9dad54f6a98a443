"""A crowd of clients for a server: some leave, some read slowly, some send nonsense; then nothing may be left behind.

`python -m bench.load URL --clients 200 --seconds 300`. Every reply that was read to its end is asked for again, alone,
and has to be the same: serve with --deterministic.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

STORY = "once upon a time there was a little dog who liked to run and play with all his friends in the big park"
WORDS = STORY.split()

NONSENSE: tuple[tuple[str, bytes], ...] = (
    ("/v1/completions", b"{"),
    ("/v1/completions", b"[]"),
    ("/v1/completions", b'{"model": 3}'),
    ("/v1/completions", b'{"model": "MODEL", "prompt": "x", "max_tokens": -1}'),
    ("/v1/completions", b'{"model": "MODEL", "prompt": [[]], "temperature": 1e400}'),
    ("/v1/completions", b'{"model": "MODEL", "prompt": "x", "logit_bias": {"-1": 1}}'),
    ("/v1/chat/completions", b'{"model": "MODEL", "messages": [{}]}'),
    ("/v1/chat/completions", b'{"model": "MODEL", "messages": "hello"}'),
    ("/v1/nothing", b"{}"),
    ("/tokenize", b"\xff\xfe"),
)


@dataclass
class Found:
    """What the crowd saw: answers by status, and the replies that were read to their end, by what was asked."""

    statuses: Counter[int] = field(default_factory=Counter)
    replies: dict[str, str] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)
    left: int = 0
    seconds: list[float] = field(default_factory=list)


def question(rng: random.Random, model: str) -> dict[str, Any]:
    """A request; few beginnings, so that they are shared."""
    beginning = STORY if rng.random() < 0.5 else ""
    prompt = f"{beginning} {' '.join(rng.choices(WORDS, k=rng.randrange(1, 12)))}".strip()
    more: dict[str, Any] = (
        {"temperature": 0.0} if rng.random() < 0.5 else {"temperature": 1.0, "seed": rng.randrange(50)}
    )
    return {"model": model, "prompt": prompt, "max_tokens": rng.randrange(1, 60), **more}


async def client(http: httpx.AsyncClient, model: str, until: float, seed: int, found: Found) -> None:
    """One of the crowd, until its time is over."""
    rng = random.Random(seed)
    while time.monotonic() < until:
        if rng.random() < 0.1:
            path, body = rng.choice(NONSENSE)
            answer = await http.post(path, content=body.replace(b"MODEL", model.encode()))
            found.statuses[answer.status_code] += 1
            continue
        asked = question(rng, model)
        leaves = rng.random() < 0.15
        slow = rng.random() < 0.1
        text, began = "", time.monotonic()
        async with http.stream("POST", "/v1/completions", json={**asked, "stream": True}) as answer:
            found.statuses[answer.status_code] += 1
            if answer.status_code != 200:
                await asyncio.sleep(0.2)
                continue
            ended = False
            async for line in answer.aiter_lines():
                if leaves and rng.random() < 0.3:
                    break
                if slow:
                    await asyncio.sleep(0.02)
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
        if not ended:
            found.left += 1
            continue
        found.seconds.append(time.monotonic() - began)
        before = found.replies.setdefault(json.dumps(asked, sort_keys=True), text)
        if before != text:
            found.different.append(json.dumps(asked))


async def crowd(address: str, clients: int, seconds: float, key: str = "", again: int = 200) -> Found:
    """Runs the crowd, waits until the server has nothing left to do, and asks for `again` of the replies once more."""
    found = Found()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=clients + 1)
    async with httpx.AsyncClient(base_url=address, headers=headers, limits=limits, timeout=120) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        until = time.monotonic() + seconds
        await asyncio.gather(*(client(http, model, until, seed, found) for seed in range(clients)))
        for _ in range(100):
            if not any(await held(http)):
                break
            await asyncio.sleep(0.1)
        for asked in random.Random(0).sample(sorted(found.replies), min(again, len(found.replies))):
            answer = await http.post("/v1/completions", json=json.loads(asked))
            if answer.json()["choices"][0]["text"] != found.replies[asked]:
                found.different.append(asked)
    return found


async def held(http: httpx.AsyncClient) -> list[float]:
    """Slots, pages and requests that the server has not been given back."""
    text = (await http.get("/metrics")).text
    names = ("qmax_running", "qmax_unfinished", "qmax_pages_held")
    return [float(value) for name in names for value in re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)]


async def left_behind(address: str, key: str = "") -> list[float]:
    """`held`, of a server."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=address, headers=headers) as http:
        return await held(http)


def main() -> int:
    """Runs the crowd and says what it saw."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("address", help="of a server, such as http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--key", default="", help="API key")
    args = parser.parse_args()
    found = asyncio.run(crowd(args.address, args.clients, args.seconds, args.key))
    behind = asyncio.run(left_behind(args.address, args.key))
    times = sorted(found.seconds) or [0.0]
    print(f"answers by status     {dict(sorted(found.statuses.items()))}")
    print(f"read to their end     {len(found.seconds):,}, left early {found.left:,}")
    print(f"seconds of a reply    median {times[len(times) // 2]:.2f}, worst {times[-1]:.2f}")
    print(f"not the same again    {len(found.different)}")
    print(f"left behind           {behind} (running, unfinished, pages)")
    good = not found.different and not any(behind) and not any(status >= 500 for status in found.statuses)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
