"""The runner of an exported policy refuses what the policy refuses, and the comparison sees all that it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi05_lightning.acting import Acting
from pi05_lightning.acting.frames import made_up_frames
from pi05_lightning.acting.inference import Inference
from pi05_lightning.cli.main import main
from pi05_lightning.data.places import misplaced
from pi05_lightning.data.prompt import Prompts
from pi05_lightning.export import runner
from pi05_lightning.export.comparison import compare
from pi05_lightning.export.folder import described, write
from pi05_lightning.models.heads.subtask import MAX_WORDS
from pi05_lightning.weights.abilities import Trained
from pi05_lightning.weights.locate import locate
from tests.untrained import untrained_policy

from .conftest import TASK

ACTING = Acting(temperature=1.0, constrain_fast=False, max_action_distance=1e-6)
"""Of which nothing can be compared as it is."""


@pytest.fixture(scope="module")
def policy(untrained: Callable[..., Path]) -> Inference:
    """An untrained policy whose FAST tokens open with nothing."""
    weights = locate(untrained("debug", prompts=Prompts(fast_opening=""), max_tokens=120))
    return Inference(weights.model(), weights.processor(), ACTING)


@pytest.fixture(scope="module")
def folder(policy: Inference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("exported")
    write(made, policy, "pt2")
    return made


@pytest.fixture(scope="module")
def loaded(folder: Path) -> runner.Policy:
    return runner.Policy(folder)


@pytest.fixture
def exported(loaded: runner.Policy) -> runner.Policy:
    """One to change: it takes seconds to load."""
    policy = copy(loaded)
    policy.manifest = dict(policy.manifest)
    policy.reset()
    return policy


@pytest.fixture
def seen() -> dict[str, Any]:
    image = np.zeros((48, 64, 3), np.uint8)
    return {"images": {"top": image, "wrist": image}, "state": np.zeros(4, np.float32), "task": TASK}


def test_as_much_is_said_at_most() -> None:
    assert runner.MAX_WORDS == MAX_WORDS


def test_nothing_is_drawn_and_no_chunk_is_refused_where_both_are_compared(policy: Inference, folder: Path) -> None:
    found = compare(policy, folder, made_up_frames(policy), "pt2")
    assert found.problems(1e-3) == []
    assert None not in (found.flow_error, found.fast_error, found.same_subtasks)


def test_a_chunk_that_goes_on_from_what_was_said_is_compared(
    policy: Inference, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say = runner.Policy._say

    def forgetful(self: runner.Policy, seen: runner.Seen) -> tuple[str, runner.Columns]:
        text, _ = say(self, seen)
        sequence = self._start(seen, [(self._fill("task", seen), False)])
        sequence.keys, sequence.values = np.zeros_like(sequence.keys), np.zeros_like(sequence.values)
        return text, sequence

    monkeypatch.setattr(runner.Policy, "_say", forgetful)
    problems = compare(policy, folder, made_up_frames(policy)[:1], "pt2").problems(1e-3)
    assert any("actions (flow) are off" in problem for problem in problems)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"actions": "FAST"}, "actions is 'FAST': expected flow or fast"),
        ({"task": "put it at <loc0100>"}, "<loc0100> is no place"),
        ({"task": "word " * 150}, r"the text is \d+ tokens long, and the policy was trained on 120 at most"),
        ({"task": "_"}, "say what to do"),
        ({"images": {"side": np.zeros((4, 4, 3), np.uint8)}}, "the policy has no camera 'side'"),
    ],
)
def test_what_the_policy_refuses_the_runner_refuses(
    given: Mapping[str, Any], message: str, exported: runner.Policy, seen: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        exported.act(**seen | given)


def test_a_question_about_an_unknown_camera_is_refused(exported: runner.Policy) -> None:
    with pytest.raises(ValueError, match="no camera 'side'; it has top, wrist"):
        exported.answer("side", np.zeros((4, 4, 3), np.uint8), "what is it?")


def test_what_the_policy_was_not_trained_for_is_refused(
    policy: Inference, exported: runner.Policy, seen: dict[str, Any]
) -> None:
    untaught = Inference(
        policy.model,
        policy.processor,
        Acting(actions="fast", hierarchical=False),
        trained=Trained(terms={"fast": 1}, complete=True),
    )
    exported.manifest["able"] = described(untaught)["able"]
    assert exported.manifest["able"] == {"flow": False, "fast": True, "subtask": False, "text": False}
    with pytest.raises(ValueError, match="not trained to act with the flow head"):
        exported.act(**seen, actions="flow")
    with pytest.raises(ValueError, match="not trained to say subtasks"):
        exported.say(**seen)
    with pytest.raises(ValueError, match="not trained to answer questions"):
        exported.answer("top", seen["images"]["top"], "what is it?")


def test_a_state_is_refused_by_a_policy_without_one(exported: runner.Policy, seen: dict[str, Any]) -> None:
    exported.robot = exported.robot | {"state": {"q01": [], "q99": []}}
    with pytest.raises(ValueError, match="a state is given, and the policy was trained without one"):
        exported.act(**seen)


@pytest.mark.parametrize(
    "text",
    [
        "no place",
        "<loc0001><loc0002>",
        "<loc0001><loc0002><loc0003><loc0004>",
        "<loc0001>",
        "<loc1024><loc0000>",
        "<loc01><loc02>",
        "<loc0005><loc0002><loc0003><loc0004>",
        "<loc0001><loc0002> and <loc0003><loc0004><loc0009>",
    ],
)
def test_places_are_checked_as_the_policy_checks_them(text: str) -> None:
    assert runner.misplaced(text) == misplaced(text)


@pytest.mark.parametrize(
    "option",
    [("--execution_horizon", "4"), ("--inference_delay", "2"), ("--rtc", "false"), ("--on_failed_decode", "count")],
)
def test_what_is_up_to_the_caller_of_the_runner_is_refused(option: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=rf"{option[0]} has no effect on an exported policy"):
        main(["export", str(tmp_path / "none"), "--out", str(tmp_path / "out"), *option])


def test_the_manifest_says_nothing_of_what_is_up_to_the_caller(policy: Inference) -> None:
    acting = described(policy.acting_as(replace(ACTING, execution_horizon=4)))["acting"]
    assert {"num_steps", "temperature", "max_prompt_bytes"} <= acting.keys()
    assert "execution_horizon" not in acting


def test_chunks_are_as_long_as_those_of_the_robots_training(videos: Path, tmp_path: Path) -> None:
    weights = locate(untrained_policy(tmp_path / "policy", videos, horizon_steps=5))
    policy = Inference(weights.model(), weights.processor(), Acting(hierarchical=False))
    out = tmp_path / "exported"
    out.mkdir()
    write(out, policy, "pt2")
    frame, config = made_up_frames(policy)[0], policy.model.config
    noise = np.random.default_rng(0).standard_normal((config.horizon, config.action_dim), np.float32)
    expected = policy.predict_chunks([frame], [None], noise[None])[0]
    found = runner.Policy(out).act(frame.images, frame.state, frame.task, noise=noise)
    assert found.shape == expected.shape == (5, policy.action_dim)
    span = policy.processor.robots[policy.robot].normalize.action.span
    assert np.abs((found - expected) / span).max() < 1e-4
