from __future__ import annotations

import shutil

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pi05_lightning.sim.baselines import mean_trajectory


def test_mean_trajectory_averages_the_training_episodes_that_last_that_long(collected):
    rows = pq.read_table(collected / "robot" / "data").to_pandas()
    episodes = [group["action"].tolist() for number, group in rows.groupby("episode_index") if 3 <= number < 6]
    expected = []
    for step in range(max(map(len, episodes))):
        expected.append(np.mean([episode[step] for episode in episodes if len(episode) > step], axis=0))
    np.testing.assert_allclose(mean_trajectory(collected / "robot", "open the drawer"), expected, atol=1e-6)


def test_task_that_begins_in_mid_episode_begins_at_once_and_a_gap_holds_what_was_before(collected, tmp_path):
    folder = shutil.copytree(collected / "robot", tmp_path / "robot")
    for file in sorted((folder / "data").rglob("*.parquet")):
        rows = pq.read_table(file)
        pq.write_table(rows.filter((pc.field("frame_index") >= 2) & (pc.field("frame_index") != 4)), file)
    whole = mean_trajectory(collected / "robot", "open the drawer")
    found = mean_trajectory(folder, "open the drawer")
    np.testing.assert_array_equal(found[[0, 1, 3]], whole[[2, 3, 5]])
    np.testing.assert_array_equal(found[2], found[1])


def test_task_that_was_not_demonstrated_is_named(collected):
    with pytest.raises(ValueError, match=r"no task 'juggle': it has 'reach the red ball'"):
        mean_trajectory(collected / "robot", "juggle")
