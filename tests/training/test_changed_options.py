"""A run that is resumed with other options: each is used from the first step on, or refused before it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from pi05_lightning import Pi05DataModule, Pi05Module
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.parallelize import Lora
from pi05_lightning.recipe import LossWeights, Stage, StageOptions
from pi05_lightning.training.callbacks.ema import WeightAverage
from pi05_lightning.weights.resumed import changed_options
from pi05_lightning.weights.sharded_checkpoint import read_into
from tests.both_stages import STAGES

from .test_own_head import GripperHead

Train = Callable[..., Trainer]
DONE = 4  # steps; the second of the second stage is next
HALF = 0.1 + 0.9 * 0.75  # what the cosine is after one of three steps
FLOW = LossWeights(subtask=1, flow=1), {"robot/continuous_robot_actions": 1.0}


class FirstStep(Callback):
    """The optimizer as it is when the first step of a fit begins, by name of the parameter."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not hasattr(self, "step"):
            optimizer, self.step = trainer.optimizers[0], trainer.global_step
            names = {parameter: name for name, parameter in pl_module.model.named_parameters()}
            pairs = [(names[p], group) for group in optimizer.param_groups for p in group["params"]]
            self.options = {name: {k: v for k, v in g.items() if k != "params"} for name, g in pairs}
            self.state = {names[p]: copy.deepcopy(state) for p, state in optimizer.state.items()}
            self.weights = copy.deepcopy(pl_module.model.state_dict())


def adamw(**options: Any) -> Any:
    return partial(torch.optim.AdamW, **({"lr": 1e-3} | options))


def posttrain(**options: Any) -> dict[str, StageOptions]:
    return {**STAGES, "posttrain": StageOptions(*FLOW, **options)}


@pytest.fixture
def resume(train: Train, tmp_path: Path) -> Callable[..., FirstStep]:
    """Train `DONE` steps, then begin the next one with other options."""

    def run(*callbacks: Callback, first: dict[str, Any] | None = None, **options: Any) -> FirstStep:
        train(*callbacks, **({"max_steps": DONE} | (first or {})))
        seen = FirstStep()
        train(seen, *copy.deepcopy(callbacks), ckpt_path=tmp_path / f"step={DONE}.ckpt", **options)
        return seen

    return run


