"""What only a later stage uses is tried before the first step: data, losses, own heads, what is frozen."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor

from pi05_lightning import Pi05DataModule, Pi05Module, StageSwitch
from pi05_lightning.data.augment import Augmentation
from pi05_lightning.data.processor import Language
from pi05_lightning.data.sources.base import SimpleSource
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.backbone import Backbone
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.base import Head
from pi05_lightning.models.parallelize import Lora
from pi05_lightning.recipe import LossWeights, Stage, StageOptions
from pi05_lightning.training import rehearsal
from pi05_lightning.types import Answer, Batch, Frame, Modality, Prefix
from tests.quiet_trainer import quiet_trainer

from ..data.recorded import STARTS
from ..data.test_bad_data import replace_image
from .test_own_head import GripperHead, GripperTargets

LONG = 5000  # steps of a stage: nobody waits for its end
FLOW = {"robot/continuous_robot_actions": 1.0}
WORDS = StageOptions(LossWeights(text=1, subtask=1), {"robot/qa": 0.5, "robot/hl_subtask": 0.5})
ACTS = StageOptions(LossWeights(subtask=1, flow=1), FLOW)


class Enough(Exception):
    """The test has seen enough of a long run."""


class Count(Callback):
    """Steps that were begun; the run ends before one too many is."""

    def __init__(self, most: int) -> None:
        self.begun, self.most = 0, most

    def on_train_batch_start(self, *args: Any) -> None:
        if self.begun == self.most:
            raise Enough
        self.begun += 1


@pytest.fixture
def start(videos: Path, tmp_path: Path) -> Callable[..., Pi05Module]:
    """Begin a run of two long stages; one that fails has begun no step. `steps` ends it."""

    def run(
        posttrain: StageOptions = ACTS,
        pretrain: StageOptions = WORDS,
        steps: int = 1,
        sources: dict[str, Any] | None = None,
        module: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        stages: tuple[int, int] = (LONG, LONG),
        then: Sequence[Stage] = (),
        **options: Any,
    ) -> Pi05Module:
        seed_everything(0)
        count = Count(steps)
        switch = StageSwitch(*stages, pretrain=pretrain, posttrain=posttrain, then=then)
        trainer = quiet_trainer(switch, count, default_root_dir=tmp_path, **options)
        robot = {"robot": LeRobotConfig(path=str(videos), val_fraction=0.2)}
        policy = Pi05Module(**{"config": ModelConfig.preset("debug")} | (module or {}))
        loaders = Pi05DataModule(robot | (sources or {}), **{"batch_size": 4, "num_workers": 0} | (data or {}))
        try:
            trainer.fit(policy, loaders)
        except Enough:
            pass
        finally:
            assert count.begun in (0, steps)
        return policy

    return run


Start = Callable[..., Pi05Module]


# --- data


def test_an_image_that_only_stage_2_reads_is_decoded_before_the_first_step(start: Start, pictures_copy: Path) -> None:
    replace_image(pictures_copy, 0, b"no image")
    other = {"other": LeRobotConfig(path=str(pictures_copy), val_fraction=0)}
    posttrain = StageOptions(LossWeights(flow=1), FLOW | {"other/continuous_robot_actions": 0.001})
    with pytest.raises(
        ValueError,
        match=r"stage posttrain, other/continuous_robot_actions: dataset 'other', episode 0, frame 0, top: .*skip",
    ):
        start(posttrain, sources=other)


def test_what_no_stage_draws_is_not_tried(start: Start, pictures_copy: Path) -> None:
    replace_image(pictures_copy, 0, b"no image")
    start(sources={"other": LeRobotConfig(path=str(pictures_copy), val_fraction=0)})


def test_a_stage_that_is_not_reached_is_not_tried(start: Start, pictures_copy: Path) -> None:
    replace_image(pictures_copy, 0, b"no image")
    other = {"other": LeRobotConfig(path=str(pictures_copy), val_fraction=0)}
    start(StageOptions(LossWeights(flow=1), {"other/continuous_robot_actions": 1}), sources=other, max_steps=2)


class Captions(SimpleSource):
    """Frames that nobody recorded."""

    modalities = (Modality.WEB_CAPTION,)

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.read = list[int]()

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> Frame:
        if self.fails and index == len(self) - 1:
            raise KeyError("caption")
        return Frame(answers=(Answer("what is this?", f"number {index}"),))


def test_whatever_a_source_raises_has_the_stage_and_the_sample(start: Start) -> None:
    posttrain = StageOptions(LossWeights(text=1, flow=1), FLOW | {"own/web_caption": 0.1})
    expected = r"stage posttrain, own/web_caption: dataset 'own', item 199: KeyError: 'caption' \(.*test_rehearsal.py:"
    with pytest.raises(ValueError, match=expected):
        start(posttrain, sources={"own": Captions(fails=True)})


def test_a_third_stage_is_tried_too(start: Start) -> None:
    third = Stage(name="third", steps=3, losses=LossWeights(text=1), mixture={"own/web_caption": 1.0})
    with pytest.raises(ValueError, match="stage third, own/web_caption: "):
        start(then=[third], sources={"own": Captions(fails=True)})


class BrokenAugmentation(Augmentation):
    def draw(self, batch: Batch, cameras: Sequence[str], loc_ids: range) -> Batch:
        if len(batch.actions):
            raise IndexError("no camera for actions")
        return super().draw(batch, cameras, loc_ids)


def test_augmentation_that_fails_on_what_stage_2_draws_is_named(start: Start) -> None:
    expected = "stage posttrain, robot/continuous_robot_actions: IndexError: no camera for actions"
    with pytest.raises(ValueError, match=expected):
        start(data={"augmentation": BrokenAugmentation()})


def test_damaged_validation_data_is_found_though_nobody_validates_before_training(
    start: Start, videos: Path, pictures_copy: Path
) -> None:
    for last in STARTS[1:] - 1:
        replace_image(pictures_copy, int(last), b"no image")
    other = {"other": LeRobotConfig(path=str(pictures_copy), val_fraction=0.2)}
    with pytest.raises(ValueError, match=r"validation, other/continuous_robot_actions: dataset 'other', episode \d"):
        start(sources=other, limit_val_batches=1, num_sanity_val_steps=0)


def test_bad_samples_that_are_skipped_are_not_counted(start: Start, pictures_copy: Path) -> None:
    replace_image(pictures_copy, 0, b"no image")
    other = LeRobotConfig(path=str(pictures_copy), val_fraction=0, on_bad_sample="skip")
    module = start(StageOptions(LossWeights(flow=1), {"other/continuous_robot_actions": 1}), sources={"other": other})
    counted = module.trainer.datamodule.bad_samples
    assert (counted.bad, counted.drawn) == (0, 8)  # a batch, and the one that Lightning fetches ahead


# --- losses and what learns from them


def test_flow_without_actions_to_learn_from_is_refused(start: Start) -> None:
    with pytest.raises(ValueError, match=r"stage posttrain: the loss 'flow' has a weight of 1.*\(hl_subtask\).*0$"):
        start(StageOptions(LossWeights(subtask=1, flow=1), {"robot/hl_subtask": 1.0}))


def test_fast_without_a_tokenizer_is_refused_where_it_was_asked_for(start: Start) -> None:
    with pytest.raises(ValueError, match=r"stage posttrain: the loss 'fast' .*needs a FAST tokenizer: data.fast"):
        start(StageOptions(LossWeights(fast=1, flow=1), FLOW))


def test_a_default_loss_that_nothing_feeds_is_said_and_left_out(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        start(pretrain=StageOptions(LossWeights(text=1, subtask=1, fast=1), WORDS.mixture))
    said = [record.message for record in caplog.records if "the loss 'fast'" in record.message]
    assert len(said) == 1
    assert said[0].startswith("stage pretrain: ")
    assert not [record.message for record in caplog.records if "the loss 'flow'" in record.message]


def test_a_further_stage_of_data_without_subtasks_goes_on_without_their_default_loss(
    start: Start, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = {"plain": LeRobotConfig(path=str(pictures))}
    acts = StageOptions(LossWeights(subtask=1, flow=1), {"plain/continuous_robot_actions": 1.0})
    further = Stage(name="experience", steps=LONG, losses=acts.losses, mixture=acts.mixture)
    with caplog.at_level(logging.WARNING):
        start(acts, sources=plain, data={"language": Language(condition_on="both")}, then=[further])
    said = [record.message for record in caplog.records if "the loss 'subtask'" in record.message]
    assert any(line.startswith("stage experience: ") for line in said)
    assert not any("FAST tokenizer" in line for line in said)


SAYS_ACTIONS = Language(condition_on="both", fast_share=1.0)


@pytest.mark.parametrize(
    ("source", "language", "said"),
    [
        ("plain", SAYS_ACTIONS, "but of continuous_robot_actions only where there is a subtask"),
        ("robot", replace(SAYS_ACTIONS, task_only_share=1.0), "it learns from fast_robot_actions"),
    ],
)
def test_fast_tokens_beside_the_flow_are_refused_where_no_subtask_brings_them(
    start: Start, pictures: Path, source: str, language: Language, said: str
) -> None:
    posttrain = StageOptions(LossWeights(fast=1, flow=1), {f"{source}/continuous_robot_actions": 1.0})
    plain = {"plain": LeRobotConfig(path=str(pictures))}
    with pytest.raises(ValueError, match=f"stage posttrain: the loss 'fast' .*{said}"):
        start(posttrain, sources=plain, data={"language": language})


def test_what_no_sample_had_was_not_trained(start: Start, pictures: Path) -> None:
    plain = {"plain": LeRobotConfig(path=str(pictures))}
    losses = LossWeights(subtask=1, fast=1, flow=1)
    acts, data = StageOptions(losses, {"plain/continuous_robot_actions": 1.0}), {"language": SAYS_ACTIONS}
    policy = start(StageOptions(LossWeights(flow=1), acts.mixture), acts, sources=plain, data=data)
    assert policy.trained.terms == {"flow": 1}


def test_frames_without_a_subtask_are_said_where_they_teach_nothing(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole steps of them ended the run: without shares they are not drawn at all."""
    words, data = LossWeights(text=1, subtask=1), {"language": Language(condition_on="both")}
    with caplog.at_level(logging.WARNING):
        module = start(pretrain=StageOptions(words), data=data)
        assert module.trainer.datamodule.drawn(module.recipe.stages[0]) == {Modality.QA, Modality.HL_SUBTASK}
        assert "have no subtask" not in caplog.text
        start(pretrain=StageOptions(words, FLOW), data=data | {"batch_size": 12, "length_window": 1})
    assert "some samples of robot/continuous_robot_actions have no subtask" in caplog.text
    assert "Draw robot/hl_subtask in" in caplog.text


