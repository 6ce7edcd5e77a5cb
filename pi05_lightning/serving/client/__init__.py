"""The robot's side of a served policy: a controller that never waits. It needs numpy, msgpack and websockets alone."""

from pi05_lightning.serving.client.connection import Refused, ServerError
from pi05_lightning.serving.client.controller import Controller, Fallback, Mode, always, hold_last

__all__ = ["Controller", "Fallback", "Mode", "Refused", "ServerError", "always", "hold_last"]
