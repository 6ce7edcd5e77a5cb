"""Chunks that come late: what is executed meanwhile, with and without real-time chunking, and what jumps."""

from __future__ import annotations

import numpy as np
import pytest

from pi05_lightning import Pi05Policy
from pi05_lightning.acting import Acting
from pi05_lightning.cli.rollout import rollout
from pi05_lightning.evaluation.report.page import render
from pi05_lightning.evaluation.report.run import read_run
from pi05_lightning.sim.available_modes import available_modes
from pi05_lightning.sim.environment import View
from pi05_lightning.sim.modes import acting_in
from pi05_lightning.sim.simulators import MetaWorld
from pi05_lightning.sim.summary import jumps, summarise
from pi05_lightning.sim.trials import Result, Trial
from tests.sim.walk import Stub, Walk, result_of

STEPS = 7


class Told(Walk):
    """Remembers the actions it was told; an episode lasts STEPS."""

    max_seconds = STEPS / Walk.fps

    def __init__(self) -> None:
        self.actions: list[float] = []

    def step(self, action: np.ndarray) -> bool:
        self.actions.append(round(float(action[0]), 3))
        return False


class Numbered(Stub):
    """Chunk 2 is 2.0, 2.1, 2.2, 2.3; it begins with what it is given."""

    def __init__(self, **acting) -> None:
        super().__init__(None, **acting)
        self.given: list[list[float] | None] = []

    def predict_chunks(self, frames, subtasks, noise, prefix_actions=None, generator=None):
        chunk = (len(self.given) + np.arange(4) / 10)[:, None].astype(np.float32)
        self.given.append(None if prefix_actions is None else prefix_actions[0][:, 0].round(3).tolist())
        if prefix_actions is not None:
            chunk[: len(prefix_actions[0])] = prefix_actions[0]
        return chunk[None]


def executed(policy: Stub, delays: tuple[int, ...] = (), seed: int = 0) -> tuple[list[float], Result]:
    env = Told()
    result = result_of(policy, env, Trial("policy", "walk", seed, delays=delays))
    return env.actions, result


def test_without_a_delay_a_chunk_is_executed_from_its_first_action():
    actions, _ = executed(Numbered(execution_horizon=2))
    assert actions == pytest.approx([0.0, 0.1, 1.0, 1.1, 2.0, 2.1, 3.0])


def test_late_chunk_is_joined_at_the_step_that_is_due():
    policy = Numbered(execution_horizon=2, inference_delay=1, rtc=False)
    assert executed(policy)[0] == pytest.approx([0.0, 0.1, 0.2, 1.1, 1.2, 2.1, 2.2])
    assert policy.given == [None] * 4
    policy = Numbered(execution_horizon=2, inference_delay=2, rtc=False)
    assert executed(policy)[0] == pytest.approx([0.0, 0.1, 0.2, 0.3, 1.2, 1.3, 2.2])


def test_rtc_gives_the_actions_of_the_delay():
    policy = Numbered(execution_horizon=2, inference_delay=1)
    assert executed(policy)[0] == pytest.approx([0.0, 0.1, 0.2, 1.1, 1.2, 2.1, 2.2])
    assert policy.given == [None, *(pytest.approx([x]) for x in (0.2, 1.2, 2.2))]


def test_chunk_that_comes_earlier_than_rtc_was_told_changes_nothing():
    early, late = (executed(Numbered(execution_horizon=2, inference_delay=1), (delay,)) for delay in (0, 1))
    assert early[0] == late[0]
    assert early[1].seams == late[1].seams


def test_chunk_that_comes_later_than_rtc_was_told_is_joined_late():
    actions, result = executed(Numbered(execution_horizon=2, inference_delay=1), (2,))
    assert actions == pytest.approx([0.0, 0.1, 0.2, 0.3, 1.2, 1.3, 2.2])
    assert result.seams == pytest.approx([0.9, 0.9])


def test_delays_are_drawn_per_chunk_and_are_the_same_with_and_without_rtc():
    late = {"execution_horizon": 2, "inference_delay": 2, "rtc": False}
    drawn = {seed: executed(Numbered(**late), (0, 1, 2), seed)[0] for seed in range(32)}
    assert {seed: executed(Numbered(**late), (0, 1, 2), seed)[0] for seed in range(32)} == drawn
    joined = {2 - sum(value < 1 for value in actions[2:4]) for actions in drawn.values()}
    assert joined == {0, 1, 2}
    early = executed(Numbered(execution_horizon=2, inference_delay=0), (0, 1, 2), 3)[0]
    assert early == drawn[3]


