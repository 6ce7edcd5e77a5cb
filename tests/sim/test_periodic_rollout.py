"""Rollouts during training: what they log, what they cost, and that training does not notice them."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pi05_lightning import Pi05DataModule, Pi05Module, StageSwitch
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import LossWeights, StageOptions
from pi05_lightning.sim.environment import NoSuchEnvironment
from pi05_lightning.sim.simulators import LeRobotEnv, MetaWorld
from pi05_lightning.sim.trials import FilmFrame, Result, Trial
from pi05_lightning.training.callbacks.checkpoint import RunCheckpoint
from pi05_lightning.training.callbacks.ema import WeightAverage
from pi05_lightning.training.callbacks.interrupt import InterruptBetweenSteps, Stopped
from pi05_lightning.training.callbacks.restart import Restart
from pi05_lightning.training.callbacks.rollout import PeriodicRollout
from pi05_lightning.weights.abilities import ADVANTAGE, Trained
from tests.quiet_trainer import quiet_trainer
from tests.random_fast import random_fast

STAGES = {
    "pretrain": StageOptions(LossWeights(subtask=1), {"robot/hl_subtask": 1.0}),
    "posttrain": StageOptions(LossWeights(subtask=1, flow=1), {"robot/continuous_robot_actions": 1.0}),
}


def train(collected: Path, folder: Path, *callbacks, steps=(1, 3), ckpt_path: Path | None = None) -> Trainer:
    seed_everything(0)
    switch, logger = StageSwitch(*steps, **STAGES), TensorBoardLogger(folder, name="", version="")
    trainer = quiet_trainer(switch, *callbacks, logger=logger, default_root_dir=folder)
    module = Pi05Module(ModelConfig.preset("debug"), lambda groups: torch.optim.AdamW(groups, lr=1e-3))
    data = Pi05DataModule({"robot": LeRobotConfig(str(collected / "robot"))}, batch_size=4, num_workers=0)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def rollout(**changes) -> PeriodicRollout:
    """The state is asked for once: what so short a training makes of it is soon outside the data, and refused."""
    small = {"every_n_steps": 2, "tasks": ["reach-v3"], "episodes": 2, "max_seconds": 0.3, "execution_horizon": 4}
    return PeriodicRollout(**small | changes)


@pytest.fixture(scope="module")
def run(collected, tmp_path_factory) -> tuple[Trainer, Path]:
    folder = tmp_path_factory.mktemp("run")
    return train(collected, folder, rollout(every_n_steps=1)), folder


@pytest.fixture(scope="module")
def events(run) -> EventAccumulator:
    accumulator = EventAccumulator(str(run[1]))
    accumulator.Reload()
    return accumulator


def test_success_and_cost_are_logged_at_every_step_that_is_due_once_actions_train(events):
    for tag in ("rollout/success", "rollout/success_of/reach-v3", "rollout/seconds"):
        assert [event.step for event in events.Scalars(tag)] == [2, 3, 4]
    assert all(event.value > 0 for event in events.Scalars("rollout/seconds"))


def test_no_scalar_has_the_name_of_a_folder_of_others(events):
    """MLflow keeps `a/b` in a file, and `a/b/c` in a folder of this name."""
    tags = events.Tags()["scalars"]
    assert {"stage", "rollout/success"} <= set(tags)
    assert not [(tag, other) for tag in tags for other in tags if other.startswith(f"{tag}/")]


def test_tensorboard_gets_a_film_that_moves(events):
    image = events.Images("rollout/reach-v3")[0].encoded_image_string
    assert image.startswith(b"GIF89a")
    assert image.count(b"\x21\xf9\x04") == 3  # graphic control extensions: one per frame


def test_run_gets_a_film_of_every_rollout(run):
    films = sorted((run[1] / "rollouts").glob("*.mp4"))
    assert [film.name for film in films] == [f"step-{step:08d}.mp4" for step in (2, 3, 4)]
    with av.open(str(films[0])) as film:
        assert sum(1 for _ in film.decode(video=0)) == 3 + 10  # and a second of the last frame


def test_training_is_the_same_with_and_without_rollouts(run, collected, tmp_path):
    without = train(collected, tmp_path)
    weights = run[0].lightning_module.state_dict()
    for name, tensor in without.lightning_module.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)


def test_module_is_left_in_training_mode(run):
    assert all(part.training for part in run[0].lightning_module.model.modules())


def test_policy_has_the_averaged_weights_and_training_keeps_its_own(collected, tmp_path, monkeypatch):
    seen = []
    original = PeriodicRollout.run

    def look(self, policy, between):
        seen.append([p.detach().clone() for p in policy.model.parameters()])
        return original(self, policy, between)

    monkeypatch.setattr(PeriodicRollout, "run", look)
    average = WeightAverage(decay=0.9)
    trainer = train(collected, tmp_path, average, rollout(every_n_steps=3), steps=(0, 3))
    for (name, own), used in zip(trainer.lightning_module.model.named_parameters(), seen[0], strict=True):
        torch.testing.assert_close(used, average.average[name])
        assert own.requires_grad
    owned = trainer.lightning_module.model.parameters()
    assert any(not torch.equal(own, used) for own, used in zip(owned, seen[0], strict=True))


def test_policy_that_learned_to_follow_an_advantage_is_told_one(collected, tmp_path, monkeypatch):
    film = [FilmFrame(np.zeros((32, 64, 3), np.uint8), caption="")]
    told, result = [], Result(Trial("policy", "reach-v3", 0), fps=10.0, film=film)
    monkeypatch.setattr(
        PeriodicRollout, "run", lambda self, policy, between: told.append(policy.advantage) or {"reach-v3": [result]}
    )
    train(collected, tmp_path, rollout(every_n_steps=1), steps=(0, 1))
    record = Trained(terms={"flow": 1, ADVANTAGE: 1}, complete=True)
    monkeypatch.setattr(Pi05Module, "trained", property(lambda _: record))
    train(collected, tmp_path, rollout(every_n_steps=1), steps=(0, 1))
    assert told == [None, "positive"]


@pytest.mark.parametrize("lacks", [False, True])
def test_rollout_that_ends_before_its_first_action_has_no_film_and_want_of_memory_is_no_failure(
    tmp_path, monkeypatch, caplog, lacks
):
    results = [Result(Trial("policy", "reach-v3", n), reason="the policy raised", lacked_memory=lacks) for n in (0, 1)]
    results[1].success = not lacks
    monkeypatch.setattr(PeriodicRollout, "run", lambda *_: {"reach-v3": results})
    monkeypatch.setattr(PeriodicRollout, "_policy", lambda *_: nullcontext())
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = SimpleNamespace(loggers=[logger], global_step=2, default_root_dir=tmp_path)
    rollout()._roll_out_on_one_rank(trainer, None, None)
    logger.finalize("")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"] if "success" in tag} == (
        {} if lacks else {"rollout/success": 0.5, "rollout/success_of/reach-v3": 0.5}
    )
    assert events.Scalars("rollout/seconds")
    assert not (tmp_path / "rollouts").exists()
    assert ("memory ran out" in caplog.text) == lacks


def test_two_of_them_need_names_and_keep_apart_what_they_log_and_film(collected, tmp_path):
    with pytest.raises(ValueError, match="2 PeriodicRollout log as `rollout`: give all but one a `name`"):
        train(collected, tmp_path, rollout(), rollout(mode="flat"))
    train(collected, tmp_path, rollout(), rollout(seed=1, name="other"), steps=(0, 2))
    films = {film.relative_to(tmp_path).as_posix() for film in tmp_path.glob("rollouts/**/*.mp4")}
    assert films == {"rollouts/step-00000002.mp4", "rollouts/other/step-00000002.mp4"}
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert {"rollout/success", "rollout_other/success"} <= set(accumulator.Tags()["scalars"])


def train_on_fast(collected: Path, folder: Path, *callbacks) -> Trainer:
    """One step of each stage: FAST tokens, then flow."""
    sizes = ModelConfig.preset("debug")
    random_fast(sizes, dims=4).save(folder / "fast")
    stages = {"pretrain": StageOptions(LossWeights(fast=1)), "posttrain": StageOptions(LossWeights(flow=1))}
    trainer = quiet_trainer(StageSwitch(1, 1, **stages), *callbacks, default_root_dir=folder)
    sources = {"robot": LeRobotConfig(str(collected / "robot"))}
    trainer.fit(Pi05Module(sizes), Pi05DataModule(sources, batch_size=2, num_workers=0, fast=folder / "fast"))
    return trainer


@pytest.mark.slow_cases
@pytest.mark.parametrize(("actions", "step"), [("fast", 1), ("flow", 2)])
def test_rollouts_run_while_their_kind_of_actions_trains(collected, tmp_path, actions, step):
    train_on_fast(collected, tmp_path, rollout(every_n_steps=1, episodes=1, actions=actions))
    assert [film.name for film in (tmp_path / "rollouts").glob("*.mp4")] == [f"step-{step:08d}.mp4"]


def test_rollout_of_fast_tokens_that_the_data_has_not_is_refused_at_the_start(collected, tmp_path):
    with pytest.raises(ValueError, match="no FAST tokenizer"):
        train(collected, tmp_path, rollout(every_n_steps=1000, actions="fast"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["reach-v3", "reach-v2"]}, "no task 'reach-v2'"),
        ({"env": LeRobotEnv("aloha")}, r"pip install 'lerobot\[aloha\]'"),
        ({"env": LeRobotEnv("metaworld")}, "policy wants"),
    ],
)
def test_what_the_simulator_lacks_shows_before_training(collected, tmp_path, options, message):
    with pytest.raises(NoSuchEnvironment, match=message):
        train(collected, tmp_path, rollout(**options, every_n_steps=1000))


class Clumsy(MetaWorld):
    """Takes fewer action dims than the policy was trained to give."""

    def open(self, task, view):
        env = super().open(task, view)
        env.action_low = env.action_low[:3]
        return env


def test_a_policy_that_cannot_act_in_the_simulator_ends_the_run_before_training(collected, tmp_path):
    with pytest.raises(ValueError, match=r"PeriodicRollout: .*reach-v3: the policy's chunk has the shape .* not"):
        train(collected, tmp_path, rollout(env=Clumsy(), every_n_steps=1000))


def test_a_time_limit_that_leaves_no_time_is_refused_before_training(collected, tmp_path):
    with pytest.raises(ValueError, match="max_seconds is -1: it must be above 0"):
        train(collected, tmp_path, rollout(max_seconds=-1, every_n_steps=1000))


class AsksToStop(Callback):
    """SIGTERM in the step that a rollout follows."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_asked_to_stop_does_not_wait_for_a_rollout_and_makes_it_up(collected, tmp_path):
    saved = RunCheckpoint(save_last=True, every_n_train_steps=100, save_on_exception=True)
    callbacks = [AsksToStop(), rollout(every_n_steps=2), InterruptBetweenSteps(), saved]
    with pytest.raises(Stopped):
        train(collected, tmp_path, *callbacks)
    assert not (tmp_path / "rollouts").exists()
    last = tmp_path / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    assert state["global_step"] == 2
    train(collected, tmp_path, rollout(every_n_steps=2), ckpt_path=last)
    assert [film.name for film in sorted((tmp_path / "rollouts").glob("*.mp4"))] == [
        f"step-{step:08d}.mp4" for step in (2, 4)
    ]


