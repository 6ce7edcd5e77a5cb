"""What server and robot agree on: openpi's wire format, and the words that ours adds to it.

The format is msgpack, with arrays as maps of their bytes, dtype and shape. Nothing in it is executed.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np

TOKEN_VARIABLE = "PI05_TOKEN"
"""The environment variable that holds a server's token, for itself and for its clients."""
PREFIX_KEY, RESET_KEY = "prefix_actions", "reset"
"""In a message, beside the observation: actions that are executed meanwhile, and whether an episode begins."""
BUSY = "Busy"
"""What the text begins with that refuses a message, as too many wait; a colon follows, and how many."""
MAX_DTYPE = 32
"""Characters of a dtype's name."""

_KINDS = "biufSU"  # booleans, numbers, text: never objects, which would be pickled


def checked_token(token: str, where: str) -> str:
    """A token without the space around it, such as a file's last line ends with.

    Raises ValueError for what is none, which names where it is from and not what it is.
    """
    found = token.strip()
    if not found or not found.isascii() or not found.isprintable() or " " in found:
        raise ValueError(f"{where} holds no token: give letters, digits and signs without spaces")
    return found


def pack(message: Any) -> bytes:
    """A message of numbers, text, bytes, lists, dictionaries and arrays. Raises ValueError for arrays of objects."""
    return msgpack.packb(message, default=_encode)


def unpack(data: bytes) -> Any:
    """What `pack` packed. Raises ValueError for data that is damaged or holds arrays of objects."""
    try:
        return msgpack.unpackb(data, object_hook=_decode)
    except (msgpack.UnpackException, TypeError, KeyError, SyntaxError, OverflowError) as error:  # dtypes are parsed
        raise ValueError(f"the message is not msgpack as openpi's client packs it: {error!r}") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": _checked(value.dtype).str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": _checked(value.dtype).str}
    raise ValueError(f"a {type(value).__name__} cannot be sent: use numbers, text, lists, dictionaries and arrays")


def _decode(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        dtype, data, shape = _dtype(value[b"dtype"]), value[b"data"], value[b"shape"]
        claimed = dtype.itemsize * math.prod(shape)
        if claimed != len(data) or min(shape, default=0) < 0:
            raise ValueError(f"an array's shape {shape!r} of {dtype} claims {claimed} bytes, and it has {len(data)}")
        return np.frombuffer(data, dtype).reshape(shape)
    if b"__npgeneric__" in value:
        return _dtype(value[b"dtype"]).type(value[b"data"])
    return value


def _dtype(name: Any) -> np.dtype:
    """Raises ValueError for what is no plain name: NumPy would build types of any size from lists and dictionaries."""
    if not isinstance(name, str) or len(name) > MAX_DTYPE:
        raise ValueError(f"an array's dtype is no name such as '<f4': {str(name)[:MAX_DTYPE]!r}")
    return _checked(np.dtype(name))


def _checked(dtype: np.dtype) -> np.dtype:
    if dtype.kind not in _KINDS:
        raise ValueError(f"arrays of {dtype} are refused: send numbers or text")
    return dtype
