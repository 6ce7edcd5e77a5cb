"""Bad data in real files: an error with its address and the way to mend it, in the main process and in workers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from pi05_lightning import Pi05DataModule
from pi05_lightning.data.errors import BadSample
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.samples import Samples
from pi05_lightning.data.sources.base import Source
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.data.sources.vision_text import VisionTextConfig
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.data.transforms import Quantiles
from pi05_lightning.types import Modality, Shapes, Subset

from .recorded import edit_info
from .test_lerobot_source import HORIZON, LENGTHS, data_file, open_source, rewrite, truncate

TOKENIZER = TextTokenizer.load("tiny")
SHAPES = Shapes(32, HORIZON, 4, TOKENIZER.vocab_size, 32, 0)
TOP = "observation.images.top"


def samples(source: Source) -> Samples:
    robot = source.robot()
    robots = {} if robot is None else {"robot": robot}
    return Samples({"robot": source}, Processor(SHAPES, TOKENIZER, source.camera_names, robots))


def draw(source: Source, modality: Modality, index: int = 0):
    made = samples(source)
    return made[made.subsets.index(Subset("robot", modality)), index, 0]


# --- videos


def video_file(root: Path, key: str = TOP) -> Path:
    return next((root / "videos" / key).glob("*/*.mp4"))


def short_video(root: Path, missing: int) -> None:
    """As recorded with so many frames too few of episode 1: the others' begin earlier in the file."""
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    begins, ends = (f"videos/{TOP}/{part}_timestamp" for part in ("from", "to"))
    table, later = pq.read_table(path).to_pydict(), missing / 10  # seconds, at 10 frames per second
    began = [at - later * (episode > 1) for episode, at in enumerate(table[begins])]
    ended = [at - later * (episode > 0) for episode, at in enumerate(table[ends])]
    rewrite(path, **{begins: began, ends: ended})


@pytest.mark.parametrize("missing", [1, 3])
def test_an_episode_whose_video_is_shorter_than_its_rows_is_an_error(videos_copy: Path, missing: int) -> None:
    short_video(videos_copy, missing)
    first = LENGTHS[1] - missing
    with pytest.raises(BadSample, match=rf"its video is shorter than its rows: frame {first} would be after its end"):
        open_source(videos_copy, cameras={TOP: "top"})
    source = open_source(videos_copy, cameras={TOP: "top"}, on_bad_sample="skip")
    assert sorted(set(source.episode.tolist())) == [0, 2, 3, 4]


def test_a_video_whose_end_is_its_last_frames_own_time_is_whole(videos_copy: Path) -> None:
    path = videos_copy / "meta/episodes/chunk-000/file-000.parquet"
    ends = f"videos/{TOP}/to_timestamp"
    rewrite(path, **{ends: [at - 0.1 for at in pq.read_table(path)[ends].to_pylist()]})
    assert len(open_source(videos_copy, cameras={TOP: "top"})) == sum(LENGTHS)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_video_is_an_error_where_it_ends_also_from_a_worker(videos_copy: Path, workers: int) -> None:
    truncate(video_file(videos_copy))
    source = open_source(videos_copy, cameras=None)
    loader = DataLoader(source, batch_size=None, num_workers=workers, timeout=120 if workers else 0)
    with pytest.raises(BadSample, match=r"dataset 'robot', episode \d, frame \d+, top: .*file-000.mp4.*Restore it"):
        list(loader)


def test_a_missing_video_is_an_error_on_opening(videos_copy: Path) -> None:
    video_file(videos_copy).unlink()
    with pytest.raises(
        BadSample, match=rf"dataset 'robot', episode 0, frame 0, {TOP}: .* is missing. Restore the video"
    ):
        open_source(videos_copy, cameras=None)


def test_skipping_a_missing_video_leaves_its_episodes_out(videos_copy: Path) -> None:
    video_file(videos_copy).unlink()
    with pytest.raises(ValueError, match="no usable frame is left in the train split"):
        open_source(videos_copy, cameras=None, on_bad_sample="skip")
    assert len(open_source(videos_copy, cameras={"observation.images.wrist": "wrist"})) == sum(LENGTHS)


