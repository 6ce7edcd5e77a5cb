"""What can go wrong with a client and its requests: how it is counted, and what is said of it."""

from __future__ import annotations

from pi05_lightning.data.fast import FastDecodeError
from pi05_lightning.data.observation import NotFinite
from pi05_lightning.serving.batches import Busy
from pi05_lightning.serving.limits import LimitError
from pi05_lightning.serving.wire import BUSY

KINDS = {
    "limit": "a message beyond a limit",
    "observation": "a message that is no observation for this policy",
    "protocol": "data that is no websocket message, or one too large",
    "policy": "actions that could not be computed",
    "queue": "a request beyond those that may wait",
    "clients": "a client beyond those that are served, or while the server stops",
    "access": "a token, Host or Origin that is not let in",
    "slow": "a client that answered no ping, or took no answer",
    "left": "a client that left before its answer",
}
MAX_TOLD = 2000
"""Characters of an answer that says what is wrong."""


def kind_of(error: Exception) -> str:
    """Of `KINDS`, for what answering a message raised."""
    if isinstance(error, LimitError):
        return "limit"
    if isinstance(error, Busy):
        return "queue"
    of_the_policy = isinstance(error, NotFinite | FastDecodeError) or not isinstance(error, ValueError)
    return "policy" if of_the_policy else "observation"


def told_of(error: Exception) -> str:
    """What a client is told of it: its kind, and its message."""
    kind = BUSY if isinstance(error, Busy) else type(error).__name__
    return printable(f"{kind}: {error}")


def printable(text: str) -> str:
    """What is said to a client, in which its own words may be: on one line of a log, of bounded length."""
    text = text if len(text) <= MAX_TOLD else f"{text[:MAX_TOLD]} …"
    return text if text.isprintable() else ascii(text)[1:-1]
