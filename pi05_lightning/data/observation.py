"""What a policy is asked with: numbers and images of any library as arrays, and what training always had, asked for."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi05_lightning.data.looks import Look
from pi05_lightning.data.prompt import clean_task
from pi05_lightning.data.robot import Robot
from pi05_lightning.files.suggestion import suggestion
from pi05_lightning.types import Frame

REPORTED_DISTANCE = 1.0  # quantile ranges from which on a state outside the training data is spoken of
HALF_GREY_LEVEL = 0.5 / 255  # resizing overshoots by less, and nothing is lost by clipping it

log = logging.getLogger(__name__)


class NotFinite(ValueError):
    """Predicted actions that are NaN or infinite."""


def as_array(name: str, value: Any) -> np.ndarray:
    """Numbers as numpy has them; tensors may be on any device, of any float type, and require a gradient.

    Raises ValueError with the name for what is no array of numbers: text, objects, truth values, ragged lists.
    """
    try:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        if np.ma.is_masked(value):
            raise ValueError("some of it is masked")
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be read as an array of numbers: {error}") from error
    if array.dtype.kind not in "iuf":
        kinds = {"b": "truth values", "U": "text", "S": "bytes", "O": "objects", "c": "complex numbers"}
        raise ValueError(f"{name} holds {kinds.get(array.dtype.kind, array.dtype)}: give numbers")
    return array


def as_numbers(name: str, value: Any) -> np.ndarray:
    """f32 of any shape. Raises ValueError as `as_array`, and for NaN and infinity with their place."""
    array = as_array(name, value)
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32)
    _reject(~np.isfinite(numbers), name, array, "only finite float32 numbers are taken")
    return numbers


def as_vector(name: str, value: Any) -> np.ndarray:
    """f32[S] of a vector, a batch of one, or a number. Raises ValueError as `as_numbers`, and for other shapes."""
    numbers = as_numbers(name, value)
    if numbers.ndim > 2 or (numbers.ndim == 2 and len(numbers) != 1):
        raise ValueError(f"{name} has shape {list(numbers.shape)}: expected [S] or [1 S]")
    return numbers.reshape(-1)


def as_image(name: str, value: Any) -> np.ndarray:
    """An image of bytes or of floats in 0..1, [3 H W] or [1 3 H W], as `Frame` has it: u8[3 H W], or f32 of 0..255.

    Raises ValueError for other shapes, and as `as_pixels`.
    """
    array = as_array(name, value)
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    _check_shape(name, array, "[3 H W] or [1 3 H W]")
    return as_pixels(name, array)


def as_pixels(name: str, array: np.ndarray) -> np.ndarray:
    """Bytes as they are, floats of 0..1 as f32 of 0..255, of any shape.

    Raises ValueError for other types, and for floats out of that range with their place.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise ValueError(f"{name} is {array.dtype}, whose range nothing tells: give uint8, or floats in 0..1")
    pixels = as_numbers(name, array)
    outside = (pixels < -HALF_GREY_LEVEL) | (pixels > 1 + HALF_GREY_LEVEL)
    _reject(outside, name, array, "floats are in 0..1 (divide 0..255 by 255, or give uint8)")
    return pixels.clip(0, 1) * 255


def check_image(name: str, image: np.ndarray) -> None:
    """Raises ValueError, with the name, for what is no image of a `Frame`: u8[3 h w], or f32[3 h w] of 0..255."""
    _check_shape(name, image, "[3 h w]")
    if image.dtype.kind == "f":
        outside = ~((image >= -0.5) & (image <= 255.5))
        _reject(outside, name, image, "a frame's images are in 0..255")
    elif image.dtype != np.uint8:
        raise ValueError(f"{name} is {image.dtype}: a frame's images are uint8, or floats in 0..255")