def test_an_episode_without_video_of_a_camera_is_named(videos_copy: Path) -> None:
    path = next((videos_copy / "meta" / "episodes").glob("*/*.parquet"))
    names = [f"videos/{TOP}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")]
    table = pq.read_table(path)
    rewrite(path, **{name: [None, *table[name].to_pylist()[1:]] for name in names})
    with pytest.raises(BadSample, match=rf"episode 0, frame 0, {TOP}: this episode has no video of this camera"):
        open_source(videos_copy, cameras=None)
    source = open_source(videos_copy, cameras=None, on_bad_sample="skip")
    assert set(source.episode) == {1, 2, 3, 4}


# --- images in parquet


def replace_image(root: Path, row: int, image: Image.Image | bytes | None, suffix: str = "PNG") -> None:
    """Write one frame's image anew, as it is."""
    if isinstance(image, Image.Image):
        buffer = BytesIO()
        image.save(buffer, suffix)
        image = buffer.getvalue()
    table = pq.read_table(data_file(root))
    values = table[TOP].to_pylist()
    values[row] = {"bytes": image, "path": None}
    at = table.column_names.index(TOP)
    pq.write_table(table.set_column(at, TOP, pa.array(values, table.schema.field(TOP).type)), data_file(root))


@pytest.mark.parametrize("val_fraction", [0, 0.4])
def test_a_cache_of_which_no_image_decodes_leaves_no_frame_of_the_training_split(
    pictures_copy: Path, val_fraction: float
) -> None:
    table = pq.read_table(data_file(pictures_copy))
    damaged = pa.array([{"bytes": b"no image", "path": None}] * len(table), table.schema.field(TOP).type)
    pq.write_table(table.set_column(table.column_names.index(TOP), TOP, damaged), data_file(pictures_copy))
    options = {"val_fraction": val_fraction, "image_cache": True, "on_bad_sample": "skip"}
    data = Pi05DataModule({"robot": LeRobotConfig(str(pictures_copy), **options)}, shapes=SHAPES)
    with pytest.raises(ValueError, match="dataset 'robot': no usable frame is left in the train split"):
        data.prepare_data()


def test_statistics_that_explain_no_frame_leave_none(pictures: Path) -> None:
    source = open_source(pictures, on_bad_sample="skip")
    robot = source.robot()
    assert robot is not None
    narrow = Quantiles(np.full(3, -1e-9), np.full(3, 1e-9))
    with pytest.raises(ValueError, match="no usable frame is left in the train split"):
        source.leave_out_unexplained(replace(robot, normalize=replace(robot.normalize, state=narrow)))


GREY16 = Image.fromarray(np.full((48, 64), 50_000, np.uint16))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (64, 48), 100), (100, 100, 100)),
        (Image.new("RGBA", (64, 48), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGBA", (64, 48), (10, 20, 30, 0)), (255, 255, 255)),
        (GREY16, (195, 195, 195)),  # 50 000 / 257, not 50 000 mod 256 and not 255
        (Image.new("P", (64, 48), 0), (0, 0, 0)),
    ],
    ids=["grey", "rgba", "transparent", "16 bit", "palette"],
)
def test_an_image_that_is_not_rgb_becomes_it_where_asked(pictures_copy: Path, image, expected: tuple) -> None:
    replace_image(pictures_copy, 5, image)
    found = open_source(pictures_copy, cameras=None, convert_images=True)[5].images["top"]
    assert found.dtype == np.uint8
    assert found.shape == (3, 48, 64)
    assert (found == np.array(expected)[:, None, None]).all()


@pytest.mark.parametrize(
    ("image", "suffix", "message"),
    [
        (Image.new("F", (64, 48), 0.5), "TIFF", "the image holds floating-point values of unknown range"),
        (b"\x89PNG broken", "", "an image of 11 bytes cannot be read"),
        (None, "", "no image is stored"),
        (Image.new("L", (64, 48)), "PNG", "the image is grey, not RGB of 8 bits"),
        (Image.new("RGBA", (64, 48)), "PNG", "the image is transparent, not RGB of 8 bits"),
        (GREY16, "PNG", "the image is 16-bit, not RGB of 8 bits"),
    ],
    ids=["float", "damaged", "absent", "grey", "RGBA", "16 bit"],
)
def test_an_image_that_means_nothing_is_an_error(pictures_copy: Path, image, suffix: str, message: str) -> None:
    replace_image(pictures_copy, 14, image, suffix)
    with pytest.raises(BadSample, match=f"dataset 'robot', episode 1, frame 2, top: {message}.*Restore it"):
        open_source(pictures_copy, cameras=None)[14]


