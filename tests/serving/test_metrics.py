"""Numbers for Prometheus, as its own parser reads them."""

from __future__ import annotations

import asyncio

from aiohttp import ClientSession
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import connect

from pi05_lightning import Pi05Policy
from pi05_lightning.serving.failures import KINDS
from pi05_lightning.serving.metrics import PARTS
from tests.serving.inside import MESSAGE, served_inside

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scraped(address: str) -> Samples:
    async with ClientSession() as session, session.get(f"http://{address}/metrics") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        text = await answer.text()
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_metrics_count_requests_batches_seconds_clients_and_failures(policy: Pi05Policy) -> None:
    async def ask() -> tuple[Samples, Samples, Samples]:
        async with served_inside(policy) as (_, address):
            before = await scraped(address)
            clients = [await connect(f"ws://{address}") for _ in range(3)]
            for client in clients:
                await client.recv()
            for _ in range(4):
                for client in clients:
                    await client.send(MESSAGE)
                await asyncio.gather(*(client.recv() for client in clients))
            await clients[0].send(b"\xc1")
            await clients[0].recv()
            during = await scraped(address)
            for client in clients:
                await client.close()
            return before, during, await scraped(address)

    before, during, after = asyncio.run(ask())
    assert {value(before, "pi05_failures_total", kind=kind) for kind in KINDS} == {0}
    assert (value(before, "pi05_requests_total"), value(during, "pi05_requests_total")) == (0, 12)
    assert [value(found, "pi05_clients") for found in (before, during, after)] == [0, 3, 0]
    assert [value(during, f"pi05_{name}") for name in ("pending", "queue_length")] == [0, 0]
    failures = {kind: value(during, "pi05_failures_total", kind=kind) for kind in KINDS}
    assert failures == dict.fromkeys(KINDS, 0) | {"observation": 1}
    batches, requests = (value(during, f"pi05_batch_size_{part}") for part in ("count", "sum"))
    assert 4 <= batches <= 12
    assert requests == 12
    for part in PARTS:
        assert value(during, "pi05_request_seconds_count", part=part) == 12
        seconds = value(during, "pi05_request_seconds_sum", part=part)
        assert seconds > 0 or (part == "subtask" and not policy.hierarchical)
    assert value(during, "process_resident_memory_bytes") > 2**20


def test_two_servers_count_for_themselves(policy: Pi05Policy) -> None:
    async def ask() -> float:
        async with (
            served_inside(policy) as (_, one),
            served_inside(policy) as (_, other),
            connect(f"ws://{one}") as client,
        ):
            await client.recv()
            await client.send(MESSAGE)
            await client.recv()
            return value(await scraped(other), "pi05_requests_total")

    assert asyncio.run(ask()) == 0
