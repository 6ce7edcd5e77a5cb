"""Which features of a LeRobot dataset are read: what a user chose, checked before any row is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pi05_lightning.data.transforms import RelativeActions
from pi05_lightning.files.suggestion import suggestion

_OF_THE_RECORDING = {"timestamp", "frame_index", "episode_index", "index", "task_index", "subtask_index"}
"""Columns that every dataset has, and that nobody means by a state or an action."""


@dataclass(frozen=True)
class Features:
    """What meta/info.json says of each feature. Every question raises ValueError, with the dataset, for a wrong choice.

    where: the dataset, in words.
    """

    declared: Mapping[str, Mapping[str, Any]]
    where: str

    def cameras(self, available: list[str], chosen: dict[str, str] | None, convert: bool) -> dict[str, str]:
        """Image features with their cameras' names; by default all, named by the last part of their keys.

        convert: grey and transparent images are taken too.
        """
        cameras = {key: key.rpartition(".")[2] for key in available} if chosen is None else chosen
        for key in cameras:
            if key not in available and self.declared.get(key, {}).get("dtype") in ("video", "image"):
                raise ValueError(f"{self.where}: {key} is a depth map, which the model does not take: leave it out")
        self._check_known(cameras, available, "image feature", "cameras")
        for key in cameras:
            shape = self.declared[key]["shape"]
            channels = (3, 1, 4) if convert else (3,)
            if len(shape) != 3 or not {shape[0], shape[-1]} & {*channels}:
                raise ValueError(
                    f"{self.where}: {key} has images of shape {list(shape)}, which are not RGB: take others"
                    " as `cameras`, or grey and transparent ones with `convert_images: true`"
                )
        if len(set(cameras.values())) < len(cameras):
            raise ValueError(f"{self.where}: two features share a camera name in {cameras}; name them in `cameras`")
        return cameras

    def widths(self, keys: Iterable[str], option: str) -> dict[str, int]:
        """Vectors, each with its dims.  option: which one names them."""
        vectors = {
            key: f["shape"][0]
            for key, f in self.declared.items()
            if len(f["shape"]) == 1 and f["dtype"] not in ("string", "language")
        }
        self._check_known(keys, sorted(vectors), "vector", option)
        return {key: vectors[key] for key in keys}

    def box_range(self, cameras: Iterable[str], most: float | None) -> dict[str, tuple[float, float]]:
        """(height, width) of every image feature in the units of boxes: `most`, or by default pixels."""
        sizes = {}
        for key in cameras:
            shape = self.declared[key]["shape"]
            height, width = shape[:2] if shape[-1] in (1, 3, 4) else shape[-2:]
            sizes[key] = (most, most) if most else (float(height), float(width))
        return sizes

    def _check_known(self, keys: Iterable[str], known: list[str], what: str, option: str) -> None:
        for key in keys:
            if key not in known:
                told = [name for name in known if name not in _OF_THE_RECORDING]
                raise ValueError(
                    f"{self.where} has no {what} {key!r}{suggestion(key, told)}; it has {', '.join(told) or 'none'}:"
                    f" correct `{option}`, of the source or as an option of the command"
                )


def chunk_steps(seconds: float | None, steps: int | None, fps: float, horizon: int, where: str) -> int:
    """Frames of an action chunk, given in seconds, in frames, or not at all; horizon: the model's.

    Raises ValueError for more than the horizon, and for seconds that are no whole number of frames.
    """
    if seconds is None:
        if steps is not None and steps > horizon:
            raise ValueError(
                f"{where}: horizon_steps {steps} is not from 1 to the model's horizon, {horizon} (model.config.horizon)"
            )
        return horizon if steps is None else steps
    found = round(seconds * fps)
    if abs(found - seconds * fps) > 1e-6 or not 1 <= found <= horizon:
        raise ValueError(
            f"{where}: horizon_seconds {seconds:g} is {seconds * fps:g} frames at {fps:g} fps; it must be a whole"
            f" number of them, from 1 to the model's horizon of {horizon} (model.config.horizon)"
        )
    return found


def relative_actions(
    dims: Sequence[int], state_dims: Sequence[int] | None, of_state: int, of_action: int, where: str
) -> RelativeActions | None:
    """Dims of the action that are relative to dims of the state, by default to the same ones; None of none.

    Raises ValueError for dims that an action of `of_action` dims, or a state of `of_state`, does not have.
    """
    if not dims:
        return None
    others = dims if state_dims is None else state_dims
    if len(others) != len(dims) or not (set(dims) <= set(range(of_action)) and set(others) <= set(range(of_state))):
        raise ValueError(
            f"{where}: relative_dims {list(dims)} and relative_state_dims {list(others)} must be as many, dims of an"
            f" action of {of_action} and of a state of {of_state}"
        )
    return RelativeActions(tuple(dims), tuple(others))
