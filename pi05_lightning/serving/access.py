"""Who may ask: whoever knows the token, and no page that a web browser has from elsewhere."""

from __future__ import annotations

import hmac
import logging
import os
import socket
from collections.abc import Collection
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from pi05_lightning.serving.failures import printable
from pi05_lightning.serving.wire import TOKEN_VARIABLE, checked_token

SCHEME = "Api-Key"
"""Of the header `Authorization`, as openpi's client sends its `api_key`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """What a request must say to be let in.

    token: None where none is needed.  allowed_hosts: names of this machine besides its host name and `localhost`, and
    those whose web pages may ask.  loopback_only: whether only this machine can reach the server.

    A browser asks in the name of whatever page it shows. Of a foreign page the header `Origin` tells; where its name
    was rebound to this machine's address, `Host` does.
    """

    token: str | None = field(default=None, repr=False)
    allowed_hosts: frozenset[str] = frozenset()
    loopback_only: bool = True

    @classmethod
    def of(cls, host: str, token: str | None, token_file: Path | None, allowed_hosts: Collection[str]) -> Access:
        """Of a server that listens at a host. Raises ValueError for a network without a token, and bad options."""
        secret = read_token(token, token_file)
        local = is_loopback(host)
        if not local and secret is None:
            raise ValueError(
                f"host {host or 'of all networks'} lets the network ask, and there is no token: set the environment"
                f" variable {TOKEN_VARIABLE} or --token_file, and give the same to the clients as their api_key, or"
                " leave out --host, which listens to this machine alone"
            )
        for name in allowed_hosts:
            if host_name(name) != name.lower():
                raise ValueError(f"allowed_hosts: {name!r} is no host: give its name or address alone, as robot.local")
        return cls(secret, frozenset(name.lower() for name in allowed_hosts), local)

    def check(self, request: web.BaseRequest) -> None:
        """Raises HTTPForbidden and HTTPUnauthorized, whose texts say what to do, and logs who was not let in."""
        try:
            self._check(request)
        except web.HTTPException as error:
            log.warning("%s: %s", request.remote, printable((error.text or error.reason).strip()))
            raise

    def _check(self, request: web.BaseRequest) -> None:
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        if not self._is_own(host_name(host)):
            raise web.HTTPForbidden(
                reason="Foreign Host",
                text=f"Host {host!r} is no name of this server: if it should be one, start it with --allowed_hosts\n",
            )
        if origin is not None and origin.partition("//")[2] != host and host_name(origin) not in self.allowed_hosts:
            raise web.HTTPForbidden(
                reason="Foreign Origin",
                text=f"pages of {origin!r} may not ask this server: to let them, start it with --allowed_hosts\n",
            )
        self._check_token(request)

    def _check_token(self, request: web.BaseRequest) -> None:
        if self.token is None:
            return
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        given = key.strip().encode(errors="surrogateescape")
        if scheme.lower() != SCHEME.lower() or not hmac.compare_digest(given, self.token.encode()):
            raise web.HTTPUnauthorized(
                headers={"WWW-Authenticate": SCHEME},
                text=f"{'another' if key else 'no'} token: send the server's as `Authorization: {SCHEME} TOKEN`, which"
                " openpi's client does with its api_key\n",
            )

    def _is_own(self, name: str) -> bool:
        if name in {"localhost", socket.gethostname().lower()} | self.allowed_hosts:
            return True
        try:  # no name can be rebound to be an address
            return ip_address(name).is_loopback or not self.loopback_only
        except ValueError:
            return False


def read_token(token: str | None, file: Path | None) -> str | None:
    """The token that is given, in a file or the environment; None without one. Raises ValueError for what is none."""
    if token is not None and file is not None:
        raise ValueError("token and token_file are both given: leave out one")
    where = "token" if token is not None else f"token_file {file}" if file is not None else TOKEN_VARIABLE
    if file is not None:
        try:
            token = file.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
    found = os.environ.get(TOKEN_VARIABLE) if token is None else token
    return None if found is None else checked_token(found, where)


def is_loopback(host: str) -> bool:
    """Whether a server at this host is reached from this machine alone. OSError for a name without an address."""
    addresses = {info[4][0] for info in socket.getaddrinfo(host, None)} if host else set()
    return bool(addresses) and all(ip_address(str(address).partition("%")[0]).is_loopback for address in addresses)


def host_name(where: str) -> str:
    """The name or address in `name`, `name:port` or `scheme://name:port`, in lower case; empty where there is none."""
    try:
        return urlsplit(where if "//" in where else f"//{where}").hostname or ""
    except ValueError:
        return ""