def test_jumps_at_seams_and_inside_chunks_are_told_apart():
    _, result = executed(Numbered(execution_horizon=2, inference_delay=1, rtc=False))
    # from 0.2 to 1.1 and from 1.2 to 2.1, over a range from -0.5 to 0.5
    assert result.seams == pytest.approx([0.9] * 2, abs=1e-5)
    assert result.inside == pytest.approx([0.1] * 3 * 4, abs=1e-5)
    found = jumps([result])
    assert found["ratio"] == {"mean": 9.0, "p95": 9.0}
    assert summarise([result], {})["jumps"] == {"policy": found}


def test_what_rtc_gives_counts_as_the_chunk_before():
    _, result = executed(Numbered(execution_horizon=2, inference_delay=1))
    assert result.seams == pytest.approx([0.9] * 2, abs=1e-5)
    assert result.inside == pytest.approx([0.1] * (3 + 3 * 2), abs=1e-5)


@pytest.mark.parametrize(
    ("mode", "delays", "expected"),
    [
        ("policy", (2,), Acting()),
        ("async", (1, 2), Acting(inference_delay=2, rtc=False, execution_horizon=2)),
        ("rtc", (1, 2), Acting(inference_delay=2, execution_horizon=2)),
        ("fast", (), Acting(actions="fast")),
        ("flat", (), Acting(hierarchical=False)),
    ],
)
def test_mode_is_the_policy_with_options_of_its_own(mode, delays, expected):
    assert acting_in(mode, Acting(), delays) == expected


def test_mode_with_a_delay_needs_one():
    with pytest.raises(ValueError, match=r"mode async: there is no delay; give one .* --delays \[2\]"):
        acting_in("async", Acting())
    assert acting_in("rtc", Acting(inference_delay=3)).inference_delay == 3


def test_modes_with_a_delay_run_where_there_is_one():
    assert available_modes(MetaWorld(), "it is not here", None, fast=False, delayed=["rtc", "async"]) == (
        *("policy", "flat", "rtc", "async"),
        *("random", "expert"),
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("acting", [{"inference_delay": 2}, {}, {"inference_delay": 2, "rtc": False}])
def test_robot_that_asks_for_every_action_does_what_the_rollout_did(untrained, acting):
    options = {"execution_horizon": 3, "replan_subtask_every": 2} | acting
    view = View(("topview", "gripperPOV"), 64, 10.0)
    policy, trial = Pi05Policy(untrained, **options), Trial("policy", "reach-v3", 5, films="all", max_seconds=1.1)
    with MetaWorld().open("reach-v3", view) as env:
        expected = [frame.chunk[frame.place] for frame in result_of(policy, env, trial).film]
        env.reset(5)
        robot = Pi05Policy(untrained, **options)
        for action in expected:
            np.testing.assert_array_equal(robot.predict(env.observation()), action)
            env.step(action)


@pytest.mark.slow
def test_rollout_measures_delays_beside_the_policy_without(untrained, tmp_path, capsys):
    options = {"episodes": 1, "max_seconds": 0.5, "num_workers": 1, "videos": 0, "out": tmp_path / "rollout"}
    modes = ("policy", "rtc", "async")
    found = rollout(untrained, ["reach-v3"], modes=modes, delays=(1, 2), **options)
    assert found["delays"] == [1, 2]
    assert [found["acting"][mode]["inference_delay"] for mode in modes] == [0, 2, 2]
    assert [found["acting"][mode]["rtc"] for mode in modes] == [True, True, False]
    assert found["jumps"].keys() == {*modes}
    shown = capsys.readouterr().out
    assert all(f"\n {mode} " in shown for mode in modes)
    (tmp_path / "config.yaml").write_text("seed_everything: 0\n")
    page = render(read_run(tmp_path), {})
    assert f"<td>{found['jumps']['async']['seams']['p95']:.3g}</td>" in page
    assert "<td>policy, delay without RTC</td>" in page
    with pytest.raises(ValueError, match="inference_delay is 5, and a chunk has 8 actions: at most 4"):
        rollout(untrained, ["reach-v3"], modes=("rtc",), delays=(5,), **options)