def test_resumed_run_has_no_film_of_steps_that_it_takes_anew(collected, tmp_path):
    (tmp_path / "rollouts").mkdir()
    for step in (0, 7):
        (tmp_path / "rollouts" / f"step-{step:08d}.mp4").touch()
    train(collected, tmp_path, rollout(every_n_steps=1000))
    assert [film.name for film in (tmp_path / "rollouts").iterdir()] == ["step-00000000.mp4"]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(0, 2), (0, 3)], ids=["at the last step", "before it"])
def test_rollout_that_was_broken_off_is_run_again_when_the_run_goes_on(collected, tmp_path, monkeypatch, steps):
    def crash(self, policy, between):
        raise OSError("the simulator is gone")

    def callbacks():
        return rollout(episodes=1), WeightAverage(0.9), Restart(), RunCheckpoint(save_last=True, save_on_exception=True)

    original = PeriodicRollout.run
    monkeypatch.setattr(PeriodicRollout, "run", crash)
    with pytest.raises(OSError, match="gone"):
        train(collected, tmp_path / "run", *callbacks(), steps=steps)
    monkeypatch.setattr(PeriodicRollout, "run", original)
    assert not (tmp_path / "run" / "rollouts").exists()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    for _ in range(2):  # the second time there is nothing to make up
        train(collected, tmp_path / "run", *callbacks(), steps=steps, ckpt_path=last)
        assert [film.name for film in (tmp_path / "run" / "rollouts").glob("*.mp4")] == ["step-00000002.mp4"]
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("rollout/success")] == [2]
    whole = train(collected, tmp_path / "whole", *callbacks(), steps=steps)
    stored = torch.load(last, weights_only=True)["ema"]
    assert all(torch.equal(stored[name], average) for name, average in whole.lightning_module.average.items())


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"episodes": 0}])
def test_rollout_that_never_happens_is_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        rollout(**wrong)
