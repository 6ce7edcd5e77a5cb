"""The metrics of answers by what was asked."""

from __future__ import annotations

from pi05_lightning import Pi05DataModule
from pi05_lightning.evaluation.metrics import Evaluator, Measured, Questions
from pi05_lightning.evaluation.metrics.questions import OTHERS, Table
from pi05_lightning.types import Subset

from .conftest import batches
from .validate import answered

QA = "robot/qa"


def table(*measured: Measured) -> Table:
    questions = Questions()
    for one in measured:
        questions.update(one)
    return questions.table()


def test_object_that_is_taken_for_another_has_a_row_that_says_so() -> None:
    red, blue = ("where is the red button?", True), ("where is the blue button?", False)
    rows = table(answered(red, red), answered(red, blue), answered(blue))
    assert rows == {red[0]: {"samples": 3, "exact_match": 1.0}, blue[0]: {"samples": 2, "exact_match": 0.0}}


def test_questions_that_were_asked_once_share_a_row() -> None:
    rows = table(answered(("open?", True), ("open?", True), ("what is this?", True), ("and this?", False)))
    assert rows == {"open?": {"samples": 2, "exact_match": 1.0}, OTHERS: {"samples": 2, "exact_match": 0.5}}


def test_no_table_where_every_question_is_another() -> None:
    assert table(answered(("what is this?", True), ("and this?", False))) == {}


def test_places_in_questions_are_all_alike() -> None:
    rows = table(answered(("what is at <loc0001><loc0900>?", True), ("what is at <loc0700><loc0005>?", False)))
    assert rows == {"what is at <loc><loc>?": {"samples": 2, "exact_match": 0.5}}


def test_every_answer_knows_what_was_asked(data: Pi05DataModule, evaluator: Evaluator) -> None:
    for batch in batches(data, QA):
        measured = evaluator.measure(batch, Subset.parse(QA))
        assert set(measured.questions) <= {"detect the handle", "what colour is it?", "is it closed?"}
        has_box = [question == "detect the handle" for question in measured.questions]
        assert measured.values["box_iou"].mask.tolist() == has_box
        assert measured.values["exact_match"].mask.tolist() == [not boxed for boxed in has_box]
