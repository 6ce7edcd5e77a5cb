"""openpi's wire format: msgpack, with arrays as maps of their bytes, dtype and shape. Nothing in it is executed."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np

_KINDS = "biufSU"  # booleans, numbers, text: never objects, which would be pickled


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
        dtype = _checked(np.dtype(value[b"dtype"]))
        return np.frombuffer(value[b"data"], dtype).reshape(value[b"shape"])
    if b"__npgeneric__" in value:
        return _checked(np.dtype(value[b"dtype"])).type(value[b"data"])
    return value


def _checked(dtype: np.dtype) -> np.dtype:
    if dtype.kind not in _KINDS:
        raise ValueError(f"arrays of {dtype} are refused: send numbers or text")
    return dtype
