"""Boxes in, coordinate tokens out: every order and unit, and nothing outside the image."""

from __future__ import annotations

import json

import pytest

from pi05_lightning.data.boxes import detections, from_lerobot, to_box
from pi05_lightning.data.places import misplaced
from pi05_lightning.types import Box, box_to_text, text_to_boxes

IN_PIXELS = (0.25, 0.125, 0.75, 0.5)  # ymin, xmin, ymax, xmax of the box below


@pytest.mark.parametrize(
    ("order", "values"),
    [
        ("xyxy", (10, 10, 40, 30)),
        ("yxyx", (10, 10, 30, 40)),
        ("xywh", (10, 10, 30, 20)),
        ("cxcywh", (25, 20, 30, 20)),
    ],
)
def test_every_order_means_the_same_box(order, values: tuple[int, ...]) -> None:
    assert to_box(values, order, height=40, width=80) == IN_PIXELS


def test_a_box_may_touch_every_edge() -> None:
    assert to_box((0.5, 0.5, 1, 1), "cxcywh", 1, 1) == (0, 0, 1, 1)


@pytest.mark.parametrize(
    "values",
    [(-1, 0, 5, 5), (0, 0, 81, 5), (0, 0, 5, 41), (9, 0, 5, 5), (1, 2, 3), (0, 0, float("nan"), 5), (0, 0, None, 5)],
)
def test_a_box_that_is_not_in_the_image_is_refused(values: tuple) -> None:
    with pytest.raises(
        ValueError, match=r"the box .*(is not inside the image, 80 wide and 40 high|is not four numbers)"
    ):
        to_box(values, "xyxy", 40, 80)


def test_labels_follow_their_boxes_as_in_paligemma() -> None:
    said = detections([(0, 0, 0.5, 1), (0.5, 0.5, 1, 1)], ["cup", "plate"])
    assert said == "<loc0000><loc0000><loc0512><loc1023> cup ; <loc0512><loc0512><loc1023><loc1023> plate"


def test_lerobots_detections_become_tokens() -> None:
    box = {"label": "cup", "bbox_format": "xyxy", "bbox": [10, 10, 40, 30]}
    assert from_lerobot(json.dumps({"detections": [box]}), 40, 80) == "<loc0256><loc0128><loc0768><loc0512> cup"


def test_lerobots_points_become_two_tokens() -> None:
    point = {"label": "handle", "point_format": "xy", "point": [40, 10]}
    assert from_lerobot(json.dumps(point), 40, 80) == "<loc0256><loc0512> handle"


@pytest.mark.parametrize("answer", ["red", '{"label": "cup", "count": 2}', "{not json"])
def test_other_answers_stay_as_they_are(answer: str) -> None:
    assert from_lerobot(answer, 40, 80) == answer


@pytest.mark.parametrize(
    "answer",
    ['{"label": "x", "point": null}', '{"detections": ["cup"]}', '{"detections": [{"bbox": [[1, 2], [3, 4]]}]}'],
)
def test_malformed_detections_and_points_are_refused_with_the_answer(answer: str) -> None:
    with pytest.raises(ValueError, match="malformed"):
        from_lerobot(answer, 48, 64)


def test_nothing_detected_is_said() -> None:
    assert from_lerobot('{"detections": []}', 40, 80) == "none"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<loc0001><loc0002><loc0003><loc1024> cup", "<loc1024> is outside the image"),
        ("<loc01><loc0002><loc0003><loc0004>", "<loc01> is outside"),
        ("<loc0500><loc0002><loc0003><loc0004>", "inside out"),
        ("<loc0001> <loc0002> <loc0003> <loc0004> cup", "<loc0001> is no place: a point is two tokens and a box four"),
        ("<loc0001><loc0002><loc0003> cup", "<loc0001><loc0002><loc0003> is no place"),
    ],
)
def test_tokens_that_name_no_box_in_the_image_are_found(text: str, problem: str) -> None:
    found = misplaced(text)
    assert found is not None
    assert problem in found


def test_boxes_points_and_plain_text_are_fine() -> None:
    assert misplaced("a <loc0001><loc0002><loc0003><loc0004> cup ; <loc0009><loc0001> tip; done") is None


# --- to tokens and back


def test_boxes_come_back_within_a_step() -> None:
    boxes = [(0.0, 0.25, 0.5, 1.0), (0.1, 0.2, 0.3, 0.4)]
    back = text_to_boxes("; ".join(f"{box_to_text(box)} thing" for box in boxes))
    for box, found in zip(boxes, back, strict=True):
        assert found == pytest.approx(box, abs=1 / 2048 + 1e-9)


def test_the_images_edges_are_the_first_and_last_location() -> None:
    assert box_to_text((0.0, 0.0, 1.0, 1.0)) == "<loc0000><loc0000><loc1023><loc1023>"


@pytest.mark.parametrize(
    "box", [(-0.1, 0, 1, 1), (0, 0, 1.1, 1), (0.5, 0, 0.4, 1), (0, 0.5, 1, 0.4), (float("nan"), 0, 1, 1)]
)
def test_a_box_that_is_not_in_the_image_has_no_tokens(box: Box) -> None:
    with pytest.raises(ValueError, match="not inside the image"):
        box_to_text(box)


def test_an_unfinished_box_is_left_out() -> None:
    assert text_to_boxes("<loc0001><loc0002><loc0003> handle") == []