def test_a_stage_left_to_its_losses_draws_nothing_that_they_cannot_train(start: Start) -> None:
    module = start(pretrain=StageOptions(LossWeights(text=1, subtask=1)), steps=20)
    stage = module.recipe.stages[0]
    assert module.trainer.datamodule.drawn(stage) == {Modality.QA, Modality.HL_SUBTASK}


@pytest.mark.parametrize("options", [{"freeze": (".*",)}, {"lr_factors": {".*": 0.0}}, {"freeze": ("backbone",)}])
def test_a_stage_in_which_nothing_learns_is_refused(start: Start, options: dict[str, Any]) -> None:
    posttrain = StageOptions(LossWeights(subtask=1), {"robot/hl_subtask": 1.0}, **options)
    with pytest.raises(ValueError, match=r"stage posttrain: nothing is learned from robot/hl_subtask.*frozen"):
        start(posttrain)


def test_samples_that_reach_only_frozen_parts_are_refused_beside_others_that_learn(start: Start) -> None:
    mixture = {"robot/hl_subtask": 0.5, "robot/continuous_robot_actions": 0.5}
    with pytest.raises(ValueError, match=r"stage posttrain: nothing is learned from robot/hl_subtask"):
        start(StageOptions(LossWeights(subtask=1, flow=1), mixture, freeze=("backbone",)))


