"""A head from outside the package: one class and one line of configuration, trained, measured, resumed, left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from pi05_lightning import Pi05DataModule, Pi05Module, Pi05Policy
from pi05_lightning.cli.main import main
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.backbone import Backbone
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.base import Head, Term, Terms
from pi05_lightning.models.parallelize import Sharding, gather
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.module.blueprint import Blueprint
from pi05_lightning.recipe import LossWeights, Recipe, StageOptions
from pi05_lightning.training.callbacks.checkpoint import RunCheckpoint
from pi05_lightning.types import Batch, Frame, Modality, Prefix, Subset, Target
from tests.both_stages import PRETRAIN_STEPS, STAGES
from tests.random_fast import random_fast

ACTIONS = frozenset({Modality.CONTINUOUS})


class GripperTargets:
    """Whether a chunk's first action closes the gripper, its last dim."""

    def make(self, frame: Frame) -> bool | None:
        return None if frame.actions is None else bool(frame.actions[0, -1] > 0)

    def images(self, target: bool) -> set[str]:
        return set()

    def collate(
        self, targets: Sequence[bool | None], images: Sequence[Mapping[str, int]], encode: Callable[[str], list[int]]
    ) -> dict[str, Tensor]:
        rows = [row for row, target in enumerate(targets) if target is not None]
        closes = [float(targets[row]) for row in rows]  # type: ignore[arg-type]
        return {"row": torch.tensor(rows, dtype=torch.long), "closes": torch.tensor(closes)}


