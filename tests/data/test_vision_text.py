from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from pi05_lightning.data.errors import BadSample
from pi05_lightning.data.sources.vision_text import VisionTextConfig, VisionTextSource
from pi05_lightning.data.split import Split
from pi05_lightning.types import Answer, Modality, Shapes

SHAPES = Shapes(image_size=32, horizon=4, action_dim=4, vocab_size=300, fast_vocab_size=32, fast_skip_tokens=0)
ROWS = 20


def pixels(row: int) -> np.ndarray:
    return np.full((6, 8, 3), 10 * row, dtype=np.uint8)


def columns(rows: int = ROWS) -> dict[str, list]:
    return {
        "image": [Image.fromarray(pixels(row)) for row in range(rows)],
        "caption": [f" a grey wall, shade {row} " for row in range(rows)],
        "question": ["which shade is it?"] * rows,
        "answer": [str(row) for row in range(rows)],
    }


def saved(tmp_path: Path, **changed: list) -> Path:
    datasets.Dataset.from_dict(columns() | changed).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def open_source(path: Path, split: Split = "train", **options) -> VisionTextSource:
    return VisionTextConfig(path=str(path), **{"val_fraction": 0, **options}).open("web", split, SHAPES)


def as_arrow(folder: Path) -> Path:
    return saved(folder)


def as_parquet(folder: Path) -> Path:
    datasets.Dataset.from_dict(columns()).to_parquet(folder / "part-0.parquet")
    return folder


def as_one_parquet_file(folder: Path) -> Path:
    return as_parquet(folder) / "part-0.parquet"


def as_json_lines(folder: Path) -> Path:
    """Texts in JSON lines, images as files beside them."""
    rows = columns()
    (folder / "images").mkdir()
    with (folder / "rows.jsonl").open("w") as lines:
        for row in range(ROWS):
            Image.fromarray(pixels(row)).save(folder / f"images/{row}.png")
            texts = {name: rows[name][row] for name in ("caption", "question", "answer")}
            lines.write(json.dumps({"image": f"images/{row}.png", **texts}) + "\n")
    return folder


@pytest.mark.parametrize("write", [as_arrow, as_parquet, as_one_parquet_file, as_json_lines])
def test_captions_are_read_from_every_format(tmp_path: Path, write) -> None:
    source = open_source(write(tmp_path), camera="web")
    assert len(source.indices(Modality.WEB_CAPTION)) == ROWS
    np.testing.assert_array_equal(source[7].images["web"], pixels(7).transpose(2, 0, 1))
    assert source[7].answers == (Answer("caption", "a grey wall, shade 7", "web"),)
    assert source[7].actions is None


def test_questions_are_read_with_their_answers(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path))
    index = source.indices(Modality.QA)[3]
    assert source[index].answers == (Answer("which shade is it?", "3", "image"),)


def test_a_row_may_hold_several_questions(tmp_path: Path) -> None:
    path = saved(tmp_path, question=[["a?", "b?"]] * ROWS, answer=[["1", "2"]] * ROWS)
    source = open_source(path)
    assert [answer.answer for answer in source[source.indices(Modality.QA)[0]].answers] == ["1", "2"]


def test_captions_and_questions_are_separate_frames_of_an_image(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path, caption=["a wall"] * 4 + [None] * (ROWS - 4)))
    sizes = {modality: len(source.indices(modality)) for modality in Modality}
    assert {modality: size for modality, size in sizes.items() if size} == {Modality.WEB_CAPTION: 4, Modality.QA: ROWS}
    assert source.address(4) == "dataset 'web', row 0, question"


def test_data_without_captions_teaches_answers_only(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path), caption_column="absent")
    assert len(source.indices(Modality.WEB_CAPTION)) == 0
    assert len(source.indices(Modality.QA)) == len(source) == ROWS