@pytest.mark.parametrize("part", [{"freeze": ("flow_head",)}, {}])
def test_insulated_flow_whose_head_is_frozen_learns_nothing(start: Start, part: dict[str, Any]) -> None:
    posttrain = StageOptions(LossWeights(flow=1), FLOW, **part)
    if part:
        with pytest.raises(ValueError, match="nothing is learned from robot/continuous_robot_actions"):
            start(posttrain, module={"knowledge_insulation": True})
    else:
        start(posttrain, module={"knowledge_insulation": True})


# --- own heads


class Misshapen(GripperHead):
    def loss(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> dict[str, Tensor]:
        return {"gripper": batch.actions[:, :3] - batch.actions[:, :2]}


class OfValues(GripperHead):
    """Its loss hangs on whether any row closes the gripper, which is nothing that shapes tell."""

    def loss(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> dict[str, Tensor]:
        factor = 2 if batch.auxiliary["gripper"]["closes"].max().item() > 0.5 else 1
        return {"gripper": factor * super().loss(batch, prefix, backbone)["gripper"]}


class OfWrongValues(OfValues):
    def loss(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> dict[str, Tensor]:
        assert batch.actions.abs().max().item() < 0, "actions are positive"
        return super().loss(batch, prefix, backbone)


class BrokenTargets(GripperTargets):
    def make(self, frame: Frame) -> bool | None:
        if frame.actions is None or frame.answers:
            return None
        return bool(frame.actions[0, 99] > 0)


class WithoutTargets(GripperHead):
    target_maker: ClassVar = BrokenTargets()


GRIPPER = StageOptions(LossWeights(flow=1, others={"gripper": 0.5}), FLOW)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Misshapen, r"stage posttrain, robot/continuous.*: RuntimeError: The size of tensor .*test_rehearsal.py:\d+"),
        (OfWrongValues, r"stage posttrain, robot/continuous.*: AssertionError: actions are positive"),
        (WithoutTargets, r"stage posttrain, robot/cont.*: dataset 'robot', episode 0, frame 0: IndexError: index 99"),
    ],
)
def test_an_own_head_that_fails_in_stage_2_ends_the_run_before_stage_1(
    start: Start, head: type[Head], message: str
) -> None:
    mixed = StageOptions(LossWeights(text=1, others={"gripper": 0}), {"robot/qa": 1.0})
    with pytest.raises(ValueError, match=message):
        start(GRIPPER, mixed, module={"heads": {"gripper": head}})


