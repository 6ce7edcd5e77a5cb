"""A policy that several robots taught acts as the one that is named, and as none that is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from pi05_lightning import Pi05DataModule, Pi05Module, Pi05Policy, StageSwitch
from pi05_lightning.cli.convert import convert
from pi05_lightning.cli.rollout import rollout
from pi05_lightning.cli.serve import serve
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.data.transforms import Normalize, Quantiles
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.training.callbacks.rollout import PeriodicRollout
from pi05_lightning.weights.folder import save
from pi05_lightning.weights.locate import locate
from tests.quiet_trainer import quiet_trainer
from tests.untrained import untrained_model

CONFIG = ModelConfig.preset("debug")
LISTED = r"several robots, arm, giant: name one of them as `robot`"
OBSERVATION = {"image": {"top": np.zeros((3, 32, 32), np.uint8)}, "state": np.zeros(3), "task": "open"}


@pytest.fixture(scope="module")
def two_robots(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported policy of two robots; the second one's actions are a hundred times the first one's."""
    sources = {"arm": LeRobotConfig(str(pictures)), "giant": LeRobotConfig(str(pictures))}
    processor = Pi05DataModule(sources, shapes=CONFIG.shapes).processor
    arm = processor.robots["arm"]
    action = Quantiles(100 * arm.normalize.action.q01, 100 * arm.normalize.action.q99)
    processor.robots["giant"] = replace(arm, normalize=Normalize(arm.normalize.state, action))
    folder = tmp_path_factory.mktemp("policies") / "two"
    save(folder, untrained_model(), processor)
    return folder


def test_robot_that_is_not_named_is_an_error_that_lists_them(two_robots: Path) -> None:
    with pytest.raises(ValueError, match=LISTED):
        Pi05Policy(two_robots)


def test_robot_that_there_is_not_is_an_error_that_lists_them(two_robots: Path) -> None:
    with pytest.raises(ValueError, match="robot: the policy cannot act as 'arms', only as arm, giant"):
        Pi05Policy(two_robots, robot="arms")


def test_policy_acts_in_the_units_of_the_robot_that_is_named(two_robots: Path) -> None:
    noise = np.random.default_rng(0).normal(size=(CONFIG.horizon, CONFIG.action_dim)).astype(np.float32)
    arm, giant = (Pi05Policy(two_robots, robot=name).predict_chunk(OBSERVATION, noise) for name in ("arm", "giant"))
    np.testing.assert_allclose(giant, 100 * arm, rtol=1e-4)


@pytest.mark.parametrize("command", [serve, rollout, convert, PeriodicRollout])
def test_robot_is_an_option_of_every_command(command) -> None:
    parser = ArgumentParser()
    if isinstance(command, type):
        parser.add_class_arguments(command)
    else:
        parser.add_function_arguments(command)
    assert parser.get_defaults()["robot"] is None


def test_served_and_rolled_out_policy_names_its_robot(two_robots: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=LISTED):
        serve(two_robots)
    with pytest.raises(ValueError, match=LISTED):
        rollout(two_robots, out=tmp_path)


def test_rollout_during_training_names_its_robot_before_the_first_step(pictures: Path, tmp_path: Path) -> None:
    sources = {"arm": LeRobotConfig(str(pictures)), "giant": LeRobotConfig(str(pictures))}
    trainer = quiet_trainer(StageSwitch(0, 1), PeriodicRollout(every_n_steps=1000), default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=LISTED):
        trainer.fit(Pi05Module(CONFIG), Pi05DataModule(sources, batch_size=2, num_workers=0))
    assert trainer.global_step == 0


def test_converted_policy_keeps_the_robot_that_is_named(two_robots: Path, tmp_path: Path) -> None:
    convert(source=two_robots, target=tmp_path / "both")
    convert(source=two_robots, target=tmp_path / "giant", robot="giant")
    assert locate(tmp_path / "both").abilities.robots == ("arm", "giant")
    assert locate(tmp_path / "giant").abilities.robots == ("giant",)
    assert Pi05Policy(tmp_path / "giant").robot == "giant"


def test_export_to_lerobot_names_its_robot(two_robots: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=LISTED):
        convert(source=two_robots, target=tmp_path / "out", format="lerobot", force=True)
    assert not (tmp_path / "out").exists()