def test_each_image_can_name_its_camera(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path, camera=["left", "right"] * (ROWS // 2)))
    assert source.camera_names == ["left", "right"]
    assert list(source[1].images) == ["right"]


def test_training_and_validation_share_no_row(tmp_path: Path) -> None:
    path = saved(tmp_path)
    sides = [{frame.answers[0].answer for frame in _all(path, split)} for split in ("train", "val")]
    assert len(sides[0] | sides[1]) == ROWS
    assert not sides[0] & sides[1]
    assert 4 <= len(sides[1]) <= 6


def _all(path: Path, split: Split, **options) -> list:
    source = open_source(path, split, val_fraction=0.25, **options)
    return [source[index] for index in source.indices(Modality.WEB_CAPTION)]


def test_rows_of_a_group_stay_on_one_side(tmp_path: Path) -> None:
    path = saved(tmp_path, scene=[f"scene {row // 4}" for row in range(ROWS)])
    sides = [
        {int(f.answers[0].answer[-2:]) // 4 for f in _all(path, s, group_column="scene")} for s in ("train", "val")
    ]
    assert not sides[0] & sides[1]


def divided(folder: Path, **rows: int) -> Path:
    parts = {name: datasets.Dataset.from_dict(columns(count)) for name, count in rows.items()}
    datasets.DatasetDict(parts).save_to_disk(folder / "parts")
    return folder / "parts"


@pytest.mark.parametrize(
    ("parts", "train", "val", "test"),
    [
        ({"train": 8, "validation": 2}, 8, 2, 0),
        ({"train": 8, "validation": 2, "test": 3}, 8, 2, 3),
        ({"train": 8, "test": 3}, 6, 2, 3),  # what is for testing is no validation
        ({"training": 8, "dev": 2, "eval": 3}, 8, 2, 3),
        ({"train": 8}, 6, 2, 0),
        ({"everything": 8}, 6, 2, 0),
    ],
)
def test_each_part_is_what_the_dataset_calls_it(
    tmp_path: Path, parts: dict[str, int], train: int, val: int, test: int
) -> None:
    path = divided(tmp_path, **parts)
    splits: tuple[Split, ...] = ("train", "val", "test")
    sizes = [len(open_source(path, split, question_column="absent", val_fraction=0.2)) for split in splits]
    assert sizes == [train, val, test]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"test": 3}, r"the parts \['test'\], none of them for training: name it, as `parts: {train: …}`"),
        ({"validation": 3}, "none of them for training"),
        ({"train_sft": 4, "train_rl": 4}, r"\['train_sft', 'train_rl'\], none of them for training"),
        ({"train2014": 4, "val": 4}, "none of them for training"),
        ({"train": 4, "training": 4}, "train and training are both the train part"),
        ({"train": 4, "val": 4, "dev": 4}, "val and dev are both the val part"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_parts_that_could_be_taken_for_another_are_refused(
    tmp_path: Path, split: Split, parts: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(divided(tmp_path, **parts), split)


def test_parts_that_are_not_used_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = divided(tmp_path, train=4, extra=3, testB=2)
    assert len(open_source(path, question_column="absent")) == 4
    assert "its parts ['extra', 'testB'] are not used" in caplog.text


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({"train": "train+extra"}, [7, 0, 0]),
        ({"train": "extra", "val": "train", "test": "testB"}, [3, 4, 2]),
        ({"test": "testB"}, [4, 0, 2]),
    ],
)
def test_parts_can_be_given_by_name(tmp_path: Path, given: dict[Split, str], sizes: list[int]) -> None:
    path = divided(tmp_path, train=4, extra=3, testB=2)
    splits: tuple[Split, ...] = ("train", "val", "test")
    assert [len(open_source(path, split, parts=given, question_column="absent")) for split in splits] == sizes


def test_a_given_part_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no parts \['more'\]: it has \['train', 'extra'\]; correct `parts`"):
        open_source(divided(tmp_path, train=4, extra=3), parts={"train": "train+more"})


@pytest.mark.parametrize("given", [{"train": "train+train"}, {"train": "train", "val": "train"}])
def test_a_part_cannot_be_on_two_sides(tmp_path: Path, given: dict[Split, str]) -> None:
    with pytest.raises(ValueError, match="names a part twice"):
        open_source(divided(tmp_path, train=4, extra=3), parts=given)


@pytest.mark.parametrize("scene", [None, "scene"])
def test_no_kind_of_text_leaves_training(tmp_path: Path, scene: str | None) -> None:
    """The one caption is in the second row, or group, which is held out where all are alike."""
    captions = [None, None, "a wall", *[None] * (ROWS - 3)]
    path = saved(tmp_path, caption=captions, scene=[row // 2 for row in range(ROWS)])
    train, val = (open_source(path, split, val_fraction=0.2, group_column=scene) for split in ("train", "val"))
    assert len(train.indices(Modality.WEB_CAPTION)) == 1
    assert len(val.indices(Modality.QA))


def test_every_question_is_held_out_as_often_whatever_the_period_with_which_they_alternate(tmp_path: Path) -> None:
    asked = [f"question {row % 21}?" for row in range(21 * 4)]
    path = tmp_path / "asked"
    rows = {"image": [Image.fromarray(pixels(0))] * len(asked), "question": asked, "answer": ["yes"] * len(asked)}
    datasets.Dataset.from_dict(rows).save_to_disk(path)
    source = open_source(path, val_fraction=0.1)
    assert {source[index].answers[0].question for index in range(len(source))} == set(asked)


def test_one_row_leaves_nothing_to_validate_on_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not len(open_source(divided(tmp_path, train=1), "val", val_fraction=0.1))
    assert "no row is held out" in caplog.text


def test_workers_read_the_same_images(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path), question_column="absent")
    for index, frame in enumerate(DataLoader(source, batch_size=None, num_workers=2)):
        np.testing.assert_array_equal(np.asarray(frame.images["image"]), pixels(index).transpose(2, 0, 1))


# --- bad data


def test_grey_and_transparent_images_become_colour_where_asked(tmp_path: Path) -> None:
    images = [Image.new("L", (8, 6), 100), Image.new("RGBA", (8, 6), (1, 2, 3, 0))] * (ROWS // 2)
    path = saved(tmp_path, image=images)
    with pytest.raises(BadSample, match="dataset 'web', row 1, image: the image is transparent"):
        open_source(path)[1]
    source = open_source(path, convert_images=True)
    assert [source[index].images["image"][:, 0, 0].tolist() for index in (0, 1)] == [[100] * 3, [255] * 3]


def test_a_damaged_image_is_an_error_with_its_row(tmp_path: Path) -> None:
    folder = as_json_lines(tmp_path)
    (folder / "images/4.png").write_bytes(b"broken")
    source = open_source(folder)
    with pytest.raises(BadSample, match=r"dataset 'web', row 4, image: .*images/4\.png cannot be read"):
        source[4]


def test_a_missing_image_is_an_error_with_its_row(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path, image=[columns()["image"][0]] * 5 + [None] * (ROWS - 5)))
    with pytest.raises(BadSample, match="dataset 'web', row 5, image: no image is stored"):
        source[5]


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_caption_is_found_on_opening(tmp_path: Path, text: str) -> None:
    path = saved(tmp_path, caption=["fine"] * 6 + [text] * (ROWS - 6))
    with pytest.raises(BadSample, match=r"dataset 'web', row 6, caption: a text is empty.*skip"):
        open_source(path)


def test_skipping_leaves_out_rows_without_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path, caption=["fine"] * 6 + [None] * (ROWS - 6))
    with caplog.at_level(logging.WARNING):
        source = open_source(path, question_column="absent", on_bad_sample="skip")
    assert len(source) == 6
    assert source.rejects.frames == ROWS - 6
    assert "dataset 'web', row 6" in caplog.text


def test_questions_without_as_many_answers_are_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path, question=[["a?", "b?"]] * ROWS, answer=[["1"]] * ROWS)
    with pytest.raises(BadSample, match=r"row 0, question: 2 questions but 1 answers"):
        open_source(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "photo"}, r"no \['photo'\]; its columns are \['image', 'caption'"),
        ({"group_column": "scene"}, r"no \['scene'\]"),
        ({"caption_column": "text", "answer_column": "reply"}, "no captions, questions with answers, nor boxes"),
    ],
)
def test_a_missing_column_is_named(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(saved(tmp_path), **options)


@pytest.mark.parametrize("name", ["absent/folder/deep", "empty"])
def test_a_path_without_data_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=name):
        open_source(tmp_path / name)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = as_one_parquet_file(tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"part-0\.parquet cannot be read"):
        open_source(path)


