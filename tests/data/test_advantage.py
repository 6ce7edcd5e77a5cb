"""The advantage in prompts: its place, that it is left out in training alone, and that none is taken for a sign."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pi05_lightning import Pi05DataModule, Pi05Module
from pi05_lightning.data.attempts import Attempts
from pi05_lightning.data.labels import Labels
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.processor import Language, Processor
from pi05_lightning.data.prompt import ConditionOn, Prompts
from pi05_lightning.data.robot import Robot
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.files.local import read_json, write_json
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import LossWeights, Recipe, Stage
from pi05_lightning.types import Frame, Modality, Subset, Target
from tests.data.recorded import data_file, edit_info, rewrite
from tests.quiet_trainer import quiet_trainer

CONFIG = ModelConfig.preset("debug")
FRAME = Frame(task="open the drawer", state=np.zeros(2, np.float32))


def said(condition_on: ConditionOn, subtask: str | None, fast: bool, advantage: str | None) -> list[str | None]:
    segments = Prompts().low_level(FRAME, subtask, condition_on, fast=fast, advantage=advantage)
    return [segment.text for segment in segments]


@pytest.mark.parametrize(
    ("template", "text", "subtask"),
    [
        ("Subtask: {subtask}", "<loc0001> box; Subtask: open it", "open it"),
        ("Subtask: {subtask}.", "Subtask: pick up the cup.", "pick up the cup"),
        ("{subtask}", "open it", "open it"),
    ],
)
def test_subtask_is_what_the_template_is_filled_with(template: str, text: str, subtask: str) -> None:
    assert Prompts(subtask=template).said(text) == subtask


@pytest.mark.parametrize("fast", [False, True])
def test_advantage_comes_after_the_subtask_and_before_the_actions(fast: bool) -> None:
    assert said("both", "pull", fast, "positive") == [
        "Task: open the drawer, State: 128 128;\n",
        "Subtask: pull",
        "Advantage: positive;\n",
    ]
    opening = [] if fast else ["Action: "]
    begin = "Subtask: pull, State: 128 128;\n"
    assert said("subtask", "pull", fast, "negative") == [begin, "Advantage: negative;\n", *opening]
    begin = "Task: open the drawer, State: 128 128;\n"
    assert said("task", "pull", fast, "positive") == [begin, "Advantage: positive;\n", *opening]
    assert said("both", None, fast, "positive") == [begin, "Advantage: positive;\n", *opening]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("condition_on", ["task", "subtask", "both"])
def test_without_an_advantage_prompts_are_as_they_were(condition_on: ConditionOn, fast: bool) -> None:
    told = said(condition_on, "pull", fast, "positive")
    left = "".join(text or "" for text in told if text != "Advantage: positive;\n")
    assert left == "".join(text or "" for text in said(condition_on, "pull", fast, None))


@pytest.fixture(scope="module")
def data(videos: Path) -> Pi05DataModule:
    robot = LeRobotConfig(str(videos), val_fraction=0.2, labels="positive")
    silent = LeRobotConfig(str(videos), val_fraction=0.2, same_robot_as="robot")
    language = Language(condition_on="both", advantage_omission=0.3)
    return Pi05DataModule({"robot": robot, "silent": silent}, language=language, shapes=CONFIG.shapes)


def has_advantage(processor: Processor, frame: Frame, key: int, training: bool) -> bool:
    sample = processor.sample(frame, Subset("robot", Modality.CONTINUOUS), key, training=training)
    text = processor.tokenizer.decode(sample.tokens[sample.target_kind == Target.NONE].tolist())
    return "Advantage: positive" in text


def test_three_of_ten_training_samples_and_none_of_the_others_leave_it_out(data: Pi05DataModule) -> None:
    frame = data.sources("train")["robot"][0]
    told = [has_advantage(data.processor, frame, key, training=True) for key in range(400)]
    assert np.mean(told) == pytest.approx(0.7, abs=0.06)
    assert all(has_advantage(data.processor, frame, key, training=False) for key in range(100))
    assert data.train_samples.training
    assert not data.validation.training


def test_omission_moves_no_other_draw_of_a_sample(data: Pi05DataModule) -> None:
    frame = data.sources("train")["robot"][4]
    with_subtask = Language(condition_on="both", task_only_share=0.5)
    processor = replace_language(data.processor, with_subtask)
    for key in range(30):
        kinds = [
            processor.sample(f, Subset("robot", Modality.CONTINUOUS), key, training=True).target_kind.max()
            for f in (frame, replace(frame, advantage=None))
        ]
        assert kinds[0] == kinds[1]


def replace_language(processor: Processor, language: Language) -> Processor:
    return Processor(processor.shapes, processor.tokenizer, processor.cameras, processor.robots, language)


def test_a_policy_is_told_what_it_is_asked_for(data: Pi05DataModule) -> None:
    frame, processor = data.sources("train")["robot"][0], data.processor
    texts = {
        advantage: processor.tokenizer.decode(processor.prompt(frame, "robot", advantage=advantage).tokens.tolist())
        for advantage in ("positive", "negative", None)
    }
    assert "Advantage: positive" in texts["positive"]
    assert "Advantage: negative" in texts["negative"]
    assert "Advantage" not in texts[None]


def test_sources_of_one_robot_share_its_statistics_and_are_one_to_a_policy(data: Pi05DataModule) -> None:
    robots = data.processor.robots
    assert robots["silent"].normalize is robots["robot"].normalize
    assert data.processor.acting == ("robot",)
    again = Processor.from_dict(data.processor.to_dict())
    assert again.acting == ("robot",)


def test_robot_has_the_tasks_and_subtasks_of_all_its_sources_and_its_own_statistics(videos: Path) -> None:
    def robots(**sources: LeRobotConfig) -> dict[str, Robot]:
        return Pi05DataModule(sources, shapes=CONFIG.shapes).processor.robots

    opens, closes = ({"episodes": episodes, "val_fraction": 0} for episodes in ([1, 3], [0, 2, 4]))
    both = robots(
        robot=LeRobotConfig(str(videos), **opens),
        more=LeRobotConfig(str(videos), same_robot_as="robot", **closes),
    )
    alone, other = (robots(robot=LeRobotConfig(str(videos), **episodes)) for episodes in (opens, closes))
    assert both["robot"].tasks == both["more"].tasks == ("close the drawer", "open the drawer")
    assert both["robot"].has_subtasks
    assert both["robot"].to_dict()["quantiles"] == alone["robot"].to_dict()["quantiles"]
    ranges = [np.array(robots["robot"].state_range) for robots in (alone, other)]
    assert (ranges[0] != ranges[1]).any()
    np.testing.assert_array_equal(both["robot"].state_range, [np.minimum(*ranges)[0], np.maximum(*ranges)[1]])


def test_source_that_shares_with_none_is_refused(videos: Path) -> None:
    lost = LeRobotConfig(str(videos), same_robot_as="arm")
    with pytest.raises(ValueError, match=r"data.sources.lost: same_robot_as 'arm' names no source"):
        _ = Pi05DataModule({"lost": lost}, shapes=CONFIG.shapes).processor


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"state_keys": ["observation.state", "observation.gripper"]}, "state dims"),
        ({"action_keys": []}, "action dims"),
    ],
)
def test_source_that_cannot_be_of_the_robot_is_refused(videos: Path, other: dict, said: str) -> None:
    sources = {
        "robot": LeRobotConfig(str(videos)),
        "other": LeRobotConfig(str(videos), same_robot_as="robot", **other),
    }
    with pytest.raises(ValueError, match=rf"dataset 'other': same_robot_as 'robot' has \d+ {said}"):
        _ = Pi05DataModule(sources, shapes=CONFIG.shapes).processor


@pytest.mark.parametrize("name", ["relative_dims", "embodiment"])
def test_source_that_says_otherwise_what_the_robot_is_is_refused(videos: Path, name: str) -> None:
    mine, others = {"relative_dims": ([0], [1]), "embodiment": ("SO-101", "SO-100")}[name]
    sources = {"robot": LeRobotConfig(str(videos), **{name: others})}
    for own, is_refused in ((mine, True), (others, False)):
        sources["more"] = LeRobotConfig(str(videos), same_robot_as="robot", **{name: own})
        with pytest.raises(ValueError, match=f"its {name} are not those") if is_refused else nullcontext():
            _ = Pi05DataModule(sources, shapes=CONFIG.shapes).processor


def test_source_of_another_rate_is_not_of_the_robot(pictures: Path, tmp_path: Path) -> None:
    slow = shutil.copytree(pictures, tmp_path / "slow", ignore=shutil.ignore_patterns("pi05_*"))
    info = read_json(slow / "meta" / "info.json")
    write_json(slow / "meta" / "info.json", info | {"fps": info["fps"] / 2})
    for path in (slow / "data").glob("*/*.parquet"):
        table = pq.read_table(path)
        doubled = pc.multiply(table["timestamp"], 2.0).cast(pa.float32())
        pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", doubled), path)
    sources = {"robot": LeRobotConfig(str(pictures)), "slow": LeRobotConfig(str(slow), same_robot_as="robot")}
    with pytest.raises(ValueError, match=r"same_robot_as 'robot' has \d+ frames per second"):
        _ = Pi05DataModule(sources, shapes=CONFIG.shapes).processor


@pytest.mark.parametrize(
    ("names", "is_refused"),
    [
        (["x", "z", "y"], True),
        ([["x", "z", "y"]], True),
        ({"x": 0, "y": 2, "z": 1}, True),
        ({"z": 2, "x": 0, "y": 1}, False),
        ({"arm": ["x", "y", "z"]}, False),
        (["state_0", "state_1", "state_2"], False),
    ],
)
def test_source_whose_dims_have_other_names_is_not_of_the_robot(
    pictures: Path, pictures_copy: Path, names: list | dict, is_refused: bool
) -> None:
    features = read_json(pictures_copy / "meta" / "info.json")["features"]
    features["observation.state"]["names"] = names
    edit_info(pictures_copy, features=features)
    sources = {"robot": LeRobotConfig(str(pictures)), "more": LeRobotConfig(str(pictures_copy), same_robot_as="robot")}
    said = "dataset 'more': dim 1 of its state is 'z', and 'y' in same_robot_as 'robot': name the state_keys"
    with pytest.raises(ValueError, match=said) if is_refused else nullcontext():
        _ = Pi05DataModule(sources, shapes=CONFIG.shapes).processor


def test_actions_are_not_compared_where_the_robots_are_relative(
    pictures: Path, pictures_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arm = LeRobotConfig(str(pictures), relative_dims=[0, 1], relative_state_dims=[0, 1])
    sources = {"robot": arm, "more": LeRobotConfig(str(pictures_copy), same_robot_as="robot")}
    _ = Pi05DataModule(sources, shapes=CONFIG.shapes).processor
    assert "same_robot_as" not in caplog.text


def test_source_in_other_units_than_the_robot_is_warned_of_once(
    pictures: Path, pictures_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = np.array(pq.read_table(data_file(pictures_copy))["observation.state"].to_pylist(), np.float32)
    rewrite(data_file(pictures_copy), **{"observation.state": (states * [1, 1, 57.3]).astype(np.float32).tolist()})
    sources = {"robot": LeRobotConfig(str(pictures)), "more": LeRobotConfig(str(pictures_copy), same_robot_as="robot")}
    data = Pi05DataModule(sources, shapes=CONFIG.shapes)
    _ = data.processor, data.sources("val")
    told = [record.getMessage() for record in caplog.records if "same_robot_as 'robot'" in record.getMessage()]
    assert len(told) == 1
    assert "dataset 'more'" in told[0]
    assert "statistics they are normalised: state[2] like degrees where radians are expected. Convert" in told[0]


def begin(data: Pi05DataModule, stage: Stage) -> None:
    """As training does before its first step."""
    data.recipe = Recipe((stage,))
    data.trainer = quiet_trainer(max_steps=stage.steps)
    data.trainer.strategy.connect(Pi05Module(CONFIG))
    data.train_dataloader()


def test_stage_with_and_without_labels_is_refused(data: Pi05DataModule) -> None:
    def stage(*sources: str) -> Stage:
        mixture = {f"{name}/{Modality.CONTINUOUS}": 1.0 for name in sources}
        return Stage(name="experience", steps=1, losses=LossWeights(flow=1), mixture=mixture)

    begin(data, stage("robot"))
    assert data.tells_advantage(stage("robot"))
    assert not data.tells_advantage(stage("silent"))
    with pytest.raises(ValueError, match=r"stage experience: .*robot, whose labels .* silent, which has no labels"):
        begin(data, stage("robot", "silent"))


def test_returns_alone_are_refused_where_no_value_learns_them(pictures_copy: Path) -> None:
    files = LeRobotFiles.open(pictures_copy)
    attempts = Attempts.read(files, demonstrations=True)
    path = pictures_copy.with_name("returns.parquet")
    returns = np.zeros(len(attempts.episode), np.float32)
    Labels(attempts.episode, attempts.frame, {"return": returns}, {}).write(path, files)
    source = LeRobotConfig(str(pictures_copy), labels=str(path))
    data = Pi05DataModule({"robot": source}, shapes=CONFIG.shapes, batch_size=4)
    acting = Stage(name="experience", steps=1, losses=LossWeights(flow=1))
    with pytest.raises(ValueError, match=r"stage experience: .*robot are returns, which only a value learns"):
        begin(data, acting)
    assert not data.tells_advantage(replace(acting, losses=LossWeights(flow=1, others={"value": 1.0})))
