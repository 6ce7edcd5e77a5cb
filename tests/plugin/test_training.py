"""What LeRobot's batches teach through the plugin, beside what pi05_lightning's own loader makes of the same frames."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lightning.pytorch import Trainer

from lerobot_policy_pi05_lightning.frames import camera_names, depth_cameras
from pi05_lightning import Pi05DataModule, Pi05Module
from pi05_lightning.data.processor import Language
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.files.local import read_json, write_json
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.types import Drawn, Modality

from .conftest import Batch, Make

ALL = {"text": 1.0, "subtask": 1.0, "fast": 1.0, "flow": 10.0}
FRAMES = list(range(2, 22))  # 3 and 15 have questions, and all have a subtask but the first two of an episode


def test_loss_is_that_of_the_module_on_the_same_frames(
    make: Make, batch_of: Callable[..., Batch], videos: Path, fast: Path
) -> None:
    options: dict[str, Any] = {"losses": ALL, "fast": str(fast), "flow_alpha": 1.0, "augmentation": None}
    policy = make(flow_draws=2, knowledge_insulation=True, **options).train()
    batch = batch_of(policy, FRAMES)
    loss, terms = policy.forward(batch)
    assert {*terms} == {f"loss_{name}" for name in ALL}

    shapes = policy.config.sizes.shapes
    data = Pi05DataModule(
        {"robot": LeRobotConfig(str(videos), val_fraction=0)}, fast=fast, augmentation=None, shapes=shapes
    )
    module = Pi05Module(policy.config.sizes, flow_draws=2, knowledge_insulation=True)
    module.model = policy.model
    module.follow(policy.config.recipe_of(policy.config.weights))
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    source = data.sources("train")["robot"]
    samples = [
        data.processor.sample(source[frame], sample.subset, sample.key, data.language.questions_per_sample)
        for frame, sample in zip(FRAMES, policy.samples(batch), strict=True)
    ]
    assert {sample.subset.modality for sample in samples} == {*Modality} - {Modality.WEB_CAPTION}
    ours = module.with_noise(replace(data.processor.collate(samples), drawn=Drawn({}, 0)))
    ours.step_counts = module.model.counts(ours)
    torch.testing.assert_close(loss, module.training_step(ours, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("insulated", [True, False])
def test_insulated_actions_teach_the_backbone_nothing(
    make: Make, batch_of: Callable[..., Batch], insulated: bool
) -> None:
    policy = make(losses={"flow": 1.0}, knowledge_insulation=insulated).train()
    policy.forward(batch_of(policy, FRAMES))[0].backward()
    gradients = [p.grad for p in policy.model.backbone.parameters() if p.grad is not None]
    assert any(bool(gradient.any()) for gradient in gradients) is not insulated


def test_validation_is_the_same_each_time_and_training_is_not(make: Make, batch_of: Callable[..., Batch]) -> None:
    policy = make(losses={"subtask": 1.0, "flow": 1.0})
    batch = batch_of(policy, FRAMES)
    losses = [[], []]
    for training in (False, True):
        policy.train(training)
        for _ in range(2):
            losses[training].append(policy.forward(batch)[0].item())
            policy.update()
    assert losses[False][0] == losses[False][1]
    assert losses[True][0] != losses[True][1]
    assert policy.trained.stages == {"posttrain": 4}


def test_what_the_dataset_cannot_teach_is_said_or_refused(
    make: Make, pictures: Path, fast: Path, caplog: pytest.LogCaptureFixture
) -> None:
    horizon = ModelConfig.preset("debug").horizon
    with caplog.at_level(logging.WARNING):
        policy = make(pictures)
    assert "subtask is not trained, as the dataset has no subtasks" in caplog.text
    assert policy.stage.weights == {"flow": 10.0}
    with pytest.raises(ValueError, match="losses: subtask cannot be trained, as the dataset has no subtasks"):
        make(pictures, losses={"subtask": 1.0, "flow": 1.0})
    with pytest.raises(ValueError, match="fast cannot be trained, as there is no FAST tokenizer"):
        make(losses={"fast": 1.0})
    with pytest.raises(ValueError, match=f"fast: the tokenizer was fitted on chunks of {horizon} steps, and"):
        make(losses={"fast": 1.0}, fast=str(fast), chunk_size=horizon + 1)
    with pytest.raises(ValueError, match=r"stage pretrain has nothing to train: .*questions.*subtasks.*FAST"):
        make(pictures, stage="pretrain")
    with pytest.raises(ValueError, match=r"mixture: nothing is learned from qa .* losses \['subtask', 'flow'\]"):
        make(mixture={"qa": 1.0})


def test_batch_of_frames_that_serve_as_nothing_has_the_loss_0(make: Make, batch_of, videos: Path) -> None:
    policy = make(stage="pretrain", losses={"text": 1.0})
    frames = [n for n in range(20) if not policy.samples(batch_of(policy, [n]))]
    assert frames
    loss, parts = policy.forward(batch_of(policy, frames[:2]))
    loss.backward()
    assert loss.item() == 0
    assert not parts
    policy.update()
    assert not policy.trained.stages


def test_episodes_of_other_splits_are_counted(make: Make, videos_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(root=videos_copy)
    assert "for other things" not in caplog.text
    info = videos_copy / "meta" / "info.json"
    write_json(info, read_json(info) | {"splits": {"train": "0:3", "test": "3:5"}})
    make(root=videos_copy)
    assert "declares 2 of its episodes for other things than training" in caplog.text


def test_every_image_of_an_observation_is_a_camera() -> None:
    keys = ["observation.image", "observation.wrist_image"]
    assert camera_names(keys) == {"observation.image": "image", "observation.wrist_image": "wrist_image"}
    with pytest.raises(ValueError, match="share the last part of their names"):
        camera_names(["observation.images.left.rgb", "observation.images.right.rgb"])
    with pytest.raises(ValueError, match=r"rename front$"):
        camera_names(["front"])


def test_depth_cameras_are_left_out_and_the_saved_policy_asks_for_none(
    make: Make, batch_of: Callable[..., Batch], three_cameras: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(shutil.copytree(three_cameras, tmp_path / "data"))
    info = read_json(root / "meta" / "info.json")
    info["features"]["observation.images.left"]["info"] = {"is_depth_map": True}
    write_json(root / "meta" / "info.json", info)
    assert depth_cameras(root, ["observation.images.left", "observation.images.absent"]) == ["observation.images.left"]
    with caplog.at_level(logging.WARNING):
        policy = make(root)
    assert caplog.text.count("depth cameras are not learned from: observation.images.left\n") == 1
    assert policy.processor.cameras == ("top", "wrist")
    assert policy.forward(batch_of(policy, FRAMES, root))[0] > 0
    policy.save_pretrained(tmp_path / "saved")
    saved = PreTrainedConfig.from_pretrained(tmp_path / "saved")
    assert [*saved.image_features] == ["observation.images.top", "observation.images.wrist"]


def test_frozen_parameters_are_given_to_no_optimizer(make: Make) -> None:
    policy = make(freeze=["^backbone"], lr_factors={"norm": 0.1}, optimizer_lr=1e-3)
    groups = policy.get_optim_params()
    given = {id(parameter) for group in groups for parameter in group["params"]}
    assert given == {id(p) for name, p in policy.model.named_parameters() if not name.startswith("backbone")}
    assert {round(group["lr"], 6) for group in groups} == {1e-3, 1e-4}
    with pytest.raises(ValueError, match="freeze 'vison' matches no parameter"):
        make(freeze=["vison"])


def test_a_term_that_would_train_nothing_is_left_out_or_refused(
    make: Make, batch_of: Callable[..., Batch], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        policy = make(freeze=["^backbone"])
    assert "subtask is not trained, as all that it would train is frozen" in caplog.text
    loss, parts = policy.forward(batch_of(policy, FRAMES))
    loss.backward()
    assert set(parts) == {"loss_flow"}
    with pytest.raises(ValueError, match="losses: subtask cannot be trained, as all that it would train is frozen"):
        make(freeze=["^backbone"], losses={"subtask": 1.0, "flow": 1.0})
    with pytest.raises(ValueError, match="peft: LeRobot saves nothing but adapters"):
        policy.wrap_with_peft(peft_cli_overrides={})


def test_the_words_of_a_policy_are_not_learned(make: Make, batch_of: Callable[..., Batch], videos_copy: Path) -> None:
    write_json(videos_copy / "meta" / "pi05_collect.json", {"policy": "runs/mine"})
    policy = make(videos_copy)
    policy.train()
    served = {
        sample.subset.modality for _ in range(5) for sample in policy.samples(batch_of(policy, FRAMES, videos_copy))
    }
    assert served == {Modality.CONTINUOUS}


def test_task_is_left_out_in_training_alone(make: Make, batch_of: Callable[..., Batch]) -> None:
    policy = make(losses={"flow": 1.0}, language=Language(condition_on="task", no_task_share=0.999))
    batch = batch_of(policy, FRAMES)
    said = []
    for training in (False, True):
        samples = policy.train(training).samples(batch)
        said.append([policy.processor.tokenizer.decode(sample.tokens.tolist()) for sample in samples])
    assert all("drawer" in text for text in said[0])
    assert not any("drawer" in text for text in said[1])
