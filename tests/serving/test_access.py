"""Who may ask: a token, the hosts and pages that are let in, and no network without a token."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from aiohttp import ClientSession, WSServerHandshakeError
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from pi05_lightning import Pi05Policy
from pi05_lightning.cli.main import main
from pi05_lightning.serving.access import Access, read_token
from tests.serving.inside import MESSAGE, count, served_inside

TOKEN = "correct-horse"


def statuses(policy: Pi05Policy, access: Access, *requests: dict[str, str]) -> list[tuple[int, str]]:
    """Of openpi's clients with these headers: 101 and nothing where they get actions, or the status and the text."""

    async def ask() -> list[tuple[int, str]]:
        found = []
        async with served_inside(policy, access=access) as (server, address):
            port = address.rpartition(":")[2]
            for headers in requests:
                headers = {name: value.replace("PORT", port) for name, value in headers.items()}
                async with ClientSession() as session:
                    async with session.get(f"http://{address}/metrics", headers=headers) as metrics:
                        text = await metrics.text()
                    try:
                        async with session.ws_connect(f"ws://{address}", headers=headers) as client:
                            await client.receive_bytes()
                            await client.send_bytes(MESSAGE)
                            await client.receive_bytes()
                            found.append((101, ""))
                    except WSServerHandshakeError as refused:
                        found.append((refused.status, text))
                    assert metrics.status == {101: 200}.get(found[-1][0], found[-1][0])
            refused = sum(status != 101 for status, _ in found)
            assert count(server, "pi05_failures_total", kind="access") == 2 * refused
        return found

    return asyncio.run(ask())


def test_only_who_knows_the_token_is_let_in(policy: Pi05Policy) -> None:
    given = (
        f"Api-Key {TOKEN}",
        f"api-key  {TOKEN} ",
        "",
        "Api-Key",
        "Api-Key wrong",
        f"Api-Key {TOKEN}e",
        f"Api-Key {TOKEN[:-1]}",
        f"Bearer {TOKEN}",
        TOKEN,
        "Api-Key ä",
    )
    found = statuses(policy, Access(TOKEN), *({"Authorization": value} for value in given), {})
    assert [status for status, _ in found] == [101, 101] + 9 * [401]
    assert "no token: send the server's as `Authorization: Api-Key TOKEN`" in found[-1][1]
    assert found[4][1].startswith("another token")
    assert not any(TOKEN in text for _, text in found)


HOSTS = [
    ("localhost:PORT", 101, 101),
    ("127.0.0.1:PORT", 101, 101),
    ("[::1]:PORT", 101, 101),
    ("LOCALHOST", 101, 101),
    (socket.gethostname(), 101, 101),
    ("robot.example:PORT", 101, 101),
    ("192.0.2.7:PORT", 403, 101),
    ("evil.example:PORT", 403, 403),
    ("evil.example", 403, 403),
    ("localhost.evil.example", 403, 403),
    ("127.0.0.1.evil.example", 403, 403),
    ("robot.example.evil.example", 403, 403),
    ("[::1", 403, 403),
    ("", 403, 403),
]


@pytest.mark.parametrize("loopback_only", [True, False])
def test_foreign_hosts_are_refused(policy: Pi05Policy, loopback_only: bool) -> None:
    access = Access(allowed_hosts=frozenset({"robot.example"}), loopback_only=loopback_only)
    found = statuses(policy, access, *({"Host": host} for host, *_ in HOSTS))
    assert [status for status, _ in found] == [host[1 if loopback_only else 2] for host in HOSTS]
    assert "start it with --allowed_hosts" in found[-1][1]


ORIGINS = [
    ("http://127.0.0.1:PORT", 101),
    ("https://robot.example", 101),
    ("http://robot.example:8080", 101),
    ("http://127.0.0.1:1", 403),
    ("http://localhost:PORT", 403),
    ("http://evil.example", 403),
    ("http://robot.example.evil.example", 403),
    ("https://127.0.0.1:PORT@evil.example", 403),
    ("http://[x", 403),
    ("null", 403),
    ("", 403),
]


