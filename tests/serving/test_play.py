"""The websocket behind the page: what several clients see and say, and that none of them holds up the others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType, WSServerHandshakeError
from aiohttp.test_utils import TestServer

from pi05_lightning import Pi05Policy
from pi05_lightning.cli.main import with_second_named
from pi05_lightning.cli.play import play
from pi05_lightning.serving.access import Access
from pi05_lightning.serving.play import LIMITS, PlayServer
from pi05_lightning.sim.player import Player, Start
from pi05_lightning.sim.session import Session
from pi05_lightning.sim.simulators import MetaWorld
from tests.serving.room import SENTENCES, Room

SEEDS = {task: range(3) for task in SENTENCES}
UPGRADE = (
    "GET /play HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


@asynccontextmanager
async def played(policy: Pi05Policy, **options: Any) -> AsyncIterator[tuple[str, ClientSession]]:
    """The page's `host:port` in this event loop."""
    policy = policy.acting_as(replace(policy.acting, max_state_distance=None))

    def players() -> list[Player]:
        return [Player("it", policy.session(0), Start(Room(), SEEDS))]

    server = PlayServer(lambda changed: Session(players, changed), Access(), **options)
    server.session.begin()
    try:
        async with TestServer(server.app()) as address, ClientSession() as session:
            yield f"{address.host}:{address.port}", session
    finally:
        server.session.end()


async def hear(client: ClientWebSocketResponse, key: str) -> Any:
    """The next message of a kind: scene, state, done or error."""
    async with asyncio.timeout(60):
        while key not in (said := await client.receive_json()):
            pass
    return said[key]


async def say(client: ClientWebSocketResponse, **command: Any) -> None:
    await client.send_json(command)


def test_two_pages_see_the_same_robot_and_a_closed_one_holds_up_nobody(policy: Pi05Policy) -> None:
    async def look() -> None:
        async with played(policy) as (address, session):
            first = await session.ws_connect(f"ws://{address}/play")
            second = await session.ws_connect(f"ws://{address}/play")
            scene = await hear(first, "scene")
            assert scene["tasks"] == SENTENCES
            assert scene["states"] == 3
            (before,) = (await hear(second, "state"))["players"]
            assert before["picture"].startswith("data:image/png;base64,")
            assert list(before["images"]) == ["top", "wrist"]
            assert before["low"] == [None, -1]
            await say(first, do="tell", text="go to the right", stay=False)
            await first.close()
            while (state := await hear(second, "state"))["players"][0]["seconds"] < 0.3:
                pass
            (after,) = state["players"]
            assert (after["told"], after["judged"], state["paused"]) == ("go to the right", "right", False)
            assert len(after["executed"]) == round(10 * after["seconds"])
            assert after["picture"] != before["picture"]
            assert after["milliseconds"]["policy"] > 0

    asyncio.run(look())


