"""What datasets a policy can learn from, and how they are read: as the policy's own were."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pi05_lightning.data.attempts import Attempts
from pi05_lightning.data.labels import POSITIVE, Labels
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.experience.reading import CLASS_PATH, Reading
from pi05_lightning.experience.rounds import AttemptSummary, Method, check_datasets, configuration
from pi05_lightning.files.local import read_json, write_json
from pi05_lightning.models.config import ModelConfig
from tests.experience.attempts import LENGTHS, TRAINING, recorded_attempts


@pytest.mark.parametrize(
    ("other", "read", "policy", "said"),
    [
        ("same", {}, {}, ""),
        ("nowhere", {}, {}, "nowhere.*: no such folder"),
        (
            "same",
            {"state_keys": ["qpos"]},
            {},
            r"cannot be read as the data of policy: dataset .* has no vector 'qpos'",
        ),
        ("same", {"state_keys": ["observation.gripper"]}, {}, "its dims of state are 1, and the policy's 3"),
        ("same", {}, {"cameras": ("front",)}, r"its cameras are \['top'\], and the policy's \['front'\]"),
        ("same", {}, {"fps": 30.0}, "not of the robot of policy: its frames per second are 10.*, and the policy's 30"),
    ],
)
def test_every_dataset_that_the_policy_cannot_learn_from_is_refused(
    pictures: Path, tmp_path: Path, other: str, read: dict[str, Any], policy: dict[str, Any], said: str
) -> None:
    """Those that are named after the first, and the attempts, too."""
    shutil.copytree(pictures, tmp_path / "same")
    own = LeRobotConfig(str(pictures)).open("own", "train", ModelConfig.preset("debug").shapes).robot()
    assert own is not None
    robots = {"own": replace(own, **{"cameras": ("top",), **policy})}
    processor = SimpleNamespace(robots=robots, acting_as=lambda name: "own", shapes=SimpleNamespace(horizon=4))
    options = {"path": str(pictures), "state_keys": ["observation.state"], **read}
    reading = Reading(sources={"own": {"class_path": CLASS_PATH, "init_args": options}})
    first, second = str(pictures), str(tmp_path / other)
    for data in (([first, second], []), ([first], [second])):
        with pytest.raises(ValueError, match=said) if said else nullcontext():
            check_datasets(Path("policy"), reading, cast("Processor", processor), *data)


@pytest.mark.parametrize(
    ("gone", "said"),
    [({"fast": "gone"}, r"gone.* is no FAST tokenizer"), ({"tokenizer": "./gone"}, "no tokenizer at .*gone")],
)
def test_tokenizers_that_are_gone_are_refused_before_attempts_are_made(
    pictures: Path, gone: dict[str, str], said: str
) -> None:
    processor = SimpleNamespace(shapes=ModelConfig.preset("debug").shapes)
    with pytest.raises(ValueError, match=said):
        check_datasets(Path("policy"), Reading(**gone), cast("Processor", processor), [str(pictures)], [])


def test_attempts_are_read_as_those_of_the_robot_that_acts(pictures: Path, videos: Path, tmp_path: Path) -> None:
    of_arm = LeRobotConfig(str(pictures)).open("arm", "train", ModelConfig.preset("debug").shapes).robot()
    assert of_arm is not None
    robots = {"arm": replace(of_arm, cameras=("front",)), "hand": replace(of_arm, cameras=("top", "wrist"))}
    processor = SimpleNamespace(robots=robots, acting_as=lambda name: name, shapes=SimpleNamespace(horizon=4))
    sources = {"hand": str(pictures), "arm": str(tmp_path / "arm")}
    reading = Reading(
        sources={name: {"class_path": CLASS_PATH, "init_args": {"path": path}} for name, path in sources.items()}
    )
    tries = shutil.copytree(pictures, tmp_path / "tries")
    for robot, said in (("hand", ""), ("arm", "robot 'arm': name its dataset among the demonstrations")):
        with pytest.raises(ValueError, match=said) if said else nullcontext():
            check_datasets(
                Path("policy"), reading, cast("Processor", processor), [str(pictures)], [str(tries)], robot=robot
            )


def test_attempts_that_no_command_of_ours_made_are_read_as_the_policys_demonstrations(tmp_path: Path) -> None:
    read = {"path": str(tmp_path / "arm"), "cameras": {"observation.front": "base"}, "state_keys": ["qpos"]}
    reading = Reading(sources={"arm": {"class_path": CLASS_PATH, "init_args": read}})
    for collected in (False, True):
        tries = [AttemptSummary("tries", collected=collected)]
        found = configuration("successes", tmp_path, reading, [read["path"]], tries, TRAINING)
        options = found["data"]["sources"]["successes_0"]["init_args"]
        assert ("cameras" in options, "state_keys" in options) == (not collected, not collected)


@pytest.mark.parametrize(
    ("method", "source", "wanted"),
    [
        ("recap", "corrections_0", {1: [5, 6, 7, 8]}),
        ("recap", "positive_0", {**{n: [*range(LENGTHS[n])] for n in (0, 3, 4)}, 1: [5, 6, 7, 8]}),
        ("dagger", "corrections_0", {1: [5, 6, 7, 8]}),
        ("successes", "successes_0", {n: [*range(LENGTHS[n])] for n in (0, 3, 4)}),
    ],
)
def test_recordings_that_no_command_of_ours_made_can_be_learned_from(
    tmp_path: Path, pictures: Path, method: Method, source: str, wanted: dict
) -> None:
    """Their episodes have neither `success` nor `corrected`: the frames alone say how they went."""
    root, labels = recorded_attempts(pictures, tmp_path / "tries"), tmp_path / "labels.parquet"
    files = LeRobotFiles.open(root)
    attempts = Attempts.read(files)
    corrected = np.isin(attempts.episode, attempts.episode[attempts.intervention])
    positive = np.where(corrected, attempts.intervention, attempts.success)
    Labels(attempts.episode, attempts.frame, {POSITIVE: positive}, {}).write(labels, files)
    tries = AttemptSummary.read(str(root), labels if method == "recap" else None)
    found = configuration(method, tmp_path, Reading(), [str(pictures)], [tries], TRAINING)
    options = found["data"]["sources"][source]["init_args"]
    opened = LeRobotConfig(**options).open(source, "train", ModelConfig.preset("debug").shapes)
    places: dict[int, list[int]] = {}
    for index in range(len(opened)):
        place = opened.place(index)
        places.setdefault(int(place["episode_index"]), []).append(int(place["frame_index"]))
    assert places == wanted


def test_attempts_of_a_policy_without_a_state_have_none(tmp_path: Path, pictures_copy: Path) -> None:
    """`pi05 collect` writes no state of them, so none is asked for."""
    read = {"path": str(tmp_path / "arm"), "state_keys": [], "action_keys": ["joints"]}
    reading = Reading(sources={"arm": {"class_path": CLASS_PATH, "init_args": read}})
    info = read_json(pictures_copy / "meta" / "info.json")
    del info["features"]["observation.state"]
    write_json(pictures_copy / "meta" / "info.json", info)
    options = reading.source(str(pictures_copy), read["path"], collected=True, attempts=True)["init_args"]
    source = LeRobotConfig(**options).open("tries", "train", ModelConfig.preset("debug").shapes)
    assert source[0].state is None
    assert source[0].actions is not None
