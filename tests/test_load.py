"""Law: a crowd leaves nothing behind and gets nothing that one who asks alone would not."""

from __future__ import annotations

import asyncio

import pytest

from bench.load import crowd, left_behind
from serve.api.app import Settings
from tests.serving import Served, serving, tiny_engine, tiny_tokenizer


@pytest.mark.parametrize(("clients", "seconds"), [(24, 6), pytest.param(200, 300, marks=pytest.mark.full)])
def test_a_crowd(clients: int, seconds: float) -> None:
    engine = tiny_engine(tiny_tokenizer(), slots=min(32, clients // 3), deterministic=True)
    engine.warm_up()
    with serving(Served(Settings()), engine, queue=400) as served:
        found = asyncio.run(crowd(served.address, clients, seconds, again=40))
        assert max(found.statuses) < 500, found.statuses
        assert found.statuses[200] > 20 and found.statuses[400] and found.left
        assert found.different == []
        assert asyncio.run(left_behind(served.address)) == [0, 0, 0]
    assert not engine.scheduler.busy