class Inputs:
    """What a policy needs of an observation: all that its robot's data always had, within the range of that.

    What is decided for the caller is logged, once: a task that was left out, a camera that may be missing, a state far
    outside the training data, a task that was never trained, images in the first observation that are turned.

    Args:
        robot: whom the policy acts as.
        cameras: of the robot's data.
        missing_cameras: those of them that may be missing.
        max_state_distance: quantile ranges beyond the training data from which on a state is refused; None: never.
        max_prompt_bytes: from which on a task is refused, unless it was trained with longer ones; None: never.

    Raises ValueError for a camera in missing_cameras that is none of the robot's.
    """

    def __init__(
        self,
        robot: Robot,
        cameras: Sequence[str],
        missing_cameras: Sequence[str] = (),
        max_state_distance: float | None = None,
        max_prompt_bytes: int | None = None,
    ) -> None:
        self.robot, self.cameras = robot, tuple(cameras)
        self.max_state_distance = max_state_distance
        trained = max((_size(task) for task in robot.tasks), default=0)
        self.max_prompt_bytes = None if max_prompt_bytes is None else max(max_prompt_bytes, trained)
        self.missing_cameras = tuple(missing_cameras)
        for camera in self.missing_cameras:
            if camera not in self.cameras:
                raise ValueError(f"missing_cameras: {_unknown_camera(camera, self.cameras)}")
        self.takes_any_task = False
        """Whether whatever it is told is passed on, nothing too: to find out whether it follows what it is told."""
        self._tasks = {clean_task(task) for task in robot.tasks}
        self._said: set[str] = set()
        self._has_looked = False

    def anew(self) -> Inputs:
        """The same for another caller, to whom nothing has been said yet."""
        return Inputs(self.robot, self.cameras, self.missing_cameras, self.max_state_distance, self.max_prompt_bytes)

    def seen_by(self, cameras: Sequence[str]) -> Inputs:
        """The same of data of this robot that has other cameras."""
        missing = [camera for camera in self.missing_cameras if camera in cameras]
        return Inputs(self.robot, cameras, missing, self.max_state_distance, self.max_prompt_bytes)

    @property
    def needed_cameras(self) -> tuple[str, ...]:
        """The cameras without those that may be missing."""
        return tuple(camera for camera in self.cameras if camera not in self.missing_cameras)

    def __call__(self, frame: Frame) -> Frame:
        """The frame as the policy may see it. Raises ValueError with key, index and value for what it cannot act on."""
        self._check_images(frame.images)
        if not self._has_looked:
            self._has_looked = True
            self._look_at(frame.images)
        return replace(frame, task=self._task(frame.task), state=self._state(frame.state))

    def _check_images(self, images: Mapping[str, np.ndarray]) -> None:
        for camera, image in images.items():
            if camera not in self.cameras:
                raise ValueError(f"image: {_unknown_camera(camera, self.cameras)}")
            check_image(f"image {camera!r}", image)
        missing = [camera for camera in self.cameras if camera not in images]
        if needed := [camera for camera in missing if camera in self.needed_cameras]:
            raise ValueError(
                f"image: {', '.join(needed)} missing, and the policy was trained with {', '.join(self.cameras)}: give"
                f" all of them, or allow it to act without with missing_cameras=[{', '.join(missing)}]"
            )
        for camera in missing:
            self._say(camera, f"the camera {camera} is missing, as missing_cameras allows")

    def _look_at(self, images: Mapping[str, np.ndarray]) -> None:
        for camera, image in images.items():
            expected, seen = self.robot.looks.get(camera), Look.of([image])
            change = expected.shown_as(seen) if expected and seen else None
            if change:
                self._say(
                    f"image {camera}",
                    f"image {camera!r} looks {change}, compared with the training data: turn it back before the policy"
                    " sees it, or it acts on a scene that it was never trained on (`pi05 check` tells more)",
                )

    def _task(self, task: str) -> str:
        if not isinstance(task, str):
            raise ValueError(f"task is a {type(task).__name__}: give text")
        size = _size(task)  # counted first: reading it takes seconds per megabyte
        if self.max_prompt_bytes is not None and size > self.max_prompt_bytes:
            raise ValueError(
                f"task has {size} bytes, and max_prompt_bytes is {self.max_prompt_bytes}: shorten it, or raise that"
            )
        if self.takes_any_task:
            return task
        trained = self.robot.tasks
        if not task and len(trained) == 1:
            self._say("", f"no task is given: {trained[0]!r} is taken, the only one that the policy was trained on")
            return trained[0]
        if not clean_task(task).strip():
            known = f", as {trained[0]!r}, one of {len(trained)} that the policy was trained on" if trained else ""
            raise ValueError(f"task is {'blank' if task else 'missing'}: say what to do{known}")
        if trained and task not in self._said and clean_task(task) not in self._tasks:
            hint = suggestion(clean_task(task), self._tasks)
            self._say(task, f"the policy was never trained on the task {task!r}{hint}")
        return task

    def _state(self, state: np.ndarray | None) -> np.ndarray | None:
        dims = self.robot.state_dim
        if not dims:  # a simulator has one all the same
            return None
        if state is None:
            raise ValueError(f"state is missing: the policy was trained with one of {dims} dimensions")
        state = as_vector("state", state)
        if len(state) != dims:
            raise ValueError(f"state has {len(state)} dimensions, and the policy was trained with {dims}")
        self._check_distance(state)
        return state

    def _check_distance(self, state: np.ndarray) -> None:
        distance, quantiles = self.robot.state_distance(state), self.robot.normalize.state
        most = math.inf if self.max_state_distance is None else self.max_state_distance
        for dim in np.argsort(-distance, kind="stable").tolist():  # the worst is refused before another is spoken of
            if distance[dim] < min(REPORTED_DISTANCE, most):
                return
            where = (
                f"state[{dim}] is {state[dim]:.6g}: {distance[dim]:.3g} quantile ranges outside the training data,"
                f" whose quantiles are {quantiles.q01[dim]:.6g} (1 %) and {quantiles.q99[dim]:.6g} (99 %)"
            )
            if distance[dim] > most:
                raise ValueError(
                    f"{where}. More than {most:g} are refused: correct its units or the order of its dimensions, or"
                    " set max_state_distance"
                )
            if distance[dim] >= REPORTED_DISTANCE:
                self._say(f"state[{dim}]", where)

    def _say(self, key: str, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            log.warning(text)


def _size(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def check_actions(actions: np.ndarray, frame: Frame, robot: Robot, max_distance: float | None) -> None:
    """Raises NotFinite, or ValueError for actions f32[T A] in the robot's units that are too far from training's.

    max_distance: in quantile ranges; None bounds nothing.
    frame: what they answer.
    """
    _reject(~np.isfinite(actions), "action", actions, "the model's weights are broken, or its inputs", NotFinite)
    if max_distance is None:
        return
    distance = robot.action_distance(actions, frame)
    if distance.max(initial=0) > max_distance:
        place = np.unravel_index(distance.argmax(), distance.shape)
        raise ValueError(
            f"{_at('action', place)} is {actions[place]:.6g}: {distance[place]:.3g} quantile ranges outside the"
            f" training data, and max_action_distance is {max_distance:g}"
        )


def _check_shape(name: str, image: np.ndarray, expected: str) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or not image.size:
        raise ValueError(f"{name} has shape {list(image.shape)}: expected {expected}, of at least one pixel")


def _reject(bad: np.ndarray, name: str, values: np.ndarray, why: str, error: type[ValueError] = ValueError) -> None:
    """Raises an error that names the first of the bad values, if there is one."""
    if bad.any():
        place = np.unravel_index(bad.argmax(), bad.shape)
        raise error(f"{_at(name, place)} is {values[place]}: {why}")


def _at(name: str, place: Iterable[Any]) -> str:
    index = ", ".join(str(int(i)) for i in place)
    return f"{name}[{index}]" if index else name


def _unknown_camera(camera: Any, known: Sequence[str]) -> str:
    return f"the policy has no camera {camera!r}{suggestion(str(camera), known)}; it has {', '.join(known) or 'none'}"
