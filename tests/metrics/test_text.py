import pytest

from pi05_lightning.evaluation.metrics.text import box_iou


def test_iou_of_shifted_boxes_is_what_it_is_by_hand() -> None:
    # two squares of side .2 whose overlap is .1 × .2: .02 / (.04 + .04 - .02)
    assert box_iou([(0.0, 0.0, 0.2, 0.2)], [(0.1, 0.0, 0.3, 0.2)]) == pytest.approx(1 / 3)


def test_box_that_was_not_said_counts_as_zero() -> None:
    box = (0.0, 0.0, 0.5, 0.5)
    assert box_iou([box], [box, box]) == 0.5


def test_boxes_apart_have_no_overlap() -> None:
    assert box_iou([(0.0, 0.0, 0.1, 0.1)], [(0.5, 0.5, 0.6, 0.6)]) == 0


def test_box_inside_out_is_no_box() -> None:
    assert box_iou([(0.5, 0.5, 0.0, 0.0)], [(0.0, 0.0, 0.5, 0.5)]) == 0


def test_iou_stays_within_0_and_1_for_boxes_inside_out() -> None:
    assert 0 <= box_iou([(0.9, 0.0, 0.1, 1.0)], [(0.2, 0.2, 0.4, 0.4)]) <= 1