class GripperHead(Head):
    """Says from the last token's hidden state whether the gripper closes next."""

    terms: ClassVar = {"gripper": ACTIONS}
    metrics: ClassVar = {"gripper_accuracy": ACTIONS}
    reads_hidden = True
    target_maker = GripperTargets()

    def __init__(self, config: ModelConfig, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(config.language.width, width), nn.ReLU(), nn.Linear(width, 1))

    def masks(self, batch: Batch) -> dict[str, Tensor]:
        return {"gripper": torch.ones_like(batch.auxiliary["gripper"]["closes"], dtype=torch.bool)}

    def logits(self, batch: Batch, prefix: Prefix) -> Tensor:
        assert prefix.hidden is not None
        row = batch.auxiliary["gripper"]["row"]
        given = batch.token_mask & (batch.target_kind != Target.FAST)  # FAST tokens say the action itself
        last = given[row].sum(1) - 1
        return self.layers(prefix.hidden[row, last])[:, 0]

    def loss(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> dict[str, Tensor]:
        closes = batch.auxiliary["gripper"]["closes"]
        return {"gripper": F.binary_cross_entropy_with_logits(self.logits(batch, prefix), closes, reduction="none")}

    def measure(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> Terms:
        right = (self.logits(batch, prefix) > 0) == (batch.auxiliary["gripper"]["closes"] > 0.5)
        return {"gripper_accuracy": Term(right, torch.ones_like(right))}


WITH_GRIPPER = STAGES | {
    "posttrain": StageOptions(LossWeights(flow=1, others={"gripper": 0.5}), STAGES["posttrain"].mixture)
}
OPTIONS = {"heads": {"gripper": partial(GripperHead, width=4)}}


@pytest.fixture
def trained(train: Callable[..., Trainer]) -> Trainer:
    return train(stages=WITH_GRIPPER, module_options=OPTIONS, limit_val_batches=1)


def weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_own_head_learns_from_the_step_at_which_its_term_has_a_weight(trained: Trainer, tmp_path: Path) -> None:
    before, after = weights(tmp_path / f"step={PRETRAIN_STEPS}.ckpt"), weights(tmp_path / "step=6.ckpt")
    bias = "model.auxiliary.gripper.layers.2.bias"
    assert torch.equal(before[bias], weights(tmp_path / "step=1.ckpt")[bias])
    assert not torch.equal(before[bias], after[bias])


class SettledHead(GripperHead):
    """What its layers and buffers begin with is not what memory holds."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(3)
        self.register_buffer("weights", torch.tensor([1.0, 5.0]))
        self.register_buffer("bins", torch.linspace(0, 1, 4), persistent=False)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_own_head_begins_with_what_it_was_made_with(is_resumed: bool) -> None:
    blueprint = Blueprint(ModelConfig.preset("debug"), {"settled": SettledHead})
    model = blueprint.bare()
    blueprint.make(model, None, None, hollow=is_resumed)  # a checkpoint gives the rest, all but `bins`
    found, made = model.heads["settled"], SettledHead(model.config)
    assert torch.equal(found.get_buffer("bins"), made.get_buffer("bins"))
    assert torch.equal(found.get_buffer("weights"), made.get_buffer("weights"))
    if not is_resumed:
        assert torch.equal(found.norm.weight, torch.ones(3))
        assert all(0 < value.std() < 1 for value in (found.layers[0].weight, found.layers[2].weight))


def test_tensor_that_would_not_move_with_the_model_is_refused() -> None:
    class Loose(GripperHead):
        def __init__(self, config: ModelConfig) -> None:
            super().__init__(config)
            self.grid = torch.linspace(0, 1, 4)

    with pytest.raises(ValueError, match=r"model\.heads\.loose: the tensors grid .* use `register_buffer`"):
        Pi05.without_memory(ModelConfig.preset("debug"), {"loose": Loose})


def test_parameter_of_two_layers_is_refused_and_a_layer_in_two_places_is_not() -> None:
    class Tied(GripperHead):
        def __init__(self, config: ModelConfig) -> None:
            super().__init__(config)
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
            self.other.weight = self.one.weight

    class Shared(GripperHead):
        def __init__(self, config: ModelConfig) -> None:
            super().__init__(config)
            self.one = self.other = nn.Linear(3, 3)

    with pytest.raises(ValueError, match=r"model\.heads\.tied: one\.weight and other\.weight are one parameter"):
        Pi05.without_memory(ModelConfig.preset("debug"), {"tied": Tied})
    Pi05.without_memory(ModelConfig.preset("debug"), {"shared": Shared})


def test_gathered_model_has_the_buffers_that_no_checkpoint_has() -> None:
    blueprint = Blueprint(ModelConfig.preset("debug"), {"settled": SettledHead})
    model = blueprint.bare()
    blueprint.make(model, None, None, hollow=False)
    whole = gather(model, blueprint.blank(), Sharding(cast(DeviceMesh, SimpleNamespace(device_type="cpu"))))
    made = SettledHead(model.config)
    assert torch.equal(whole.heads["settled"].get_buffer("bins"), made.get_buffer("bins"))


@pytest.mark.parametrize("modality", [Modality.FAST, Modality.CONTINUOUS])
def test_target_is_made_of_the_modalities_that_its_terms_name(modality: Modality, videos: Path) -> None:
    model = Pi05.without_memory(ModelConfig.preset("debug"), {"gripper": GripperHead})
    data = Pi05DataModule({"robot": LeRobotConfig(str(videos))}, shapes=model.config.shapes, num_workers=0)
    data.processor.targets.update(model.targets)
    data.processor.fast = random_fast(model.config)
    sample = data.processor.sample(data.sources("train")["robot"][0], Subset("robot", modality))
    assert ("gripper" in sample.targets) == (modality is Modality.CONTINUOUS)


def test_own_head_is_measured_on_its_modality(trained: Trainer) -> None:
    trained.validate(trained.lightning_module, trained.datamodule, verbose=False)
    results = trained.lightning_module.results
    assert 0 <= results["robot/continuous_robot_actions"]["gripper_accuracy"] <= 1
    assert [name for name, values in results.items() if "gripper_accuracy" in values] == [
        "robot/continuous_robot_actions"
    ]


@pytest.mark.slow
def test_resumed_run_with_an_own_head_ends_with_the_same_weights(
    trained: Trainer, train: Callable[..., Trainer], tmp_path: Path
) -> None:
    expected = weights(tmp_path / "step=6.ckpt")
    (tmp_path / "step=6.ckpt").unlink()
    train(stages=WITH_GRIPPER, module_options=OPTIONS, ckpt_path=tmp_path / "step=4.ckpt")
    found = weights(tmp_path / "step=6.ckpt")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_policy_leaves_the_own_head_out(trained: Trainer, tmp_path: Path) -> None:
    policy = Pi05Policy(tmp_path / "step=6.ckpt")
    assert not list(policy.model.auxiliary)


def test_training_with_an_own_head_starts_from_weights_without_it(
    trained: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Pi05Module(init_from=str(tmp_path / "step=6.ckpt"), **OPTIONS)
    module.configure_model()
    assert "its heads gripper are left out, and are random again" in caplog.text
    found, before = module.state_dict(), weights(tmp_path / "step=6.ckpt")
    assert all(value.isfinite().all() for value in found.values())
    assert all(torch.equal(found[name], before[name]) for name in found if "auxiliary" not in name)


def test_term_that_no_head_has_is_named_with_the_nearest_one() -> None:
    module = Pi05Module(ModelConfig.preset("debug"), **OPTIONS)
    stage = StageOptions(LossWeights(others={"griper": 1.0}))
    with pytest.raises(ValueError, match=r"stage posttrain: no head .* 'griper' \(did you mean gripper\?\)"):
        module.follow(Recipe.of(posttrain=stage))
    with pytest.raises(ValueError, match="location with backbone_type keypoint_gemma"):
        module.follow(Recipe.of(posttrain=StageOptions(LossWeights(location=1.0))))


@pytest.mark.parametrize(("metric", "is_known"), [("gripper_accuracy", False), ("action_mae", True)])
def test_either_mode_may_be_the_best_of_an_own_heads_metric(
    metric: str, is_known: bool, train: Callable[..., Trainer], tmp_path: Path
) -> None:
    best = RunCheckpoint(tmp_path / "best", monitor=f"val/robot/continuous_robot_actions/{metric}", mode="max")
    with pytest.raises(ValueError, match="less is better, and its mode is max") if is_known else nullcontext():
        train(best, stages=WITH_GRIPPER, module_options=OPTIONS, limit_val_batches=1)
    assert best.best_model_score is None if is_known else 0 <= best.best_model_score <= 1


def test_two_heads_with_one_term_are_refused() -> None:
    with pytest.raises(ValueError, match="two heads have the loss gripper"):
        Pi05Module(ModelConfig.preset("debug"), heads={"gripper": GripperHead, "other": GripperHead})


@pytest.mark.parametrize(
    ("size", "name"), [("debug", "flow"), ("tiny", "location"), ("debug", "values"), ("debug", "my.head")]
)
def test_name_that_a_head_cannot_have_is_refused(size: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.heads\.{name}: .*: give (yours|the head) another"):
        Pi05.without_memory(ModelConfig.preset(size), {name: GripperHead})


@pytest.mark.slow
def test_own_head_is_one_line_of_yaml(videos: Path, tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "model": {
            "config": ModelConfig.preset("debug").to_dict(),
            "heads": {"gripper": {"class_path": f"{__name__}.GripperHead", "init_args": {"width": 4}}},
        },
        "data": {
            "sources": {
                "robot": {
                    "class_path": "pi05_lightning.data.sources.lerobot.LeRobotConfig",
                    "init_args": {"path": str(videos), "val_fraction": 0.2},
                }
            },
            "batch_size": 4,
            "num_workers": 0,
        },
        "stages": {
            "pretrain_steps": 0,
            "posttrain_steps": 2,
            "posttrain": {
                "losses": {"subtask": 0, "flow": 1, "others": {"gripper": 0.5}},
                "mixture": {"robot/continuous_robot_actions": 1.0},
            },
        },
        "trainer": {"accelerator": "cpu", "limit_val_batches": 1, "enable_progress_bar": False},
    }
    config, run = tmp_path / "own.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(content))
    main(["fit", "-c", str(config), "--run", str(run)])
    main(["fit", "--ckpt_path", str(run), "--stages.posttrain_steps", "3"])
    assert any("auxiliary.gripper" in name for name in weights(run / "checkpoints" / "last.ckpt"))