# --- boxes, parts, streams


def test_a_question_of_boxes_that_asks_for_what_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"box_prompt asks for label: only \{labels\} is filled in"):
        VisionTextConfig(path="web", box_prompt="detect {label}")


def test_boxes_become_a_question_and_coordinate_tokens(tmp_path: Path) -> None:
    boxes, labels = [[[0, 0, 4, 3], [4, 3, 8, 6]]] * ROWS, [["cup", "cup"]] * ROWS
    source = open_source(saved(tmp_path, boxes=boxes, labels=labels), question_column="absent")
    frame = source[source.indices(Modality.QA)[2]]
    first, second = "<loc0000><loc0000><loc0512><loc0512> cup", "<loc0512><loc0512><loc1023><loc1023> cup"
    assert frame.answers == (Answer("detect cup", f"{first} ; {second}", "image"),)
    np.testing.assert_array_equal(frame.images["image"], pixels(2).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("order", "most", "box"),
    [("yxyx", None, [3, 4, 6, 8]), ("xywh", 1, [0.5, 0.5, 0.5, 0.5]), ("cxcywh", 1000, [750, 750, 500, 500])],
)
def test_the_configuration_says_what_a_boxs_numbers_are(tmp_path: Path, order: str, most, box: list) -> None:
    path = saved(tmp_path, boxes=[box] * ROWS, labels=["cup"] * ROWS)
    source = open_source(path, box_order=order, box_range=most, box_prompt="find the {labels}", question_column="none")
    frame = source[source.indices(Modality.QA)[0]]
    assert frame.answers[0] == Answer("find the cup", "<loc0512><loc0512><loc1023><loc1023> cup", "image")


def test_one_image_may_have_all_three_kinds_of_text(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path, boxes=[[0, 0, 1, 1]] * ROWS, labels=["cup"] * ROWS))
    assert len(source.indices(Modality.WEB_CAPTION)) == ROWS
    assert len(source.indices(Modality.QA)) == 2 * ROWS


