"""Places in texts, as `<locYYYY>`: shares of a camera's picture outside, of the model's image inside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import batched

from pi05_lightning.data.errors import BadFrame
from pi05_lightning.data.tokenizer import LOCATIONS
from pi05_lightning.types import NUM_LOC, Frame, Letterbox, edges_to_text

_LOCATION = re.compile(r"<loc(\d+)>")
_RUN = re.compile(r"(?:<loc\d+>)+")
"""Coordinates of one box, of one point, or of several without a word between them: y and x take turns."""


def to_model(text: str, letterbox: Letterbox) -> str:
    """A text whose places are shares of a camera's picture, with them as shares of the image that the model sees."""
    top, left, bottom, right = letterbox.window
    return _moved(text, ((bottom - top, top), (right - left, left)))


def to_picture(text: str, letterboxes: Iterable[Letterbox]) -> str:
    """The inverse of `to_model`, for a text about images with these letterboxes; beside a picture becomes its edge.

    Where they differ, nothing tells which image is meant, and the text stays as it is.
    """
    alike = set(letterboxes)
    if len(alike) != 1:
        return text
    top, left, bottom, right = alike.pop().window
    return _moved(text, ((1 / (bottom - top), -top / (bottom - top)), (1 / (right - left), -left / (right - left))))


def said_to_model(text: str, letterboxes: Iterable[Letterbox]) -> str:
    """The inverse of `to_picture`: what a model said in the picture, as it said it; also what is no place."""
    alike = set(letterboxes)
    return to_model(text, *alike) if len(alike) == 1 else text


def frame_to_model(frame: Frame, letterboxes: Mapping[str, Letterbox]) -> Frame:
    """A frame with the places in its texts where the model sees them, given each camera's letterbox.

    What names no camera is about all of the images.  Raises BadFrame when it has a place, and the images differ in
    shape, when a place is `misplaced`, or when an answer is about a camera without an image.  A subtask that the policy
    itself said may be anything: it is acted on as it was said.
    """

    def moved(text: str, camera: str | None = None) -> str:
        if not _LOCATION.search(text):
            return text
        if problem := misplaced(text):
            raise BadFrame(f"{text!r}: {problem}")
        about = set(letterboxes.values()) if camera is None else {letterboxes[camera]}
        if len(about) > 1:
            raise BadFrame(f"{text!r} names a place in images of several shapes: say in which camera's, or drop it")
        return to_model(text, *about) if about else text

    strangers = sorted({answer.camera for answer in frame.answers if answer.camera is not None} - letterboxes.keys())
    if strangers:
        raise BadFrame(f"it has a question about the camera {strangers[0]!r}, and images of {', '.join(letterboxes)}")
    answers = [
        replace(a, question=moved(a.question, a.camera), answer=moved(a.answer, a.camera)) for a in frame.answers
    ]
    subtask = frame.subtask
    if subtask is not None:
        subtask = moved(subtask) if frame.subtask_is_target else said_to_model(subtask, letterboxes.values())
    return replace(frame, task=moved(frame.task), subtask=subtask, answers=tuple(answers))


def _moved(text: str, axes: tuple[tuple[float, float], tuple[float, float]]) -> str:
    """The coordinate tokens of a text scaled and shifted, (scale, shift) for y and for x, which take turns in a run."""

    def run(match: re.Match[str]) -> str:
        steps = enumerate(map(int, _LOCATION.findall(match.group())))
        edges = (axes[i % 2][0] * (step + 0.5) / NUM_LOC + axes[i % 2][1] for i, step in steps)
        return edges_to_text(min(max(edge, 0.0), 1.0) for edge in edges)

    return _RUN.sub(run, text)


def misplaced(text: str) -> str | None:
    """What is wrong with the coordinate tokens that a text spells, or None."""
    for run in _RUN.finditer(text):
        numbers = _LOCATION.findall(run.group())
        outside = [number for number in numbers if len(number) != 4 or int(number) >= NUM_LOC]
        if outside:
            return f"<loc{outside[0]}> is outside the image, which goes from <loc0000> to {LOCATIONS[-1]}"
        if len(numbers) % 2:
            return f"{run.group()} is no place: a point is two tokens and a box four, with nothing between them"
        for edges in batched(map(int, numbers), 4):
            if len(edges) == 4 and (edges[0] > edges[2] or edges[1] > edges[3]):
                return f"the box {run.group()} is inside out: the order is ymin, xmin, ymax, xmax"
    return None
