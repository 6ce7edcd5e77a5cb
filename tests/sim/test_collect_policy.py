"""A policy's own episodes as a dataset: whole with failures, told apart from what the expert corrected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest

from pi05_lightning.acting import Acting
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.policy import Pi05Policy
from pi05_lightning.sim.demonstrations import autonomous
from pi05_lightning.sim.demonstrations.collect import collect
from pi05_lightning.sim.demonstrations.config import CollectConfig
from pi05_lightning.sim.demonstrations.episodes import Episode, filmed
from pi05_lightning.sim.demonstrations.lerobot_writer import Recording, video_path, write_dataset
from pi05_lightning.sim.demonstrations.scenes import _FIRST_SCENE
from pi05_lightning.sim.metaworld.environment import MetaWorldEnvironment
from pi05_lightning.sim.rollout import Done, run_in_processes
from pi05_lightning.sim.splits import split_seeds
from pi05_lightning.sim.trials import OUT_OF_TIME, Trial
from pi05_lightning.weights.locate import locate
from tests.sim.walk import result_of

from .conftest import TASKS, config, interrupted_by

PATIENCE = 4
SHAPES = ModelConfig.preset("debug").shapes


@pytest.fixture(scope="module")
def attempts(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training episodes and a validation episode per task, in which the expert takes over, for a while."""
    small = {"episodes": 2, "val_episodes": 1, "max_seconds": 1.3, "lanes": 3}
    out = tmp_path_factory.mktemp("attempts") / "data"
    return collect(config(out, policy=untrained, corrections=PATIENCE, **small)) / "robot"


@pytest.fixture(scope="module")
def episodes(attempts: Path) -> list[dict]:
    return LeRobotFiles.open(attempts).episodes.to_pylist()


def frames(attempts: Path) -> dict[str, np.ndarray]:
    table = ds.dataset(attempts / "data").to_table().sort_by("index")
    return {name: np.array(table[name].to_pylist()) for name in ("episode_index", "intervention", "action")}


def test_successes_and_failures_are_recorded_with_the_reason_of_their_end(episodes: list[dict]) -> None:
    assert {(episode["success"], episode["end_reason"]) for episode in episodes} == {
        (True, "success"),
        (False, OUT_OF_TIME),
    }
    assert all(episode["length"] == 13 for episode in episodes if not episode["success"])


def test_splits_are_training_episodes_of_all_tasks_and_then_the_others(attempts: Path, episodes: list[dict]) -> None:
    assert LeRobotFiles.open(attempts).info["splits"] == {"train": "0:4", "val": "4:6"}
    assert [episode["tasks"] == episodes[0]["tasks"] for episode in episodes] == [True, True, False, False, True, False]


def test_initial_states_are_those_of_no_demonstration_and_no_rollout(episodes: list[dict]) -> None:
    seeds = {episode["seed"] for episode in episodes}
    assert len({(*episode["tasks"], episode["seed"]) for episode in episodes}) == len(episodes)
    taken = {seed for split in ("train", "val", "rollout") for seed in split_seeds(split, 400_000)}
    taken |= {*split_seeds("train", 200_000, start=_FIRST_SCENE)}
    assert seeds.isdisjoint(taken)


def test_expert_takes_over_after_actions_without_progress_until_the_end(attempts: Path, episodes: list[dict]) -> None:
    found = frames(attempts)
    for episode in episodes:
        acted = found["intervention"][found["episode_index"] == episode["episode_index"]]
        first = int(np.argmax(acted)) if acted.any() else len(acted)
        assert acted[first:].all()
        assert bool(acted.any()) == episode["corrected"]
        assert first >= PATIENCE
    assert any(episode["corrected"] and episode["success"] for episode in episodes)


def test_recorded_actions_bring_the_states_that_are_recorded(attempts: Path, episodes: list[dict]) -> None:
    table = ds.dataset(attempts / "data").to_table().sort_by("index")
    first = episodes[0]
    state = np.array(table["observation.state"].to_pylist())[: first["length"]]
    acted = frames(attempts)["intervention"][: first["length"]]
    with MetaWorldEnvironment(TASKS[0]) as env:
        env.reset(first["seed"])
        until = int(np.argmax(acted)) if acted.any() else len(acted)
        assert until
        for number, action in enumerate(frames(attempts)["action"][:until]):
            np.testing.assert_allclose(env.state, state[number], atol=1e-6)
            env.step(action)


def test_dataset_says_which_policy_acted_and_how(attempts: Path, untrained: Path) -> None:
    said = json.loads((attempts / "meta" / "pi05_collect.json").read_text())
    assert said["sha256"] == locate(untrained).content_hash()
    assert (said["corrections"], said["acting"]["num_steps"]) == (PATIENCE, Acting().num_steps)


def test_stock_lerobot_reads_it(attempts: Path, episodes: list[dict]) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    stock = LeRobotDataset("local/robot", root=attempts, video_backend="pyav")
    assert stock.meta.features["intervention"] == {"dtype": "bool", "shape": (1,), "names": None}
    assert len(stock) == sum(episode["length"] for episode in episodes)
    assert [bool(stock[row]["intervention"]) for row in range(9)] == frames(attempts)["intervention"][:9].tolist()