def test_a_head_that_looks_at_values_is_no_failure(start: Start) -> None:
    module = start(GRIPPER, module={"heads": {"gripper": OfValues}})
    assert all(p.grad is None for name, p in module.named_parameters() if "gripper" in name)


# --- what it leaves as it was, and what it costs

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora": {"module": {"lora": Lora(rank=2, dropout=0.1)}},
    "checkpointing": {"module": {"activation_checkpointing": True}},
    "bf16": {"precision": "bf16-true"},
    "keypoints": {"module": {"config": ModelConfig.preset("tiny")}},
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_same_bits_with_and_without_it(
    start: Start, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options = {"stages": (2, 2), "steps": 4, "module": {}} | KINDS[kind]
    options["module"] = options["module"] | {"flow_draws": 2}
    tried = start(**options)
    monkeypatch.setattr("pi05_lightning.training.callbacks.stages.rehearse", lambda *args: None)
    untried = start(**options)
    assert tried.global_step == 4
    expected = untried.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in tried.state_dict().items())


def test_every_source_and_modality_that_a_stage_draws_is_tried_whatever_its_share(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = set[tuple[str, int]]()
    original = rehearsal.Samples.__getitem__

    def note(self: Any, draw: tuple[int, int, int]) -> Any:
        read.add((str(self.subsets[draw[0]]), draw[1]))
        return original(self, draw)

    with monkeypatch.context() as patch:
        patch.setattr(rehearsal.Samples, "__getitem__", note)
        shares = FLOW | {"own/web_caption": 1e-6}
        start(StageOptions(LossWeights(text=1, flow=1), shares), sources={"own": Captions()}, steps=0)
    assert {name for name, _ in read} == {*WORDS.mixture, *shares}
    assert {index for name, index in read if name == "own/web_caption"} == {0, 99, 199}


def test_it_takes_the_demos_model_less_than_two_seconds(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = list[float]()

    def timed(*args: Any) -> None:
        begin = time.process_time()
        rehearsal.rehearse(*args)
        seconds.append(time.process_time() - begin)

    monkeypatch.setattr("pi05_lightning.training.callbacks.stages.rehearse", timed)
    start(module={"config": ModelConfig.preset("tiny")})
    assert seconds[0] < 2
