"""What a checkpoint says that it was trained on, and that a policy refuses what it was not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pi05_lightning import Pi05DataModule, Pi05Module, Pi05Policy, StageSwitch
from pi05_lightning.cli.convert import convert
from pi05_lightning.data.processor import Language
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.parallelize import Lora
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.recipe import LossWeights, StageOptions
from pi05_lightning.training.callbacks.ema import WeightAverage
from pi05_lightning.weights.abilities import ADVANTAGE, Trained
from pi05_lightning.weights.beginning import moved_cameras
from pi05_lightning.weights.lerobot_folder import LeRobotFolder
from pi05_lightning.weights.locate import locate
from tests.quiet_trainer import quiet_trainer
from tests.random_fast import random_fast

CONFIG = ModelConfig.preset("debug")
CONTINUOUS = {"robot/continuous_robot_actions": 1.0}
Fit = Callable[..., Path]


@pytest.fixture(scope="module")
def fit(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """Train a stage for two steps, with a FAST tokenizer of `fast_seed`; the checkpoint."""

    def run(losses: dict[str, float], mixture: dict[str, float] | None = None, *callbacks: Any, **options: Any) -> Path:
        stage = StageOptions(LossWeights(**losses), mixture or {}, freeze=options.pop("freeze", ()))
        folder = tmp_path_factory.mktemp("run")
        random_fast(CONFIG, seed=options.pop("fast_seed", 0)).save(folder / "fast")
        trainer = quiet_trainer(StageSwitch(0, 2, posttrain=stage), *callbacks, default_root_dir=folder)
        robot = LeRobotConfig(path=str(videos), val_fraction=0.2)
        language = options.pop("language", Language())
        data = Pi05DataModule({"robot": robot}, batch_size=2, num_workers=0, fast=folder / "fast", language=language)
        trainer.fit(Pi05Module(**({"config": CONFIG} | options)), data)
        trainer.save_checkpoint(folder / "last.ckpt")
        return folder / "last.ckpt"

    return run


@pytest.fixture(scope="module")
def text_and_fast(fit: Fit) -> Path:
    return fit({"text": 1, "fast": 1})


@pytest.fixture(scope="module")
def flow(fit: Fit) -> Path:
    return fit({"flow": 1}, CONTINUOUS)


@pytest.fixture(scope="module")
def flow_with_delays(fit: Fit) -> Path:
    return fit({"flow": 1}, CONTINUOUS, rtc_max_delay=3)


def observation(policy: Pi05Policy) -> dict[str, Any]:
    images = {camera: np.zeros((3, 32, 32), np.uint8) for camera in policy.processor.cameras}
    return {"image": images, "state": np.zeros(3, np.float32), "task": "open the drawer"}


# --- actions


def test_flow_head_that_was_never_trained_does_not_act(text_and_fast: Path) -> None:
    expected = r"`actions: flow`: .*not trained.*posttrain \(2 steps\).*It can act with `actions: fast`"
    with pytest.raises(ValueError, match=expected):
        Pi05Policy(text_and_fast)


def test_policy_of_fast_tokens_acts_with_them(text_and_fast: Path) -> None:
    policy = Pi05Policy(text_and_fast, actions="fast")
    assert np.isfinite(policy.predict(observation(policy))).all()


def test_fast_tokens_that_were_never_trained_do_not_act(flow: Path) -> None:
    with pytest.raises(ValueError, match=r"`actions: fast`.*not trained.*It can act with `actions: flow`"):
        Pi05Policy(flow, actions="fast")


def test_policy_that_was_trained_on_no_actions_says_so(fit: Fit) -> None:
    with pytest.raises(ValueError, match="not trained on actions of any kind"):
        Pi05Policy(fit({"subtask": 1}, {"robot/hl_subtask": 1.0}))


def test_kind_of_actions_that_there_is_not_is_named(flow: Path) -> None:
    with pytest.raises(ValueError, match="actions is 'diffusion': expected flow or fast"):
        Pi05Policy(flow, actions="diffusion")


@pytest.mark.parametrize("way", ["ours", "policy"])
def test_export_knows_what_its_checkpoint_can(flow_with_delays: Path, tmp_path: Path, way: str) -> None:
    if way == "ours":
        convert(source=flow_with_delays, target=tmp_path / "out")
    else:
        Pi05Policy(flow_with_delays).save_pretrained(tmp_path / "out")
    assert locate(tmp_path / "out").trained == locate(flow_with_delays).trained
    assert locate(tmp_path / "out").abilities.max_delay == 3


def test_predicted_chunks_of_an_untrained_flow_head_are_refused(text_and_fast: Path, videos: Path) -> None:
    data = Pi05DataModule({"robot": LeRobotConfig(path=str(videos))}, batch_size=2, num_workers=0)
    with pytest.raises(ValueError, match="`actions: flow`"):
        quiet_trainer().predict(Pi05Module(CONFIG), data, ckpt_path=text_and_fast)


def test_module_that_was_trained_in_this_process_predicts_with_another_trainer(videos: Path, tmp_path: Path) -> None:
    module, robot = Pi05Module(CONFIG), LeRobotConfig(path=str(videos), val_fraction=0.2)
    flow = StageOptions(LossWeights(flow=1), CONTINUOUS)
    for _ in range(2):
        data = Pi05DataModule({"robot": robot}, batch_size=2, num_workers=0)
        quiet_trainer(StageSwitch(0, 2, posttrain=flow), default_root_dir=tmp_path).fit(module, data)
    quiet_trainer(limit_predict_batches=1, default_root_dir=tmp_path).predict(module, data)
    assert module.trained.terms == {"flow": 4}


# --- what counts as trained


@pytest.mark.parametrize(
    ("language", "says"),
    [
        (Language(), False),  # conditioned on the recorded subtask
        (Language(condition_on="task"), False),
        (Language(condition_on="both"), True),
        (Language(condition_on="both", task_only_share=1.0), False),
    ],
)
def test_subtask_that_actions_are_conditioned_on_is_not_learned_by_that(
    fit: Fit, language: Language, says: bool
) -> None:
    checkpoint = fit({"subtask": 1, "flow": 1}, CONTINUOUS, language=language)
    assert locate(checkpoint).trained.terms == ({"subtask": 2, "flow": 2} if says else {"flow": 2})
    assert locate(checkpoint).abilities.subtasks == says


def test_fast_tokens_beside_the_flow_are_learned(fit: Fit) -> None:
    language = Language(condition_on="both", fast_share=1.0)
    checkpoint = fit({"fast": 1, "subtask": 1, "flow": 1}, CONTINUOUS, language=language)
    assert locate(checkpoint).trained.terms == {"fast": 2, "subtask": 2, "flow": 2}


def test_head_that_was_frozen_was_not_trained(fit: Fit) -> None:
    assert locate(fit({"flow": 1}, CONTINUOUS, freeze=("flow_head",))).trained.terms == {}
    assert locate(fit({"flow": 1}, CONTINUOUS, freeze=("backbone",))).trained.terms == {"flow": 2}


def test_adapters_and_average_are_trained_as_the_weights_are(fit: Fit, text_and_fast: Path) -> None:
    checkpoint = fit(
        {"flow": 1},
        CONTINUOUS,
        WeightAverage(decay=0.5),
        init_from=str(text_and_fast),
        config=None,
        lora=Lora(rank=2),
    )
    for averaged in (True, False):
        weights = locate(checkpoint, averaged=averaged)
        assert weights.trained.terms == {"text": 2, "fast": 2, "flow": 2}
        assert (weights.abilities.flow, weights.abilities.fast) == (True, True)


def test_fast_tokens_that_stand_for_other_actions_now_were_not_trained(fit: Fit, text_and_fast: Path) -> None:
    same, other = (fit({"flow": 1}, CONTINUOUS, init_from=str(text_and_fast), fast_seed=seed) for seed in (0, 1))
    assert locate(same).trained.terms == {"text": 2, "fast": 2, "flow": 2}
    assert locate(other).trained.terms == {"text": 2, "flow": 2}
    assert not locate(other).abilities.fast


def test_cameras_in_another_order_lose_what_keypoints_know_of_them(text_and_fast: Path) -> None:
    weights = locate(text_and_fast)
    keypoints, patches = Pi05.without_memory(ModelConfig.preset("tiny")), Pi05.without_memory(CONFIG)
    same, other = weights.processor(), weights.processor()
    other.cameras = same.cameras[::-1]
    assert moved_cameras(keypoints, weights, same) is None
    assert moved_cameras(patches, weights, other) is None
    assert str(text_and_fast) in (said := str(moved_cameras(keypoints, weights, other)))
    assert f"and the data has {', '.join(other.cameras)}: what it knows of {', '.join(other.cameras)} is lost" in said


# --- given actions


def test_delay_that_was_never_trained_is_refused(flow: Path, flow_with_delays: Path) -> None:
    assert locate(flow_with_delays).trained.delays == {3: 2}
    with pytest.raises(ValueError, match=r"inference_delay of 1 actions: .* 0 at most"):
        Pi05Policy(flow, inference_delay=1)
    with pytest.raises(ValueError, match=r"inference_delay of 4 actions: .* 3 at most"):
        Pi05Policy(flow_with_delays, inference_delay=4, execution_horizon=1)
    assert Pi05Policy(flow_with_delays, inference_delay=3).execution_horizon == 3


def test_more_given_actions_than_were_trained_are_refused(flow_with_delays: Path) -> None:
    policy = Pi05Policy(flow_with_delays)
    given = policy.predict_chunk(observation(policy))
    assert np.array_equal(policy.predict_chunk(observation(policy), None, given[:3])[:3], given[:3])
    with pytest.raises(ValueError, match=r"prefix_actions of 4 actions: .* 3 at most"):
        policy.predict_chunk(observation(policy), None, given[:4])


def test_weights_from_elsewhere_go_on_from_no_actions_before_they_are_trained_to() -> None:
    assert LeRobotFolder.trained.max_delay == 0
    fine_tuned = LeRobotFolder.trained + Trained({"posttrain": 2}, {"flow": 2}, complete=True)
    assert (fine_tuned.max_delay, fine_tuned.complete) == (0, False)
    assert (fine_tuned + Trained(terms={"flow": 2}, complete=True, delays={3: 2})).max_delay == 3


def test_delays_of_a_record_that_is_older_than_them_are_not_known(flow_with_delays: Path, tmp_path: Path) -> None:
    content = torch.load(flow_with_delays, weights_only=True)
    del content["pi05"]["trained"]["delays"]
    torch.save(content, tmp_path / "old.ckpt")
    assert locate(tmp_path / "old.ckpt").abilities.max_delay is None
    Pi05Policy(tmp_path, inference_delay=2)


# --- subtasks


def test_subtasks_that_were_never_trained_are_not_said(flow: Path) -> None:
    with pytest.warns(UserWarning, match="not trained to say subtasks, so the task alone"):
        policy = Pi05Policy(flow)
    policy.predict(observation(policy))
    assert policy.subtask is None
    with pytest.raises(ValueError, match="not trained to say subtasks"):
        policy.predict_subtask(observation(policy))
    with pytest.raises(ValueError, match="hierarchical: the policy was not trained to say subtasks"):
        Pi05Policy(flow, hierarchical=True)


# --- a run's configuration of before


@pytest.mark.parametrize(("old", "new"), [("true", "flow"), ("false", "fast")])
def test_configuration_of_an_older_run_is_read(flow: Path, tmp_path: Path, old: str, new: str) -> None:
    content = torch.load(flow, weights_only=True)
    content["config"] = f"a:\n  use_flow_matching: {old}\n  num_steps: 10\n"
    torch.save(content, tmp_path / "old.ckpt")
    text = locate(tmp_path / "old.ckpt").run_config()
    assert re.search(rf"^  actions: {new}$", text, re.MULTILINE)


def test_actions_that_are_learned_without_an_advantage_afterwards_follow_none() -> None:
    told = Trained({"experience": 5}, {"flow": 5, ADVANTAGE: 5}, complete=True)
    untold, talk = Trained({"more": 3}, {"flow": 3}, complete=True), Trained({"talk": 3}, {"text": 3}, complete=True)
    assert (told + told).terms[ADVANTAGE] == 10
    assert (told + talk).terms == {"flow": 5, ADVANTAGE: 5, "text": 3}
    assert (told + untold).terms == {"flow": 8}
    assert (told + untold + told).terms[ADVANTAGE] == 5