def test_what_is_kept_changes_nothing_of_an_episode(untrained: Path) -> None:
    policy = Pi05Policy.from_pretrained(untrained)
    went = []
    with MetaWorldEnvironment(TASKS[0]) as env:
        for keeps in (False, True):
            trial = Trial("policy", TASKS[0], 7, max_seconds=0.5, keeps=keeps)
            result = result_of(policy, env, trial)
            went.append((result.reason, env.state.tolist()))
    assert went[0] == went[1]
    assert len(result.steps) == result.decisions == 5


@pytest.mark.slow
def test_interrupted_collection_goes_on_with_the_attempts_that_were_not_over(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def interrupted(*arguments: Any) -> Iterator[tuple[int, Done]]:
        for number, done in run_in_processes(*arguments):
            if made:
                raise KeyboardInterrupt
            made.append(len(done.results))
            yield number, done

    small = {"policy": untrained, "tasks": TASKS[:1], "episodes": 4, "val_episodes": 2, "max_seconds": 0.3}
    whole = collect(config(tmp_path / "whole", **small)) / "robot"
    monkeypatch.setattr(autonomous, "run_in_processes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(config(tmp_path / "data", **small, lanes=1, num_workers=1))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="neither a checkpoint"):
        collect(config(tmp_path / "data", **{**small, "policy": tmp_path}))  # as where a disk is not there
    film = next((tmp_path / ".data.partial").rglob("*.mp4"))
    first = film.read_bytes(), film.stat().st_mtime_ns
    root = collect(config(tmp_path / "data", **small, lanes=2)) / "robot"
    for name, values in frames(whole).items():
        np.testing.assert_allclose(frames(root)[name], values, atol=1e-5)
    assert [row["seed"] for row in LeRobotFiles.open(root).episodes.to_pylist()] == [
        row["seed"] for row in LeRobotFiles.open(whole).episodes.to_pylist()
    ]
    assert LeRobotFiles.open(root).info["splits"] == {"train": "0:4", "val": "4:6"}
    film = root / film.relative_to(tmp_path / ".data.partial" / ".kept")
    assert (film.read_bytes(), film.stat().st_mtime_ns) == first


def test_collection_goes_on_with_the_same_policy_and_tasks_however_they_are_spelled(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(untrained.parent)
    found = interrupted_by(monkeypatch, autonomous)
    spelled = {"tasks": tuple(reversed(TASKS)), "acting": {"num_steps": Acting().num_steps}}  # sorted, as it has them
    for options in ({"policy": untrained}, {"policy": Path(untrained.name), **spelled}):
        with pytest.raises(KeyboardInterrupt):
            collect(CollectConfig(tmp_path / "data", **options))
    assert found == [[], ["episodes-0.pickle"]]


@pytest.mark.slow
def test_attempt_in_which_nothing_was_done_costs_no_other(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*arguments: Any) -> Iterator[tuple[int, Done]]:
        for number, done in run_in_processes(*arguments):
            for result in done.results:
                if result.trial.task == TASKS[0]:
                    result.steps, result.reason = [], "its state is far from the data"
            yield number, done

    monkeypatch.setattr(autonomous, "run_in_processes", refused)
    small = {"policy": untrained, "episodes": 1, "val_episodes": 1, "max_seconds": 0.3}
    files = LeRobotFiles.open(collect(config(tmp_path / "some", **small)) / "robot")
    assert files.info["splits"] == {"train": "0:1", "val": "1:2"}
    assert len({*files.column("seed")}) == len(files.episodes) == 2
    assert f"2 of 4 attempts are left out: there is nothing of {TASKS[0]}" in caplog.text
    with pytest.raises(ValueError, match="its state is far from the data"):
        collect(config(tmp_path / "none", **small, tasks=TASKS[:1]))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"corrections": 3}, "corrections: of a policy's own episodes alone"),
        ({"acting": {"num_steps": 3}, "lanes": 4}, "acting, lanes: of a policy's own"),
        ({"policy": Path("x"), "corrections": 0}, "corrections is 0"),
        ({"policy": Path("x"), "image_size": 96, "cameras": ("top",)}, "cameras, image_size: of experts'"),
        ({"policy": Path("x"), "lanes": 0}, "lanes is 0"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(tmp_path: Path, wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **wrong)


def test_attempt_without_a_state_in_the_images_of_its_simulator_is_read_as_it_was(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), np.uint8)
    nobody = np.zeros(6, dtype=bool)
    episode = Episode("move", None, np.eye(6, 2, dtype=np.float32), {"top": images}, [None] * 6, [()] * 6, nobody)
    what = Recording("plain", ["top"], 28, 10, [], ["x", "y"], "plain", of_a_policy=True)
    root = tmp_path / "plain"
    blocks = (("train", filmed([one], {"top": video_path(root, "top", 0)}, what.fps)) for one in [episode])
    write_dataset(root, what, blocks)
    source = LeRobotConfig(str(root), state_keys=[], val_fraction=0, min_range=1.0).open("robot", "train", SHAPES)
    assert LeRobotFiles.open(root).features["observation.images.top"]["shape"] == [48, 64, 3]
    assert len(source) == 6
    np.testing.assert_array_equal(source[1].actions[:5], np.eye(6, 2)[1:])
    assert source[1].images["top"].shape == (3, 48, 64)
