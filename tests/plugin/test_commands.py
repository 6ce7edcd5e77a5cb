"""LeRobot's own commands, as processes that find the plugin as an installed distribution."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pi05_lightning import Pi05Policy
from pi05_lightning.sim.environment import View
from pi05_lightning.sim.lerobot_env import LeRobotEnv, LeRobotEnvironment

from .lerobot_env_plain import STEPS

ROOT = Path(__file__).parents[2]
SEED, EPISODES = 7, 2


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH: the plugin as pip installs it, and LeRobot's plugin with the environment."""
    folder = tmp_path_factory.mktemp("installed")
    plugin = ROOT / "plugins" / "lerobot_policy_pi05_lightning"
    source = shutil.copytree(plugin, folder / "source", ignore=shutil.ignore_patterns("*.egg-info", "build"))
    command = [sys.executable, "-m", "uv", "pip", "install", "--no-deps", "--target", folder / "site", source]
    subprocess.run(command, check=True, capture_output=True)
    shutil.copy(Path(__file__).with_name("lerobot_env_plain.py"), folder / "site")
    metadata = folder / "site" / "lerobot_env_plain-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: lerobot_env_plain\nVersion: 1.0\n")
    return folder / "site"


def lerobot(installed: Path, command: str, *arguments: str) -> str:
    """What a command of LeRobot's says."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (installed, ROOT))), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-m", f"lerobot.scripts.lerobot_{command}", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "last" / "pretrained_model"


def predict(policy: Pi05Policy, environment: LeRobotEnvironment) -> np.ndarray:
    frame = environment.observation()
    return policy.predict({"image": frame.images, "state": frame.state, "task": frame.task})


def rewards(policy: Pi05Policy, seed: int) -> list[float]:
    """Of an episode of the environment that this package's own rollouts open."""
    env, config = LeRobotEnv("plain").make("plain")
    view = View(policy.inputs.cameras, 28, 10.0)
    environment = LeRobotEnvironment(env, config, view, {})
    environment.reset(seed)
    policy.reset()
    for _ in range(STEPS):
        if environment.ended or environment.step(predict(policy, environment)):
            break
    return env.unwrapped.rewards


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_both_stages_are_trained_resumed_and_evaluated_by_stock_commands(
    installed: Path, videos: Path, fast: Path, tmp_path: Path
) -> None:
    data = ("--dataset.repo_id=pi05/recorded", f"--dataset.root={videos}", "--num_workers=0")
    options = (*data, "--batch_size=8", "--policy.push_to_hub=false", "--policy.device=cpu", "--log_freq=1")
    new = ("--policy.type=pi05_lightning", "--policy.preset=debug", "--policy.stage=pretrain", f"--policy.fast={fast}")
    said = lerobot(installed, "train", *new, *options, f"--output_dir={tmp_path / 'one'}", "--steps=2")
    assert {"loss_subtask:", "loss_fast:"} <= {word for word in said.replace(":", ": ").split() if "loss_" in word}

    first = checkpoint(tmp_path / "one")
    then = (f"--policy.path={first}", "--policy.stage=posttrain", f"--output_dir={tmp_path / 'two'}", "--steps=2")
    assert "loss_flow:" in lerobot(installed, "train", *then, *options)
    second = checkpoint(tmp_path / "two")
    lerobot(installed, "train", f"--config_path={second / 'train_config.json'}", "--resume=true", "--steps=3")
    assert json.loads((second / "trained.json").read_text())["stages"] == {"pretrain": 2, "posttrain": 3}

    acting = ("--policy.acting.max_state_distance=null", "--policy.acting.execution_horizon=2")
    where = ("--env.type=plain", f"--eval.n_episodes={EPISODES}", "--eval.batch_size=2", f"--seed={SEED}")
    out = tmp_path / "eval"
    lerobot(installed, "eval", f"--policy.path={second}", "--policy.device=cpu", *acting, *where, f"--output_dir={out}")
    policy = Pi05Policy(second, max_state_distance=None, execution_horizon=2)
    expected = [rewards(policy, SEED + episode) for episode in range(EPISODES)]
    info = json.loads((out / "eval_info.json").read_text())
    found = info["per_task"][0]["metrics"]
    np.testing.assert_allclose(found["sum_rewards"], [sum(each) for each in expected], rtol=1e-3)
    assert found["successes"] == [max(each) > 4 for each in expected]