def saved_state(folder: Path, name: str) -> dict[str, Any]:
    """A parameter's saved state of the optimizer."""
    saved = torch.load(folder / f"step={DONE}.ckpt", weights_only=True)["optimizer_states"][0]
    numbers = {
        n: i for group in saved["param_groups"] for n, i in zip(group["param_names"], group["params"], strict=True)
    }
    return saved["state"].get(numbers[name], {})


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (adamw(lr=5e-4), {"lr": 5e-4 * HALF, "initial_lr": 5e-4}),
        (adamw(weight_decay=0.5), {"lr": 1e-3 * HALF, "weight_decay": 0.5}),
        (adamw(betas=(0.5, 0.6), eps=1e-5), {"betas": (0.5, 0.6), "eps": 1e-5}),
    ],
)
def test_changed_rate_decay_and_moments_count_from_the_first_step_on(
    resume: Callable[..., FirstStep], tmp_path: Path, optimizer: Any, expected: dict[str, Any]
) -> None:
    seen, name = resume(module_options={"optimizer": optimizer}), "flow_head.action_in_proj.weight"
    assert seen.step == DONE
    assert all(seen.options[name][key] == pytest.approx(value) for key, value in expected.items())
    for key, value in saved_state(tmp_path, name).items():
        assert torch.equal(seen.state[name][key], value), key


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"lr_factors": {"flow_head": 0.1}}, 0.1 * HALF),
        ({"final_lr_factor": 1.0}, 1.0),
        ({"warmup_steps": 2}, 1.0),
        ({"freeze": ("flow_head",)}, 0.0),
    ],
)
def test_a_stages_changed_rates_and_freezing_count_from_the_first_step_on(
    resume: Callable[..., FirstStep], tmp_path: Path, options: dict[str, Any], factor: float
) -> None:
    seen, name = resume(stages=posttrain(**options)), "flow_head.action_in_proj.weight"
    assert seen.options[name]["lr"] == pytest.approx(1e-3 * factor)
    saved = torch.load(tmp_path / f"step={DONE}.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"model.{n}"], value) for n, value in seen.weights.items())
    assert seen.state.keys() >= {name}
    assert all(
        torch.equal(state[key], value)
        for n, state in seen.state.items()
        for key, value in saved_state(tmp_path, n).items()
    )


def test_what_is_no_longer_frozen_is_trained_with_a_state_that_begins_empty(
    resume: Callable[..., FirstStep], train: Train, tmp_path: Path
) -> None:
    frozen = {"stages": {name: replace(stage, freeze=("vision",)) for name, stage in STAGES.items()}}
    seen, name = resume(first=frozen | {"max_steps": DONE}), "backbone.vision.patch_embedding.weight"
    assert name not in seen.state
    assert seen.options[name]["lr"] == pytest.approx(1e-3 * HALF)
    before, after = (torch.load(tmp_path / f"step={n}.ckpt", weights_only=True)["state_dict"] for n in (DONE, 6))
    assert not torch.equal(before[f"model.{name}"], after[f"model.{name}"])


def test_a_stage_can_be_added_to_a_run(resume: Callable[..., FirstStep], tmp_path: Path) -> None:
    third = Stage(losses=LossWeights(flow=1.0), mixture=FLOW[1], name="third", steps=2, lr_factors={"flow_head": 0.1})
    seen = resume(stages={**STAGES, "then": [third]})
    assert len(seen.options["flow_head.action_in_proj.weight"]["lr_factors"]) == 3
    assert torch.load(tmp_path / "step=8.ckpt", weights_only=True)["pi05"]["trained"]["stages"]["third"] == 2


def test_fewer_steps_than_the_checkpoint_has_are_refused(resume: Callable[..., FirstStep]) -> None:
    with pytest.raises(ValueError, match=f"saved after {DONE} steps, and the run shall have 2"):
        resume(max_steps=2)


def test_a_complete_run_is_said_to_be_complete(
    resume: Callable[..., FirstStep], caplog: pytest.LogCaptureFixture
) -> None:
    resume(max_steps=DONE)
    assert f"the run is complete after {DONE} steps" in caplog.text


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"optimizer": partial(torch.optim.SGD, lr=1e-3)},
            "model.optimizer is torch.optim.sgd.SGD, and torch.optim.adamw",
        ),
        ({"optimizer": adamw(amsgrad=True)}, "model.optimizer has options now that need max_exp_avg_sq"),
        ({"lora": Lora(rank=2)}, "model.lora is {'rank': 2.* and None in the checkpoint"),
        ({"heads": {"gripper": GripperHead}}, "model.heads differs: auxiliary.gripper.* and absent in the checkpoint"),
        ({"config": replace(ModelConfig.preset("debug"), action_dim=7)}, "model.config.action_dim is 7, and "),
    ],
)
def test_another_optimizer_and_another_model_are_refused(
    resume: Callable[..., FirstStep], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named) as refused:
        resume(module_options=options)
    assert "begin a new run from these weights" in str(refused.value)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("lora", "named"),
    [
        (Lora(rank=4), "model.lora.rank is 4, and 2 in the checkpoint"),
        (Lora(rank=2, alpha=8), "model.lora.alpha is 8, and 16 in the checkpoint"),
        (Lora(rank=2, targets="q_proj"), "model.lora.targets is 'q_proj', and '' in the checkpoint"),
        (None, "model.lora is None, and {'rank': 2"),
    ],
)
def test_other_adapters_are_refused(resume: Callable[..., FirstStep], lora: Lora | None, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        resume(first={"module_options": {"lora": Lora(rank=2)}, "max_steps": DONE}, module_options={"lora": lora})


def test_another_dropout_of_adapters_goes_on(resume: Callable[..., FirstStep]) -> None:
    options = [{"module_options": {"lora": Lora(rank=2, dropout=dropout)}} for dropout in (0.0, 0.5)]
    assert resume(first=options[0] | {"max_steps": DONE}, **options[1]).step == DONE


@pytest.mark.slow_cases
@pytest.mark.parametrize(("before", "after"), [(None, 0.9), (0.9, None), (0.9, 0.5)])
def test_an_average_can_be_switched_on_off_and_changed(
    train: Train, tmp_path: Path, before: float | None, after: float | None
) -> None:
    train(WeightAverage(before), max_steps=DONE)
    train(WeightAverage(after), ckpt_path=tmp_path / f"step={DONE}.ckpt", max_steps=DONE + 1)
    old, new = (torch.load(tmp_path / f"step={n}.ckpt", weights_only=True) for n in (DONE, DONE + 1))
    assert ("ema" in old, "ema" in new) == (before is not None, after is not None)
    if after is not None:
        name = "flow_head.action_in_proj.weight"
        start = old["ema"][name] if before else old["state_dict"][f"model.{name}"]
        kept = min(after, 2 / 11)  # the second step of its stage
        expected = start * kept + new["state_dict"][f"model.{name}"] * (1 - kept)
        torch.testing.assert_close(new["ema"][name], expected)


class Restored(Callback):
    """The trainer's callbacks when training begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.callbacks = copy.copy(trainer.callbacks)


def test_an_argument_of_a_callback_is_todays_and_what_it_counted_is_the_checkpoints(
    train: Train, tmp_path: Path
) -> None:
    class Counts(Callback):
        def __init__(self, counted: int = 0) -> None:
            self.counted = counted

        def on_train_batch_end(self, *args: Any) -> None:
            self.counted += 1

        def state_dict(self) -> dict[str, Any]:
            return {"counted": self.counted}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.counted = state_dict["counted"]

    def stopping(patience: int) -> EarlyStopping:
        return EarlyStopping("loss", patience=patience, check_on_train_epoch_end=False)

    counts = Counts()
    train(stopping(3), Counts(), max_steps=DONE)
    train(stopping(7), counts, restored := Restored(), ckpt_path=tmp_path / f"step={DONE}.ckpt", max_steps=DONE + 1)
    assert [c.patience for c in restored.callbacks if isinstance(c, EarlyStopping)] == [7]
    assert counts.counted == DONE + 1


def test_best_checkpoints_are_known_after_another_interval_and_no_more_than_save_top_k(
    train: Train, tmp_path: Path
) -> None:
    def best(**options: Any) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "best", "{step}", monitor="loss", **options)

    first, second = best(save_top_k=3, every_n_train_steps=1), best(save_top_k=1, every_n_train_steps=5)
    train(first, max_steps=DONE, log_every_n_steps=1)
    assert len(first.best_k_models) == 3
    with_best = torch.load(tmp_path / f"step={DONE}.ckpt", weights_only=True)["callbacks"]
    known = next(s["best_k_models"] for key, s in with_best.items() if "'loss'" in key)
    train(second, ckpt_path=tmp_path / f"step={DONE}.ckpt", max_steps=DONE + 1, log_every_n_steps=1)
    assert len(second.best_k_models) == 1
    assert float(second.best_model_score) <= min(map(float, known.values()))


def test_an_older_checkpoint_without_names_goes_on_with_the_same_groups_alone(train: Train, tmp_path: Path) -> None:
    train(max_steps=DONE)
    file = tmp_path / f"step={DONE}.ckpt"
    content = torch.load(file, weights_only=True)
    for group in content["optimizer_states"][0]["param_groups"]:
        del group["param_names"], group["made_with"]
    del content["pi05"]["callbacks"], content["pi05"]["init_from"]
    torch.save(content, tmp_path / "old.ckpt")
    evaluated = Pi05Module(ModelConfig.preset("debug"))
    evaluated.configure_model()
    read_into(evaluated.model, tmp_path / "old.ckpt", averaged=True)  # as `pi05 validate` does
    seen = FirstStep()
    train(seen, ckpt_path=tmp_path / "old.ckpt", module_options={"optimizer": adamw(lr=5e-4)})
    assert {group["lr"] for group in seen.options.values()} == {5e-4 * HALF}
    with pytest.raises(ValueError, match=r"is torch.optim.sgd.SGD, and one with .*betas.* in the checkpoint"):
        train(ckpt_path=tmp_path / "old.ckpt", module_options={"optimizer": partial(torch.optim.SGD, lr=1e-3)})
    with pytest.raises(ValueError, match="the checkpoint is older than the names"):
        train(ckpt_path=tmp_path / "old.ckpt", stages=posttrain(lr_factors={"flow_head": 0.1}))


def test_weights_alone_are_refused_with_what_to_do(train: Train, tmp_path: Path) -> None:
    alone = ModelCheckpoint(tmp_path / "alone", "{step}", every_n_train_steps=DONE, save_weights_only=True)
    train(alone, max_steps=DONE)
    with pytest.raises(ValueError, match="holds weights alone"):
        train(ckpt_path=tmp_path / "alone" / f"step={DONE}.ckpt")


def test_an_optimizer_that_keeps_its_progress_in_its_groups_goes_on_from_there(train: Train, tmp_path: Path) -> None:
    class Counting(torch.optim.SGD):
        """As Prodigy and schedule-free optimizers do."""

        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, lr)
            for group in self.param_groups:
                group["k"] = 0

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["k"] += 1
            return super().step(closure)

    seen, options = FirstStep(), {"optimizer": partial(Counting, lr=1e-3)}
    train(max_steps=DONE, module_options=options)
    train(seen, ckpt_path=tmp_path / f"step={DONE}.ckpt", module_options={"optimizer": partial(Counting, lr=1e-4)})
    assert {(g["k"], g["initial_lr"]) for g in seen.options.values()} == {(DONE, 1e-4)}


def test_trained_weights_are_measured_on_other_data_with_the_statistics_that_they_were_trained_with(
    train: Train, videos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = train(max_steps=1).lightning_module
    other = LeRobotConfig(path=str(videos), val_fraction=0.9)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", **quiet).validate(
        module, data := Pi05DataModule({"robot": other}, batch_size=4, num_workers=0), verbose=False
    )
    trained, own = (p.robots["robot"].normalize.action.q99[1] for p in (data.processor, data.own_processor))
    assert trained != own
    assert f"(checkpoint 0 and {trained:.7g})" in caplog.text


def test_weights_to_begin_with_are_said_to_be_left_out_of_a_resumed_run(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(max_steps=DONE)
    file = tmp_path / f"step={DONE}.ckpt"
    train(ckpt_path=file, max_steps=DONE + 1, module_options={"init_from": str(file)})
    assert "is not used: the weights are the checkpoint's" in caplog.text


def test_options_that_one_configuration_alone_has_are_told_as_absent_from_the_other() -> None:
    then = "{mixture: {web: 0.5, robot: 0.5}, lr_factors: {vision: 0.1}, lr: 1.0, decay: 0.9, old: null}"
    now = "{mixture: {robot: 0.5}, lr_factors: {}, lr: 1.0, decay: null, seed: 0, new: null}"
    assert sorted(changed_options(then, now)) == [
        "decay: 0.9 → None",
        "lr_factors.vision: 0.1 → absent",
        "mixture.web: 0.5 → absent",
        "seed: absent → 0",
    ]