def test_each_of_several_captions_is_one_answer(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path, caption=[["a wall", "grey"]] * ROWS), question_column="absent")
    assert [answer.answer for answer in source[0].answers] == ["a wall", "grey"]


def test_files_say_by_their_names_what_is_for_validation(tmp_path: Path) -> None:
    for part, rows in (("train-00000-of-00001", 6), ("validation-00000-of-00001", 3), ("test-00000-of-00001", 2)):
        datasets.Dataset.from_dict(columns(rows)).to_parquet(tmp_path / "data" / f"{part}.parquet")
    splits: tuple[Split, ...] = ("train", "val", "test")
    sizes = [len(open_source(tmp_path, split).indices(Modality.WEB_CAPTION)) for split in splits]
    assert sizes == [6, 3, 2]


def write_parquet(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns(2)).to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.mark.parametrize(
    ("names", "train", "said"),
    [
        (["train-00000-of-00001", "coco_val"], 2, False),
        (["rows", "test"], 2, False),
        (["rows", "test/rows"], 2, False),
        (["rows", "pick_test_tubes"], 2, True),
        (["rows", "dev_kit"], 2, True),
        (["rows", "val/rows", "pick_test_tubes"], 2, True),
        (["a/train", "test_tubes/train"], 4, False),  # what says nothing else goes before a word among others
        (["train/pick_test_tubes", "validation/dev_kit"], 2, False),  # folders go first, as for `datasets`
    ],
)
def test_a_word_that_keeps_a_file_from_training_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str], train: int, said: bool
) -> None:
    source = open_source(write_parquet(tmp_path, *names))
    assert len(source.indices(Modality.WEB_CAPTION)) == train
    told = [record.message for record in caplog.records if "by a word in its name" in record.message]
    assert len(told) == said
    if said:
        part = told[0].rpartition("parts: {train: ")[2].removesuffix("}")
        assert len(open_source(tmp_path, parts={"train": part}).indices(Modality.WEB_CAPTION)) == 4


def test_files_of_another_format_are_told_and_what_datasets_left_over_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    as_json_lines(tmp_path)
    (tmp_path / "cache-0123.arrow").write_bytes(b"left over")
    assert len(open_source(tmp_path)) == 2 * ROWS
    assert not caplog.records
    source = open_source(write_parquet(tmp_path, "more"))
    assert len(source) == 4
    assert ".parquet files are read, and the .jsonl files, as rows.jsonl, are not" in caplog.text


def test_image_paths_may_be_relative_to_their_own_json_lines(tmp_path: Path) -> None:
    (tmp_path / "shelf").mkdir()
    source = open_source(as_json_lines(tmp_path / "shelf").parent)
    np.testing.assert_array_equal(source[3].images["image"], pixels(3).transpose(2, 0, 1))


def as_arrow_files(folder: Path) -> Path:
    data = datasets.Dataset.from_dict(columns())
    data.save_to_disk(folder / "saved")
    (folder / "plain").mkdir()
    next((folder / "saved").glob("*.arrow")).rename(folder / "plain" / "part.arrow")
    return folder / "plain"


@pytest.mark.parametrize("write", [as_arrow, as_arrow_files, as_parquet, as_json_lines])
def test_a_stream_is_read_as_far_as_it_is_asked_for(tmp_path: Path, write) -> None:
    source = open_source(write(tmp_path), stream_rows=7)
    assert len(source.indices(Modality.WEB_CAPTION)) == 7
    for index in range(7):
        shade = int(source[index].answers[0].answer.rpartition(" ")[2])
        np.testing.assert_array_equal(source[index].images["image"], pixels(shade).transpose(2, 0, 1))


def captions_of(source: VisionTextSource) -> list[str]:
    return [source[index].answers[0].answer for index in source.indices(Modality.WEB_CAPTION)]


@pytest.mark.parametrize("write", [as_arrow, as_parquet])
def test_rows_of_a_stream_are_from_all_of_it_and_the_same_every_time(tmp_path: Path, write) -> None:
    path = write(tmp_path)
    seven, again, nine = (captions_of(open_source(path, stream_rows=count)) for count in (7, 7, 9))
    assert seven == again == nine[:7]
    assert max(int(caption.rpartition(" ")[2]) for caption in seven) > 7


def test_a_stream_whose_file_changed_is_read_anew(tmp_path: Path) -> None:
    path = as_one_parquet_file(tmp_path)
    open_source(path, stream_rows=2)
    datasets.Dataset.from_dict({**columns(), "caption": ["new"] * ROWS}).to_parquet(path)
    assert open_source(path, stream_rows=2)[0].answers[0].answer == "new"
