"""openpi's wire format: what goes in comes out, as openpi's own client reads it, and nothing that could run does."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from pi05_lightning.serving.wire import pack, unpack


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
        np.zeros((0, 4)),
        np.array(3.5),
        np.array([True, False]),
        np.array([1, 2], ">i4"),
        np.array(["open", "close the drawer"]),
        np.array([b"raw"]),
    ],
)
def test_array_comes_back_with_dtype_shape_and_values(array):
    back = unpack(pack({"x": array}))["x"]
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(back, array)


def test_scalar_comes_back_with_its_dtype():
    back = unpack(pack(np.float32(0.1)))
    assert back.dtype == np.float32
    assert back == np.float32(0.1)


def test_array_is_the_map_that_openpi_sends():
    raw = msgpack.unpackb(pack(np.array([1, 2], np.float32)))
    assert raw == {b"__ndarray__": True, b"data": b"\0\0\x80?\0\0\0@", b"dtype": "<f4", b"shape": [2]}


@pytest.mark.parametrize("array", [np.array([{}]), np.array([1j]), np.array([(1,)], [("a", "i4")])])
def test_arrays_of_objects_are_not_sent(array):
    with pytest.raises(ValueError, match="are refused"):
        pack(array)


@pytest.mark.parametrize("dtype", ["|O", "V4", "c8", "M8[s]"])
def test_arrays_of_objects_are_not_read(dtype):
    message = msgpack.packb({b"__ndarray__": True, b"data": bytes(8), b"dtype": dtype, b"shape": [1]})
    with pytest.raises(ValueError, match="are refused"):
        unpack(message)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x80\x80",
        pack({"x": np.zeros(3)})[:-1],
        msgpack.packb({b"__ndarray__": True}),
        msgpack.packb({b"__ndarray__": True, b"data": bytes(7), b"dtype": "<f4", b"shape": [2]}),
        msgpack.packb({b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [9]}),
        msgpack.packb({b"__ndarray__": True, b"data": bytes(8), b"dtype": "nonsense", b"shape": [1]}),
        msgpack.packb({b"__ndarray__": True, b"data": 3, b"dtype": "<f4", b"shape": [1]}),
    ],
)
def test_damaged_message_is_an_error(data):
    with pytest.raises(ValueError, match=r"."):
        unpack(data)


def test_what_numpy_cannot_hold_is_named():
    with pytest.raises(ValueError, match="a set cannot be sent"):
        pack({"x": {1}})
