"""What a message may hold, checked in its raw bytes: what is larger is refused before anything of it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields

import msgpack

from pi05_lightning.files.ranges import check_range

MAX_DEPTH = 16
"""Of dictionaries and lists in each other: an observation has four, an image as lists three more."""

_MAPS = {*range(0x80, 0x90), 0xDE, 0xDF}  # first bytes, from msgpack's specification
_LISTS = {*range(0x90, 0xA0), 0xDC, 0xDD}
_TEXTS = {*range(0xA0, 0xC0), 0xD9, 0xDA, 0xDB}
_EXTENSIONS = {0xC7, 0xC8, 0xC9, *range(0xD4, 0xD9)}
_HEADERS = {0xC4: 2, 0xC5: 3, 0xC6: 5, 0xD9: 2, 0xDA: 3, 0xDB: 5}  # bytes before those of a text or array; others: 1


class LimitError(ValueError):
    """A message holds more than it may."""


@dataclass(frozen=True)
class Limits:
    """How much one message may hold, and what else one client may take. Raises ValueError for one that is too small.

    max_message_bytes: of the whole message.  max_image_bytes: of an image, or any other array.  max_values: keys,
    numbers, texts and arrays in all; the numbers in an array are not counted, those in a list are.
    max_prompt_bytes: of an instruction, or any other text; None: those of the message.  max_clients: at a time.
    client_timeout: seconds in which a client must finish its HTTP request, answer a ping, and take an answer.
    """

    max_message_bytes: int = 32 * 2**20
    max_image_bytes: int = 16 * 2**20
    max_values: int = 10_000
    max_prompt_bytes: int | None = 1024
    max_clients: int = 64
    client_timeout: float = 20.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_range(field.name, getattr(self, field.name), 0.1 if field.name == "client_timeout" else 1)

    def check(self, data: bytes) -> None:
        """Raises LimitError for a message that holds more, and ValueError for one that is not msgpack."""
        try:
            self._check(data)
        except (msgpack.UnpackException, IndexError) as error:
            raise ValueError(f"the message is not msgpack, or not all of it: {error!r}") from error

    def _check(self, data: bytes) -> None:
        self._bound("the message", len(data), "max_message_bytes")
        unpacker = msgpack.Unpacker(max_buffer_size=len(data) + 1)
        unpacker.feed(data)
        open_, values = [_Open(1)], 1
        while open_:
            inner = open_[-1]
            if not inner.remaining:
                open_.pop()
                continue
            is_key = inner.is_map and inner.remaining % 2 == 0
            inner.remaining -= 1
            start = unpacker.tell()
            first = data[start]
            if first in _MAPS or first in _LISTS:
                is_map = first in _MAPS
                inside = 2 * unpacker.read_map_header() if is_map else unpacker.read_array_header()
                values += inside
                self._bound("the message", values, "max_values", "values")
                open_.append(_Open(inside, is_map))
                if len(open_) > MAX_DEPTH + 1:
                    raise LimitError(f"the message nests deeper than {MAX_DEPTH} dictionaries and lists: flatten it")
                continue
            if first in _EXTENSIONS:
                raise ValueError("the message holds an extension type of msgpack: send numbers, text and arrays")
            unpacker.skip()
            begin, size = start + _HEADERS.get(first, 1), unpacker.tell() - start - _HEADERS.get(first, 1)
            where = "a key" if is_key else "/".join(level.key for level in open_ if level.key) or "the message"
            self._bound(where, size, "max_prompt_bytes" if is_key or first in _TEXTS else "max_image_bytes")
            if is_key:
                inner.key = data[begin : begin + size].decode(errors="replace")

    def _bound(self, what: str, found: int, limit: str, unit: str = "bytes") -> None:
        most = getattr(self, limit)
        if most is not None and found > most:
            raise LimitError(
                f"{what} has {found} {unit}, and the server takes {most}: send less, or start it with --{limit}"
            )


@dataclass
class _Open:
    """A dictionary or list that is being read: how many keys and values are to come, and the last key."""

    remaining: int
    is_map: bool = False
    key: str = ""
