"""Boxes are where the model sees them, whatever shape a camera's picture and whatever size the model's image has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from PIL import Image

from pi05_lightning import Pi05DataModule
from pi05_lightning.data.errors import BadFrame, BadSample
from pi05_lightning.data.places import to_model, to_picture
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.sources.base import SourceConfig
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.data.sources.vision_text import VisionTextConfig
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.evaluation.metrics import Evaluator
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.location import Points
from pi05_lightning.types import (
    Answer,
    Frame,
    HeadTargets,
    Letterbox,
    Modality,
    Sample,
    Subset,
    box_to_text,
    text_to_boxes,
)
from tests.data.recorded import data_file, edit_info, rewrite
from tests.untrained import untrained_model

PICTURES = [(480, 640), (640, 480), (96, 128), (64, 64), (50, 333), (720, 405)]
SIZES = [28, 64, 224]
BOX = (0.5, 0.25, 0.75, 0.5)  # ymin, xmin, ymax, xmax of a white square on grey


def picture(h: int, w: int) -> np.ndarray:
    """u8[h w 3]."""
    image = np.full((h, w, 3), 60, np.uint8)
    image[round(BOX[0] * h) : round(BOX[2] * h), round(BOX[1] * w) : round(BOX[3] * w)] = 250
    return image


def bounds(image: np.ndarray) -> tuple[float, ...]:
    """Where the white is in u8[3 H W], as shares of it."""
    rows, columns = (np.flatnonzero((image[0] > 155).any(axis)) for axis in (1, 0))
    height, width = image.shape[1:]
    return rows[0] / height, columns[0] / width, (rows[-1] + 1) / height, (columns[-1] + 1) / width


def robot(root: Path, h: int, w: int, answer: str | None = None) -> Path:
    """A LeRobot dataset with a video of the square, and on each frame a question where it is."""
    features = {
        "observation.images.top": {"dtype": "video", "shape": (h, w, 3), "names": ["height", "width", "channels"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    }
    dataset = LeRobotDataset.create("pi05/square", 10, features, root=root)
    rng = np.random.default_rng(0)
    for _ in range(4):
        values = {key: rng.normal(size=2).astype(np.float32) for key in ("action", "observation.state")}
        dataset.add_frame({"observation.images.top": picture(h, w), **values, "task": "find the square"})
    dataset.save_episode()
    dataset.finalize()
    x, y = round(BOX[1] * w), round(BOX[0] * h)
    pixels = {"label": "square", "bbox_format": "xyxy", "bbox": [x, y, round(BOX[3] * w), round(BOX[2] * h)]}
    said = answer or json.dumps({"detections": [pixels]})
    row = {"style": "vqa", "camera": "observation.images.top", "tool_calls": None}
    events = [{"role": "user", "content": "detect the square", **row}, {"role": "assistant", "content": said, **row}]
    rewrite(data_file(root), language_events=[events] * 4)
    return root


def web(root: Path, h: int, w: int) -> Path:
    """Pictures of the square with its box in pixels."""
    box = [round(BOX[1] * w), round(BOX[0] * h), round(BOX[3] * w), round(BOX[2] * h)]
    rows = {"image": [Image.fromarray(picture(h, w))] * 2, "boxes": [[box]] * 2, "labels": [["square"]] * 2}
    datasets.Dataset.from_dict(rows).save_to_disk(root)
    return root


def answered(config: SourceConfig, size: int) -> tuple[Sample, Processor]:
    shapes = replace(ModelConfig.preset("debug").shapes, image_size=size)
    data = Pi05DataModule({"it": config}, shapes=shapes, num_workers=0)
    source = data.sources("train")["it"]
    source.prepare()
    data.processor.targets["location"] = HeadTargets(Points(), frozenset(Modality))
    return data.processor.sample(source[0], Subset("it", Modality.QA)), data.processor


def assert_box_is_where_the_square_is(sample: Sample, processor: Processor, size: int) -> None:
    (image,) = sample.images.values()
    tolerance = 1.01 / size + 2 / 1024  # a pixel, and the steps of <loc>
    (box,) = text_to_boxes(processor.tokenizer.decode(sample.tokens.tolist()))
    assert box == pytest.approx(bounds(image), abs=tolerance)
    (point,) = sample.targets["location"]
    assert point.centre == pytest.approx(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), abs=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", PICTURES)
def test_boxes_in_web_images_are_where_the_model_sees_them(tmp_path: Path, shape: tuple[int, int], size: int) -> None:
    config = VisionTextConfig(str(web(tmp_path / "web", *shape)), val_fraction=0)
    assert_box_is_where_the_square_is(*answered(config, size), size)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("shape", [(96, 128), (128, 96), (64, 64)])
def test_boxes_in_robot_videos_are_where_the_model_sees_them(
    tmp_path: Path, shape: tuple[int, int], cached: bool
) -> None:
    config = LeRobotConfig(str(robot(tmp_path / "robot", *shape)), val_fraction=0, image_cache=cached)
    assert_box_is_where_the_square_is(*answered(config, 64), 64)


def test_box_of_the_published_example() -> None:
    letterbox = Letterbox.of((480, 640), (224, 224))
    (seen,) = text_to_boxes(to_model(box_to_text((0.063, 0.1, 0.188, 0.3)), letterbox))
    assert seen == pytest.approx((0.063 * 0.75 + 0.125, 0.1, 0.188 * 0.75 + 0.125, 0.3), abs=1.5 / 1024)


@pytest.mark.parametrize("shape", PICTURES)
@pytest.mark.parametrize("size", SIZES)
def test_places_that_the_model_says_come_back_to_the_picture(shape: tuple[int, int], size: int) -> None:
    letterbox = Letterbox.of(shape, (size, size))
    seen = to_model("<loc0100><loc0200><loc0900><loc1000> cup ; <loc0512><loc0007> tip", letterbox)
    (back,) = text_to_boxes(to_picture(seen, [letterbox]))
    tolerance = 1 / 1024 / min(letterbox.height, letterbox.width) * size
    assert back == pytest.approx((100.5 / 1024, 200.5 / 1024, 900.5 / 1024, 1000.5 / 1024), abs=tolerance)
    assert to_model(to_picture(seen, [letterbox]), letterbox) == seen
    assert to_picture(seen, [letterbox]).endswith(" tip")


def test_a_square_picture_keeps_every_token() -> None:
    text = "".join(f"<loc{step:04d}>" for step in range(1024))
    assert to_model(text, Letterbox.of((64, 64), (224, 224))) == text


def test_a_place_outside_the_picture_comes_to_its_edge() -> None:
    letterbox = Letterbox.of((480, 640), (224, 224))
    assert to_picture("<loc0000><loc0000><loc1023><loc1023>", [letterbox]) == "<loc0000><loc0000><loc1023><loc1023>"


def two_cameras(first: tuple[int, int], second: tuple[int, int], **said: object) -> Sample:
    shapes = ModelConfig.preset("debug").shapes
    processor = Processor(shapes, TextTokenizer.load("tiny"), ["a", "b"], {})
    images = {"a": np.zeros((3, *first), np.uint8), "b": np.zeros((3, *second), np.uint8)}
    return processor.sample(Frame(images=images, **said), Subset("robot", Modality.QA))  # type: ignore[arg-type]


def test_a_place_without_a_camera_is_refused_where_the_cameras_differ_in_shape() -> None:
    answers = (Answer("where is it?", "<loc0000><loc0000><loc0512><loc0512>"),)
    assert two_cameras((48, 64), (96, 128), answers=answers)
    with pytest.raises(BadFrame, match="a place in images of several shapes"):
        two_cameras((48, 64), (64, 48), answers=answers)


@pytest.mark.parametrize("said", ["task", "subtask", "question", "answer"])
@pytest.mark.parametrize("place", ["<loc1500><loc0100>", "<loc0100>, <loc0200>"])
def test_a_place_that_is_none_is_refused_in_every_text(said: str, place: str) -> None:
    texts = {"question": "where is it?", "answer": "there"} | {said: f"at {place}"}
    answers = (Answer(texts["question"], texts["answer"]),)
    frame_texts = {name: text for name, text in texts.items() if name in ("task", "subtask")}
    with pytest.raises(BadFrame, match=r"'at <loc.*(outside the image|is no place)"):
        two_cameras((48, 64), (48, 64), answers=answers, **frame_texts)


@pytest.mark.parametrize("place", ["<loc1500><loc0100>", "<loc0100>|"])
def test_what_the_policy_said_itself_may_be_no_place(place: str) -> None:
    answers = (Answer("where is it?", "there"),)
    assert two_cameras((48, 64), (48, 64), answers=answers, subtask=f"at {place}", subtask_is_target=False)


def test_a_subtask_that_is_told_is_where_training_had_it() -> None:
    processor = Processor(ModelConfig.preset("debug").shapes, TextTokenizer.load("tiny"), ["a"], {})
    subtask = f"go to {box_to_text(BOX)}"
    frame = Frame(images={"a": np.zeros((3, 48, 64), np.uint8)}, task="wipe", subtask=subtask)
    trained = processor.sample(frame, Subset("robot", Modality.HL_SUBTASK)).tokens.tolist()
    told = processor.prompt(replace(frame, subtask=None), "robot", subtask).tokens.tolist()
    seen, acted_on = (text_to_boxes(processor.tokenizer.decode(tokens)) for tokens in (trained, told))
    assert acted_on == seen != text_to_boxes(subtask)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_a_subtask_that_the_model_said_wrong_is_acted_on_as_it_said_it(shape: tuple[int, int]) -> None:
    processor = Processor(ModelConfig.preset("debug").shapes, TextTokenizer.load("tiny"), ["a", "b"], {})
    frame = Frame(images={"a": np.zeros((3, 48, 64), np.uint8), "b": np.zeros((3, *shape), np.uint8)}, task="wipe")
    said = "at <loc0512><loc0300><loc0700>, <loc0400>"
    letterboxes = processor.prompt(frame, "robot").letterboxes.values()
    told = processor.prompt(frame, "robot", to_picture(said, letterboxes)).tokens.tolist()
    assert said.replace(" ", "") in processor.tokenizer.decode(told).replace(" ", "")


def test_a_question_about_a_camera_without_an_image_is_refused() -> None:
    with pytest.raises(BadFrame, match="about the camera 'c', and images of a, b"):
        two_cameras((48, 64), (48, 64), answers=(Answer("what?", "this", "c"),))


def test_pixels_of_a_picture_of_another_size_than_declared_are_no_place(tmp_path: Path) -> None:
    root = robot(tmp_path / "robot", 96, 128)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["observation.images.top"]["shape"] = [192, 256, 3]
    edit_info(root, features=features)
    source = LeRobotConfig(str(root), val_fraction=0).open("it", "train", ModelConfig.preset("debug").shapes)
    with pytest.raises(BadSample, match=r"episode 0, frame 0, top: its image is 96 x 128, and meta/info.json says 192"):
        source[0]


def test_what_a_person_reads_is_in_the_pictures_coordinates(tmp_path: Path) -> None:
    config = ModelConfig.preset("debug")
    data = Pi05DataModule(
        {"it": VisionTextConfig(str(web(tmp_path / "web", 96, 128)), val_fraction=0.5)},
        shapes=config.shapes,
        num_workers=0,
    )
    (batch,) = data.val_dataloader()[0]
    evaluator = Evaluator(untrained_model(config), data.processor)
    (example,) = evaluator.measure(batch, Subset("it", Modality.QA)).examples([0])
    (image,) = example.images.values()
    assert image.shape == (config.vision.image_size * 3 // 4, config.vision.image_size, 3)
    (box,) = text_to_boxes(example.truth)
    assert box == pytest.approx(BOX, abs=3 / 1024)
    assert box == pytest.approx(bounds(image.transpose(2, 0, 1)), abs=1.5 / 21)