def test_pages_from_elsewhere_are_refused(policy: Pi05Policy) -> None:
    access = Access(allowed_hosts=frozenset({"robot.example"}))
    found = statuses(policy, access, *({"Origin": origin} for origin, _ in ORIGINS))
    assert [status for status, _ in found] == [status for _, status in ORIGINS]
    assert "pages of 'http://evil.example' may not ask this server: " in found[5][1]


def test_token_does_not_let_in_a_page_from_elsewhere(policy: Pi05Policy) -> None:
    headers = {"Authorization": f"Api-Key {TOKEN}", "Origin": "http://evil.example"}
    assert statuses(policy, Access(TOKEN), headers)[0][0] == 403


def test_health_is_open_to_whoever_asks(policy: Pi05Policy) -> None:
    async def ask() -> list[tuple[int, str]]:
        found = []
        async with served_inside(policy, access=Access(TOKEN)) as (_, address), ClientSession() as session:
            for path in ("healthz", "readyz"):
                async with session.get(f"http://{address}/{path}", headers={"Host": "evil.example"}) as answer:
                    found.append((answer.status, await answer.text()))
        return found

    assert asyncio.run(ask()) == [(200, "OK\n"), (200, "OK\n")]


def test_openpis_client_without_the_token_fails_when_it_connects(policy: Pi05Policy) -> None:
    async def ask() -> InvalidStatus:
        async with served_inside(policy, access=Access(TOKEN)) as (_, address):
            with pytest.raises(InvalidStatus) as refused:
                await connect(f"ws://{address}")
            async with connect(f"ws://{address}", additional_headers={"Authorization": f"Api-Key {TOKEN}"}) as client:
                await client.recv()
        return refused.value

    response = asyncio.run(ask()).response
    assert response.status_code == 401
    assert b"openpi's client does with its api_key" in response.body


def test_token_is_given_or_in_a_file_or_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert read_token(None, None) is None
    assert read_token(TOKEN, None) == read_token(None, file) == TOKEN
    monkeypatch.setenv("PI05_TOKEN", "other")
    assert read_token(None, None) == "other"
    assert read_token(None, file) == TOKEN
    assert TOKEN not in repr(Access(TOKEN))


def test_network_needs_a_token(tmp_path: Path) -> None:
    message = "0.0.0.0 lets the network ask, and there is no token: set the environment variable PI05_TOKEN"
    with pytest.raises(SystemExit, match=message):
        main(["serve", str(tmp_path / "none"), "--host=0.0.0.0", "--port=0"])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_needs_no_token(host: str) -> None:
    assert Access.of(host, None, None, ()).loopback_only


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1"])
def test_everything_else_is_a_network(host: str) -> None:
    with pytest.raises(ValueError, match="there is no token"):
        Access.of(host, None, None, ())
    assert not Access.of(host, TOKEN, None, ()).loopback_only


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--token=a b"], "token holds no token"),
        (["--token= "], "token holds no token"),
        (["--token=a", "--token_file=b"], "token and token_file are both given"),
        (["--token_file=/nonexistent/token"], "token_file /nonexistent/token cannot be read"),
        (["--allowed_hosts=[http://robot.local]"], "allowed_hosts: 'http://robot.local' is no host"),
        (["--allowed_hosts=['robot.local:8000']"], "allowed_hosts: 'robot.local:8000' is no host"),
        (["--max_clients=0"], "max_clients is 0"),
    ],
)
def test_bad_options_are_said_before_a_checkpoint_is_read(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["serve", str(tmp_path / "none"), "--port=0", *options])
    assert message in str(refused.value)


def test_empty_token_in_the_environment_is_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PI05_TOKEN", "")
    with pytest.raises(SystemExit, match="PI05_TOKEN holds no token"):
        main(["serve", str(tmp_path / "none"), "--port=0"])
