from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pi05_lightning import Pi05Policy
from pi05_lightning.sim.available_modes import demonstrations_of, modes_of
from pi05_lightning.sim.baselines import Demonstrations, check_replay, mean_trajectory
from pi05_lightning.sim.simulators import MetaWorld


def of(folder, *keys):
    return Demonstrations(str(folder), keys or ("action",))


def test_mean_trajectory_averages_the_training_episodes_that_last_that_long(collected):
    rows = pq.read_table(collected / "robot" / "data").to_pandas()
    episodes = [group["action"].tolist() for number, group in rows.groupby("episode_index") if 3 <= number < 6]
    expected = []
    for step in range(max(map(len, episodes))):
        expected.append(np.mean([episode[step] for episode in episodes if len(episode) > step], axis=0))
    np.testing.assert_allclose(mean_trajectory(of(collected / "robot"), "open the drawer"), expected, atol=1e-6)


def test_task_that_begins_in_mid_episode_begins_at_once_and_a_gap_holds_what_was_before(collected, tmp_path):
    folder = shutil.copytree(collected / "robot", tmp_path / "robot")
    for file in sorted((folder / "data").rglob("*.parquet")):
        rows = pq.read_table(file)
        pq.write_table(rows.filter((pc.field("frame_index") >= 2) & (pc.field("frame_index") != 4)), file)
    whole = mean_trajectory(of(collected / "robot"), "open the drawer")
    found = mean_trajectory(of(folder), "open the drawer")
    np.testing.assert_array_equal(found[[0, 1, 3]], whole[[2, 3, 5]])
    np.testing.assert_array_equal(found[2], found[1])


def test_task_that_was_not_demonstrated_is_named(collected):
    with pytest.raises(ValueError, match=r"no task 'juggle': it has 'reach the red ball'"):
        mean_trajectory(of(collected / "robot"), "juggle")


def test_what_is_replayed_is_what_the_policy_calls_its_action(collected):
    whole = mean_trajectory(of(collected / "robot"), "open_the drawer ")  # as a prompt has it
    both = mean_trajectory(of(collected / "robot", "observation.state", "action"), "open the drawer")
    np.testing.assert_array_equal(both[:, -whole.shape[1] :], whole)
    assert both.shape[1] > whole.shape[1]


@pytest.mark.parametrize(
    ("keys", "fps", "tasks", "said"),
    [
        ((), 5.0, ["open the drawer"], "recorded at 10 frames per second, and the policy was trained at 5"),
        (("action.delta",), 10.0, ["open the drawer"], "has no action.delta, of which the policy's action is made"),
        ((), 10.0, ["open the drawer", "juggle"], "has no demonstration of juggle-v3"),
        (("observation.state", "action"), 10.0, ["open the drawer"], "has actions of 8 dims, and the policy 4"),
    ],
)
def test_what_cannot_be_replayed_is_said_before_anything_is(collected, keys, fps, tasks, said):
    sentences = {f"{task.split()[0]}-v3": (task,) for task in tasks}
    with pytest.raises(ValueError, match=said):
        check_replay(of(collected / "robot", *keys), SimpleNamespace(fps=fps, action_dim=4), sentences)
    check_replay(
        of(collected / "robot"),
        SimpleNamespace(fps=10.0, action_dim=4),
        {"open": ("open the drawer",), "told by it": ()},
    )


def test_demonstrations_from_the_hub_are_those_that_lerobot_has_here_and_the_hub_is_not_asked(
    collected, tmp_path, monkeypatch
):
    def asked(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("lerobot.datasets.utils.get_repo_versions", asked)
    monkeypatch.setattr("lerobot.utils.constants.HF_LEROBOT_HOME", tmp_path)
    monkeypatch.setattr("lerobot.utils.constants.HF_LEROBOT_HUB_CACHE", tmp_path / "hub")
    robot = SimpleNamespace(dataset="lab/demonstrations", action_keys=("action",))
    assert demonstrations_of(robot, None) is None
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "demonstrations").symlink_to(collected / "robot")
    found = of(tmp_path / "lab" / "demonstrations")
    assert demonstrations_of(robot, None) == found
    assert demonstrations_of(SimpleNamespace(dataset="", action_keys=("action",)), "lab/demonstrations") == found


def test_default_without_demonstrations_says_that_their_mode_is_left_out(untrained, caplog):
    assert "mean_replay" not in modes_of(Pi05Policy(untrained), MetaWorld(), ["reach-v3"], None, (), None)
    assert "the mode mean_replay is left out: the demonstrations are not here" in caplog.text
