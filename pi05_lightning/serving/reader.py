"""An observation of openpi's clients: which of its keys are the policy's cameras, state and instruction."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pi05_lightning.data.observation import as_array, as_pixels, as_vector
from pi05_lightning.files.suggestion import suggestion
from pi05_lightning.serving.wire import PREFIX_KEY, RESET_KEY

TASK_KEYS = ("prompt", "task")
NEARLY_THE_SAME = 0.8  # difflib's ratio from which on a key is another one misspelt, whatever it holds


class Reader:
    """Finds what a policy needs in an openpi observation, and that nothing in it is meant for it and misnamed.

    Numbers, truth values and text that nothing reads are let through; arrays are not, nor what is called nearly like
    something that is not there, nor text where there is no instruction.

    Args:
        cameras: the policy's.
        named: the policy's cameras with their keys in the observation, where those differ.
        state_keys: keys that make up the state, by default the one whose last part is `state`.
        ignored_keys: keys, or their last parts, that are not looked at.
        missing_cameras: cameras that an observation may lack.

    Raises ValueError for a camera that the policy does not have, and for two cameras of one key.
    """

    def __init__(
        self,
        cameras: Sequence[str],
        named: Mapping[str, str],
        state_keys: Sequence[str] | None,
        ignored_keys: Collection[str] = (),
        missing_cameras: Collection[str] = (),
    ) -> None:
        for camera in named:
            if camera not in cameras:
                hint = suggestion(camera, cameras)
                raise ValueError(f"cameras: the policy has no {camera}{hint}; it has {', '.join(cameras)}")
        self.keys = {camera: named.get(camera, camera) for camera in cameras}
        if len(set(self.keys.values())) < len(self.keys):
            raise ValueError(f"cameras: two cameras have one key in {self.keys}")
        self.state_keys = state_keys
        self.ignored_keys, self.required = ignored_keys, set(named) - set(missing_cameras)
        self.needs_images = set(cameras) - set(missing_cameras)

    def __call__(self, message: Any) -> dict[str, Any]:
        """An observation for `Pi05Policy`. Raises ValueError that says what is missing and what there is."""
        if not isinstance(message, dict):
            raise ValueError(f"an observation is a dictionary, not a {type(message).__name__}")
        found = {key: value for key, value in _flat(message).items() if not self._ignores(key)}
        images, state = self._image_keys(found), self._state_keys(found)
        tasks = {key: _text(key, found[key]) for key in TASK_KEYS if key in found}
        self._reject_unread(found, {*images.values(), *state, *tasks, RESET_KEY, PREFIX_KEY})
        if self.needs_images and not images:
            raise ValueError(f"no image: expected one of {_listed(self.keys.values())}, got {_listed(found)}")
        observation: dict[str, Any] = {
            "image": {camera: _channels_first(found[key], key) for camera, key in images.items()},
            "state": np.concatenate([as_vector(key, found[key]) for key in state]) if state else None,
        }
        if len(set(tasks.values())) > 1:
            raise ValueError(f"{' and '.join(tasks)} differ: send one")
        return observation | ({"task": next(iter(tasks.values()))} if tasks else {})

    def _image_keys(self, found: Mapping[str, Any]) -> dict[str, str]:
        """The keys of the cameras that are there, among them all that were named when the server started."""
        images = {camera: key for camera, wanted in self.keys.items() if (key := _match(wanted, found)) is not None}
        if len(set(images.values())) < len(images):
            raise ValueError(f"two cameras would read one key, {images}: name their keys when the server starts")
        for camera in self.required - set(images):
            key = self.keys[camera]
            raise ValueError(f"no {key}, named as the camera {camera}{suggestion(key, found)}: got {_listed(found)}")
        return images

    def _state_keys(self, found: Mapping[str, Any]) -> Sequence[str]:
        if self.state_keys is None:
            key = _match("state", found)
            return () if key is None else (key,)
        for key in self.state_keys:
            if key not in found:
                raise ValueError(f"no {key} for the state{suggestion(key, found)}: got {_listed(found)}")
        return self.state_keys

    def _ignores(self, key: str) -> bool:
        return key in self.ignored_keys or _last(key) in self.ignored_keys

    def _reject_unread(self, found: Mapping[str, Any], read: set[str]) -> None:
        """Raises ValueError for a key that a client sends to be read and that nothing reads."""
        state = ("state",) if self.state_keys is None else self.state_keys
        wanted = {_last(key): key for key in (*self.keys.values(), *state, *TASK_KEYS, RESET_KEY, PREFIX_KEY)}
        lacking = wanted.keys() - {_last(key) for key in read & found.keys()}
        for key, value in found.items():
            last = _last(key)
            # difflib is slow for long keys, which cannot be nearly the same: its ratio is 2 · equal letters over all
            alike = [name for name in lacking if NEARLY_THE_SAME * (len(name) + len(last)) <= 2 * len(name)]
            near = alike and difflib.get_close_matches(last, alike, n=1, cutoff=NEARLY_THE_SAME)
            is_instruction = isinstance(value, str) and read.isdisjoint(TASK_KEYS)
            if key not in read and (near or is_instruction or _holds_data(value)):
                known = f"{_listed(self.keys.values())}; {' + '.join(state)}; {' or '.join(TASK_KEYS)}"
                raise ValueError(
                    f"nothing reads {key}{suggestion(key, wanted)}: images, state and instruction are {known}. Send it"
                    " so, name it when the server starts (--cameras, --state_keys), or ignore it (--ignored_keys)"
                )


def _flat(message: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested dictionaries with their keys joined by slashes. Raises ValueError when two are then the same."""
    found: dict[str, Any] = {}
    for key, value in message.items():
        name = f"{above}{key}"
        below = _flat(value, f"{name}/") if isinstance(value, dict) else {name: value}
        if twice := sorted(found.keys() & below.keys()):
            raise ValueError(f"{twice[0]} comes twice: send it once")
        found |= below
    return found


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(keys) or "nothing"


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} is a {type(value).__name__}: give text")
    return value


def _last(key: str) -> str:
    return key.replace(".", "/").rpartition("/")[2]


def _holds_data(value: Any) -> bool:
    """Whether it is of the kind of images and states: an array, a list of numbers, the bytes of an image."""
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], int | float | list | np.ndarray | np.number)
    return isinstance(value, bytes) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _match(wanted: str, found: Mapping[str, Any]) -> str | None:
    """The key that is `wanted`, or the only one whose last part is. Raises ValueError when several are."""
    if wanted in found:
        return wanted
    keys = [key for key in found if _last(key) == wanted]
    if len(keys) > 1:
        raise ValueError(f"{' and '.join(keys)} could both be {wanted!r}: send one, or name it when the server starts")
    return keys[0] if keys else None


def _channels_first(image: Any, key: str) -> np.ndarray:
    array = as_array(key, image)
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]):
        raise ValueError(f"image {key!r} has the shape {list(array.shape)}: expected [H W 3] or [3 H W]")
    as_pixels(key, array)  # what is wrong has the place that it has for the client
    return array if array.shape[0] == 3 else array.transpose(2, 0, 1)