def test_a_page_is_told_why_nothing_is_shown_and_what_is_told_is_done(
    policy: Pi05Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look() -> None:
        async with played(policy) as (address, session):
            client = await session.ws_connect(f"ws://{address}/play")
            assert await hear(client, "unshown") == "what happens cannot be shown: RuntimeError: no renderer is left"
            monkeypatch.undo()
            await say(client, do="step")
            assert (await hear(client, "state"))["players"][0]["seconds"] > 0

    def fail(*_: object) -> str:
        raise RuntimeError("no renderer is left")

    monkeypatch.setattr("pi05_lightning.sim.session.data_uri", fail)
    asyncio.run(look())


BAD = {
    "no json": "that is no JSON",
    "[" * 5000: "that is no JSON",
    "[]": "a command is",
    "null": "a command is",
    '{"do": "close"}': "a command is",
    '{"do": ["tell"]}': "a command is",
    '{"do": "tell", "text": 3}': "tell: text is 3, and must be of type str",
    '{"do": "tell"}': "tell: missing a required argument: 'text'",
    '{"do": "tell", "text": " "}': "the instruction is blank",
    '{"do": "tell", "text": "go", "loud": true}': "tell has no 'loud', only text, stay, task",
    '{"do": "tell", "text": "go", "task": "fly"}': "there is no task 'fly' here",
    '{"do": "reset", "number": true}': "number is true, and must be of type int",
    '{"do": "reset", "number": 3}': "numbered from 0 to 2, not 3",
    '{"do": "reset", "number": 1e999}': "must be of type int",
    '{"do": "set_speed", "value": NaN}': "speed: nan is none of",
    '{"do": "set_speed", "value": 3}': "speed: 3 is none of",
    '{"do": "push", "way": "__class__"}': "is no way",
    '{"do": "ask", "text": ""}': "the question is blank",
}


def test_what_makes_no_sense_is_answered_and_the_next_command_is_done(policy: Pi05Policy) -> None:
    async def ask() -> None:
        async with played(policy) as (address, session), session.ws_connect(f"ws://{address}/play") as client:
            for text, message in BAD.items():
                await client.send_str(text)
                assert message in await hear(client, "error")
            await client.send_bytes(b"\x00")
            assert "a command is text, not binary" in await hear(client, "error")
            await say(client, do="push", way="left")
            assert await hear(client, "done") == "push"

    asyncio.run(ask())


def test_too_large_a_message_ends_its_own_connection(policy: Pi05Policy) -> None:
    async def ask() -> None:
        async with played(policy) as (address, session):
            large = await session.ws_connect(f"ws://{address}/play")
            await say(large, do="tell", text="x" * LIMITS.max_message_bytes)
            while (message := await large.receive(60)).type is WSMsgType.TEXT:
                assert "error" not in json.loads(message.data)
            async with session.ws_connect(f"ws://{address}/play") as client:
                assert await hear(client, "scene")

    asyncio.run(ask())


def test_who_reads_nothing_holds_up_nobody_and_no_more_come_than_may(policy: Pi05Policy) -> None:
    async def look() -> None:
        async with played(policy, limits=replace(LIMITS, max_clients=2)) as (address, session):
            deaf = await session.ws_connect(f"ws://{address}/play")
            async with session.ws_connect(f"ws://{address}/play") as client:
                async with session.ws_connect(f"ws://{address}/play") as third:
                    message = await third.receive()
                    assert (message.data, message.extra) == (1013, "2 pages are open already: close one")
                await say(client, do="set_speed", value=0)
                for _ in range(30):
                    await say(client, do="push", way="left")
                    await hear(client, "done")
            await deaf.close()

    asyncio.run(look())


def test_who_stops_reading_loses_its_place_though_it_still_answers_pings(
    policy: Pi05Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "state", lambda session: {"players": [], "more than buffers hold": "x" * 2**25})
    limits = replace(LIMITS, max_clients=1, client_timeout=0.5)
    pong = bytes([0x8A, 0x80, 0, 0, 0, 0])  # RFC 6455, 5.2: final, masked, empty

    async def look() -> None:
        async with played(policy, limits=limits) as (address, session):
            reader, writer = await asyncio.open_connection(*address.split(":"), limit=4096)
            writer.write(UPGRADE.format(host=address).encode())
            await reader.readuntil(b"\r\n\r\n")
            async with asyncio.timeout(60):
                while True:
                    with suppress(ConnectionError):
                        writer.write(pong)
                    async with session.ws_connect(f"ws://{address}/play") as client:
                        if (message := await client.receive()).type is WSMsgType.TEXT:
                            assert "scene" in json.loads(message.data)
                            break
                    await asyncio.sleep(0.1)
            writer.close()

    asyncio.run(look())


def test_only_pages_of_this_machine_may_ask(policy: Pi05Policy) -> None:
    async def ask() -> None:
        async with played(policy) as (address, session):
            for path in ("", "page/play.js", "page/style.css"):
                async with session.get(f"http://{address}/{path}") as answer:
                    assert answer.status == 200
                    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
                async with session.get(f"http://{address}/{path}", headers={"Host": "evil.example"}) as answer:
                    assert answer.status == 403
            async with session.get(f"http://{address}/page/../play.py") as answer:
                assert answer.status == 404
            for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
                with pytest.raises(WSServerHandshakeError, match="403"):
                    await session.ws_connect(f"ws://{address}/play", headers=headers)

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["a", "b"], ["a", "--beside", "b"]),
        (["--env", "Desk", "a", "--port=1", "b"], ["--env", "Desk", "a", "--port=1", "--beside", "b"]),
        (["a", "--env", "Desk"], ["a", "--env", "Desk"]),
        (["a", "--beside", "b"], ["a", "--beside", "b"]),
        ([], []),
    ],
)
def test_a_second_checkpoint_needs_no_name(args: list[str], named: list[str]) -> None:
    assert with_second_named(args, "beside") == named
    assert with_second_named(args, None) == args


def test_task_that_there_is_not_is_refused_before_the_page_is_served(served: Path) -> None:
    with pytest.raises(ValueError, match="drawr-open-v3"):
        play(served, env=MetaWorld(), tasks=["reach-v3", "drawr-open-v3"], port=0)


def test_policy_computes_in_the_type_that_the_command_says(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[torch.dtype] = []

    async def serve(server: PlayServer, *_: Any, **__: Any) -> None:
        shown.extend(next(player.policy.model.parameters()).dtype for player in server.session.players)
        server.session.end()

    monkeypatch.setattr("pi05_lightning.cli.play.serve_until_signal", serve)
    play(served, env=Room(), dtype="bfloat16", port=0)
    assert shown == [torch.bfloat16]