def test_a_data_file_without_its_cameras_images_is_an_error(pictures_copy: Path) -> None:
    rewrite(data_file(pictures_copy), **{TOP: None})
    with pytest.raises(BadSample, match=rf"episodes 0 to 4: .*file-000.parquet has no columns \['{TOP}'\]"):
        open_source(pictures_copy, cameras=None)


# --- parquet


@pytest.mark.parametrize("place", [0.02, 0.5, 0.999])
def test_a_data_file_with_flipped_bytes_is_never_read_as_good(pictures_copy: Path, place: float) -> None:
    path = data_file(pictures_copy)
    content = bytearray(path.read_bytes())
    start = int(len(content) * place)
    content[start : start + 64] = bytes(255 - byte for byte in content[start : start + 64])
    path.write_bytes(content)
    with pytest.raises(BadSample, match="dataset 'robot', episode"):
        list(map(open_source(pictures_copy, cameras=None).__getitem__, range(sum(LENGTHS))))


# --- language


def test_subtasks_that_nothing_names_are_an_error_where_they_are_asked_for(videos_copy: Path) -> None:
    rewrite(data_file(videos_copy), language_persistent=None, subtask_index=[0] * sum(LENGTHS))
    with pytest.raises(BadSample, match=r"subtask_index: .*meta/subtasks.parquet.* missing \(after a merge none fits"):
        open_source(videos_copy, subtask_key="subtask_index")


def test_a_subtask_column_of_another_kind_is_an_error(videos_copy: Path) -> None:
    rewrite(data_file(videos_copy), phase=[0.5] * sum(LENGTHS))
    with pytest.raises(BadSample, match=r"phase: .*double.*a subtask is text"):
        open_source(videos_copy, subtask_key="phase")


def set_event(root: Path, content: str, place: int = 0, camera: str | None = TOP) -> None:
    """Frame 3 of episode 0 answers (place 0) or asks (3) with this what is asked first about `top`, or the camera."""
    rows = pq.read_table(data_file(root))["language_events"].to_pylist()
    rows[3][place]["content"] = content
    rows[3][0]["camera"] = rows[3][3]["camera"] = camera
    rewrite(data_file(root), language_events=rows)


def test_boxes_of_lerobots_annotator_become_tokens(videos_copy: Path) -> None:
    box = {"label": "handle", "bbox_format": "xyxy", "bbox": [16, 12, 32, 24]}  # in an image of 64 x 48
    set_event(videos_copy, json.dumps({"detections": [box]}))
    answer = open_source(videos_copy, cameras=None)[3].answers[0]
    assert answer.answer == "<loc0256><loc0256><loc0512><loc0512> handle"
    scaled = open_source(videos_copy, cameras=None, box_range=100)[3].answers[0]
    assert scaled.answer.startswith("<loc0122><loc0163>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"detections": [{"label": "x", "bbox": [0, 0, 65, 3]}]}), "not inside the image, 64 wide and 48"),
        ("<loc0000><loc0000><loc2000><loc0001>", "<loc2000> is outside the image"),
        ("<loc0000> <loc0000> <loc0100> <loc0100>", "<loc0000> is no place"),
        ("", "a vqa question or answer is empty"),
    ],
)
def test_a_box_outside_the_image_is_an_error(videos_copy: Path, content: str, message: str) -> None:
    set_event(videos_copy, content)
    with pytest.raises(BadSample, match=f"dataset 'robot', episode 0, frame 3, language_events: .*{message}.*Correct"):
        open_source(videos_copy, cameras=None)


def test_a_place_that_is_none_in_what_the_policy_said_itself_is_no_error(videos_copy: Path) -> None:
    table = pa.table({"subtask": ["at <loc0000>|"], "subtask_index": [0]})
    pq.write_table(table, videos_copy / "meta" / "subtasks.parquet")
    rewrite(data_file(videos_copy), language_persistent=None, subtask_index=[0] * sum(LENGTHS))
    with pytest.raises(BadSample, match=r"subtask: 'at <loc0000>\|': <loc0000> is no place"):
        open_source(videos_copy)
    (videos_copy / "meta" / "pi05_collect.json").write_text("{}")
    assert open_source(videos_copy)[3].subtask == "at <loc0000>|"


@pytest.mark.parametrize("changed", ["question", "task"])
def test_a_place_outside_the_image_is_found_in_what_is_given_too(videos_copy: Path, changed: str) -> None:
    if changed == "task":
        table = pa.table({"task": ["close it", "open the one at <loc2000><loc0001>"], "task_index": [0, 1]})
        pq.write_table(table, videos_copy / "meta" / "tasks.parquet")
    else:
        set_event(videos_copy, "what is at <loc2000><loc0001>?", place=3)
    with pytest.raises(BadSample, match=r"dataset 'robot', episode \d, frame \d, .*<loc2000> is outside the image"):
        open_source(videos_copy, cameras=None)


def test_pixels_without_a_camera_are_of_cameras_of_one_size(videos_copy: Path) -> None:
    box = {"label": "handle", "bbox": [16, 12, 32, 24]}  # in images of 64 x 48
    set_event(videos_copy, json.dumps({"detections": [box]}), camera=None)
    answers = open_source(videos_copy, cameras=None)[3].answers
    assert [a.answer for a in answers if a.camera is None] == ["<loc0256><loc0256><loc0512><loc0512> handle"]
    features = json.loads((videos_copy / "meta/info.json").read_text())["features"]
    features["observation.images.wrist"]["shape"] = [64, 48, 3]
    edit_info(videos_copy, features=features)
    with pytest.raises(BadSample, match=r"episode 0, frame 3, .* is a place of no camera, and the cameras differ in"):
        open_source(videos_copy, cameras=None)


def test_a_question_about_a_camera_that_there_is_not_is_an_error(videos_copy: Path) -> None:
    set_event(videos_copy, "yes", camera="top")
    with pytest.raises(BadSample, match="frame 3, language_events: a vqa question is about the camera 'top', and meta"):
        open_source(videos_copy, cameras=None)


# --- captions


def written(folder: Path, **columns: list) -> VisionTextConfig:
    image = [Image.new("RGB", (8, 6), "grey")] * 4
    datasets.Dataset.from_dict({"image": image, **columns}).save_to_disk(folder / "saved")
    return VisionTextConfig(str(folder / "saved"), val_fraction=0)


def test_a_caption_of_ten_thousand_words_is_an_error(tmp_path: Path) -> None:
    source = written(tmp_path, caption=["a cup", "word " * 10_000, "a", "b"]).open("robot", "train", SHAPES)
    assert len(draw(source, Modality.WEB_CAPTION, 0).tokens) < 20
    with pytest.raises(
        BadSample,
        match=r"dataset 'robot', row 1, caption: its text is \d{5} tokens long, more than data.language.max_to",
    ):
        draw(source, Modality.WEB_CAPTION, 1)


@pytest.mark.parametrize(
    ("box", "message"), [([0, 0, 9, 6], "not inside the image, 8 wide and 6 high"), ([0, 0, 1], "not four numbers")]
)
def test_a_box_outside_its_image_is_an_error(tmp_path: Path, box: list, message: str) -> None:
    source = written(tmp_path, boxes=[[[0, 0, 8, 6]]] * 2 + [[box]] * 2, labels=[["cup"]] * 4)
    opened = source.open("robot", "train", SHAPES)
    assert opened[1].answers[0].answer == "<loc0000><loc0000><loc1023><loc1023> cup"
    with pytest.raises(BadSample, match=f"dataset 'robot', row 2, boxes: .*{message}.*box_order, which is xyxy"):
        opened[2]


def test_a_caption_with_a_token_outside_the_image_is_an_error(tmp_path: Path) -> None:
    config = written(tmp_path, caption=["a cup"] * 3 + ["<loc1024> is nowhere"])
    with pytest.raises(BadSample, match="row 3, caption: <loc1024> is outside the image"):
        config.open("robot", "train", SHAPES)


# --- whatever a source gives


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 8, 8), (8, 8, 3), (8, 8)])
def test_an_image_of_another_layout_is_an_error(pictures: Path, shape: tuple[int, ...], monkeypatch) -> None:
    source = open_source(pictures, cameras=None)
    monkeypatch.setattr(source._images, "_read", lambda camera, row: np.zeros(shape, np.uint8))
    with pytest.raises(BadSample, match=r"episode 0, frame 0: camera 'top' gives an image of shape .*\[3 h w\]"):
        draw(source, Modality.CONTINUOUS)


def test_a_dataset_without_episodes_is_an_error(pictures_copy: Path) -> None:
    shutil.rmtree(pictures_copy / "meta" / "episodes")
    with pytest.raises(ValueError, match="not finalised"):
        open_source(pictures_copy)
