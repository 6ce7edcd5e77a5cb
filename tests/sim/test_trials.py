"""Episodes: how they end, and that whatever a policy does wrong ends its own episode alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pi05_lightning.sim.baselines import run_baseline
from pi05_lightning.sim.course import MOST_DECISIONS, Course
from pi05_lightning.sim.environment import NoSuchEnvironment
from pi05_lightning.sim.modes import Mode
from pi05_lightning.sim.motion import run_policy
from pi05_lightning.sim.rollout import Job, check_memory, run_baseline_job
from pi05_lightning.sim.session import data_uri
from pi05_lightning.sim.summary import milliseconds, summarise
from pi05_lightning.sim.trials import ENDED, NOT_FINITE, OUT_OF_TIME, Clock, Result, Trial
from pi05_lightning.types import Frame
from tests.sim.walk import HORIZON, Stub, Walk, chunk, result_of


def run(act, seeds=(0, 1, 2), films="none", max_seconds=None, **acting) -> tuple[list[Result], Stub, Clock]:
    policy, clock = Stub(act, **acting), Clock()
    courses = [Course(Walk(), Trial("policy", "walk", seed, films, max_seconds)) for seed in seeds]
    run_policy(policy, courses, clock)
    return [course.result for course in courses], policy, clock


def raising(seed: int) -> np.ndarray:
    if seed == 1:
        raise KeyError("no\nsuch camera")
    return chunk(0.25)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (chunk(np.nan), NOT_FINITE),
        (chunk(np.inf), NOT_FINITE),
        (np.zeros((HORIZON, 3)), "the policy's chunk has the shape (4, 3), not (steps, 1)"),
        (np.zeros((0, 1)), "the policy's chunk has the shape (0, 1), not (steps, 1)"),
        (np.zeros(HORIZON), "the policy's chunk has the shape (4,), not (steps, 1)"),
    ],
)
def test_bad_actions_end_their_own_episode_and_no_other(bad, reason):
    results, _, _ = run(lambda seed: bad if seed == 1 else chunk(0.25))
    assert [result.outcome for result in results] == ["success", reason, "success"]
    assert results[1].decisions == 0


def test_policy_that_raises_ends_the_episode_that_it_raises_for():
    results, policy, _ = run(raising)
    assert [result.outcome for result in results] == [
        "success",
        r"the policy raised KeyError: 'no\nsuch camera'",
        "success",
    ]
    assert policy.calls[:5] == [[0, 1, 2], [0], [1], [2], [0, 2]]


def test_tokens_of_an_episode_are_drawn_alike_whatever_runs_beside_it():
    together = run(lambda seed: chunk(0.25))[1].drawn
    assert len({seed for drawn in together for seed in drawn}) == sum(map(len, together))
    for place, seed in enumerate((0, 1, 2)):
        alone = run(lambda seed: chunk(0.25), seeds=[seed])[1].drawn
        assert alone == [[drawn[place]] for drawn in together]


def test_interrupt_is_no_failure_of_the_policy():
    def interrupted(seed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupted)


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_the_machine_lacks_is_no_failure_of_the_policy(kind):
    def fails(seed):
        raise kind("no memory is left")

    results, _, _ = run(fails)
    assert all(result.lacked_memory for result in results)
    with pytest.raises(ChildProcessError, match="no memory is left: use fewer"):
        check_memory(results)


class Fragile(Walk):
    """A simulator that raises at one call, in the episode of seed 1."""

    def __init__(self, call: str, error: Exception) -> None:
        self.call, self.error = call, error

    def _reach(self, call: str) -> None:
        if self.call == call and self.seed == 1:
            raise self.error

    def reset(self, seed: int) -> None:
        super().reset(seed)
        self._reach("reset")

    def observation(self) -> Frame:
        self._reach("observation")
        return super().observation()

    def step(self, action: np.ndarray) -> bool:
        self._reach("step")
        return super().step(action)


class OneLane:
    def __init__(self, env: Walk) -> None:
        self.env = env

    def of(self, task, count, max_seconds=None):
        return [self.env]


UNSTABLE = "the simulator raised RuntimeError: unstable (test_trials.py:"


@pytest.mark.parametrize("films", ["none", "failure", "all"])
@pytest.mark.parametrize("call", ["reset", "observation", "step"])
def test_simulator_that_raises_ends_its_own_episode_and_no_other(call, films):
    courses = [
        Course(Fragile(call, RuntimeError("unstable\nin detail")), Trial("policy", "walk", seed, films, keeps=True))
        for seed in (0, 1, 2)
    ]
    run_policy(Stub(lambda seed: chunk(0.25)), courses, Clock())
    results = [course.result for course in courses]
    assert [result.success for result in results] == [True, False, True]
    assert results[1].reason.startswith(UNSTABLE)
    assert results[1].crashed
    assert not results[1].steps  # it tells nothing of the policy
    assert summarise(results, {})["max_seconds"] == {"walk": 2.0}


def test_baseline_tells_what_the_simulator_raised_from_what_the_mode_lacks():
    lanes, trials = OneLane(Fragile("step", ValueError("unstable"))), [Trial("random", "walk", seed) for seed in (0, 1)]
    first, second = run_baseline_job(Job(tuple(trials)), lanes, None).results
    assert not first.crashed
    assert second.reason.startswith(UNSTABLE.replace("RuntimeError", "ValueError"))
    lanes.env.action_high = np.array([np.inf])
    assert "leave out the mode random" in run_baseline_job(Job(tuple(trials)), lanes, None).results[0].reason


def test_what_the_simulator_does_not_have_and_want_of_memory_end_the_rollout():
    for kind in (NoSuchEnvironment, MemoryError, torch.OutOfMemoryError):
        with pytest.raises(kind):
            result_of(Stub(chunk), Fragile("observation", kind("there is none")), Trial("policy", "walk", 1))


def test_first_error_of_a_simulator_is_logged_with_its_traceback(caplog):
    class New(Walk):
        def step(self, action):
            raise RuntimeError("the floor gave way")

    for _ in range(2):
        result_of(Stub(chunk), New(), Trial("policy", "walk", 1))
    assert caplog.text.count("RuntimeError: the floor gave way") == caplog.text.count("Traceback") == 1


def test_too_few_chunks_are_a_failure():
    policy = Stub(chunk)
    policy.predict_chunks = lambda *_: []
    assert (
        result_of(policy, Walk(), Trial("flat", "walk", 0)).reason
        == "the policy raised ValueError: 0 chunks for 1 observations"
    )


@pytest.mark.parametrize(("execution_horizon", "calls"), [(1, 4), (3, 2), (4, 1)])
def test_execution_horizon_is_the_actions_from_one_chunk_to_the_next(execution_horizon, calls):
    results, policy, _ = run(lambda seed: chunk(0.25), seeds=[0], execution_horizon=execution_horizon)
    assert (results[0].success, results[0].decisions, len(policy.calls)) == (True, 4, calls)


def test_subtask_lasts_as_many_chunks_as_told():
    results, _, _ = run(lambda seed: chunk(0.1), seeds=[0], films="all", execution_horizon=2, replan_subtask_every=2)
    captions = [frame.caption for frame in results[0].film]
    assert captions == ["subtask 0.0"] * 4 + ["subtask 0.4"] * 4 + ["subtask 0.8"] * 2


def test_time_is_up_after_max_seconds():
    results, _, _ = run(lambda seed: chunk(0.0), seeds=[0], max_seconds=0.5)
    assert (results[0].outcome, results[0].decisions) == (OUT_OF_TIME, 5)


def test_environment_may_end_an_episode():
    results, _, _ = run(lambda seed: chunk(-0.5), seeds=[0])
    assert (results[0].outcome, results[0].decisions) == (ENDED, 2)


def test_film_shows_chunk_and_place_of_every_action():
    results, _, _ = run(lambda seed: chunk(0.25), seeds=[0], films="all", execution_horizon=3)
    assert [frame.place for frame in results[0].film] == [0, 1, 2, 0]
    assert all(frame.chunk.shape == (HORIZON, 1) for frame in results[0].film)


def failing(execution_horizon: int, max_seconds: float) -> list[Result]:
    """Of two episodes the first fails; both are filmed if they do."""
    trials = [Trial("policy", "walk", seed, max_seconds=max_seconds, films="failure") for seed in (0, 1)]
    policy = Stub(lambda seed: chunk(0.5 * seed), execution_horizon=execution_horizon)
    courses = [Course(Walk(), trial) for trial in trials]
    run_policy(policy, courses, Clock())
    return [course.result for course in courses]


def test_a_failure_is_filmed_decision_by_decision_and_as_it_ended_and_a_success_is_not():
    failed, succeeded = failing(execution_horizon=2, max_seconds=1.0)
    assert (failed.outcome, succeeded.outcome) == (OUT_OF_TIME, "success")
    assert [frame.caption for frame in failed.film] == ["subtask 0.0"] * 6
    assert [frame.chunk is None for frame in failed.film] == [False] * 5 + [True]
    assert (failed.film_every, succeeded.film) == (2, [])


def test_a_long_failure_has_a_film_of_bounded_length_that_keeps_its_pace():
    failed, _ = failing(execution_horizon=1, max_seconds=30.0)
    assert failed.decisions == 300
    assert len(failed.film) <= MOST_DECISIONS + 1
    assert failed.film_every == 4
    assert len(failed.film) == 300 // failed.film_every + 1


def test_random_actions_stay_within_the_bounds_and_depend_on_the_seed():
    taken = []

    class Watched(Walk):
        def step(self, action):
            taken.append(action)
            return False

    for seed in (0, 0, 1):
        run_baseline(Course(Watched(), Trial("random", "walk", seed)), Clock())
    first, again, other = np.split(np.array(taken), 3)
    assert np.abs(first).max() <= 0.5
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_unbounded_actions_have_no_random_mode():
    env = Walk()
    env.action_high = np.array([np.inf])
    with pytest.raises(ValueError, match="leave out the mode random"):
        run_baseline(Course(env, Trial("random", "walk", 0)), Clock())


def test_trial_without_time_for_an_action_is_refused():
    with pytest.raises(ValueError, match="max_seconds"):
        Trial("policy", "walk", 0, max_seconds=0)


def test_summary_counts_successes_and_reasons_per_task():
    results = [Result(Trial("policy", "a", i), success=i < 9, reason="" if i < 9 else NOT_FINITE) for i in range(10)]
    results += [Result(Trial("policy", "b", i), reason=OUT_OF_TIME) for i in range(2)]
    result = summarise(results, {"policy": Clock()})
    assert result["success"] == {"policy": {"a": [9, 10], "b": [0, 2]}}
    assert result["failures"] == {"policy": {"a": {NOT_FINITE: 1}, "b": {OUT_OF_TIME: 2}}}
    assert result["crashed"] == [f"policy a seed 9: {NOT_FINITE}"]


def test_summary_says_how_long_successes_took_and_how_many_there_are_in_a_minute():
    taken = [("a", 10), ("a", 20), ("a", 30), ("b", 40)]
    results = [
        Result(Trial("policy", task, 0), success=task == "a", decisions=actions, fps=10.0) for task, actions in taken
    ]
    result = summarise(results, {})
    assert result["seconds"] == {"policy": {"a": {"median": 2.0, "p95": 2.9}}}
    assert result["per_minute"] == {"policy": 18.0}  # three in ten seconds


def test_a_crash_costs_as_many_successes_in_a_minute_as_running_out_of_time():
    solved = Result(Trial("policy", "a", 0), success=True, decisions=20, fps=10.0, max_seconds=4.0)
    crashed, late = (
        replace(solved, success=False, decisions=n, reason=r) for n, r in ((1, NOT_FINITE), (40, OUT_OF_TIME))
    )
    rates = [summarise([solved, failed], {})["per_minute"]["policy"] for failed in (crashed, late)]
    assert rates == [10.0, 10.0]  # one in six seconds


def test_summary_has_wilson_intervals():
    result = summarise([Result(Trial("policy", "a", i), success=i < 9) for i in range(10)], {})
    # by hand, z = 1.96: (0.9 + 0.19208 ± 1.96 √(0.009 + 0.0096040)) / 1.38416
    assert result["wilson_95"]["policy"]["a"] == pytest.approx([0.5958, 0.9821], abs=1e-4)
    assert result["wilson_95"]["policy"]["all tasks"] == result["wilson_95"]["policy"]["a"]


def test_times_are_median_and_95th_percentile_in_milliseconds():
    clock = Clock(decisions=[0.001, 0.002, 0.003], lanes=[2, 2, 1], steps=[])
    assert milliseconds(clock) == {"decision": {"median": 2.0, "p95": 2.9, "lanes": 1.67}}


def test_every_call_of_the_policy_and_every_step_is_timed():
    _, policy, clock = run(lambda seed: chunk(0.25), execution_horizon=2)
    assert len(clock.decisions) == len(policy.calls) == 2
    assert clock.lanes == [3, 3]
    assert len(clock.steps) == 3 * 4


def test_noise_is_another_in_another_task_and_the_same_in_another_mode() -> None:
    def noise(mode: Mode, task: str) -> torch.Tensor:
        policy = Stub(chunk, noise_scale=1.0)
        result_of(policy, Walk(), Trial(mode, task, 3))
        return policy.noise[0]

    assert not torch.equal(noise("policy", "walk"), noise("policy", "run"))
    assert torch.equal(noise("policy", "walk"), noise("flat", "walk"))


def test_noise_is_scaled_as_the_policy_says() -> None:
    def first_noise(scale: float) -> torch.Tensor:
        policy = Stub(lambda seed: np.zeros((HORIZON, 1), dtype=np.float32), noise_scale=scale)
        result_of(policy, Walk(), Trial("policy", "walk", 0))
        return policy.noise[0]

    assert torch.equal(first_noise(0.5), 0.5 * first_noise(1.0))
    assert not first_noise(0.0).any()


class TwoCameras(Walk):
    def observation(self) -> Frame:
        frame = super().observation()
        return replace(frame, images=frame.images | {"wrist": np.zeros((3, 4, 6), np.uint8)})


def test_cameras_of_other_heights_stand_side_by_side_in_a_film():
    film = result_of(Stub(lambda seed: chunk(0.25)), TwoCameras(), Trial("policy", "walk", 1, films="all")).film
    assert {frame.image.shape for frame in film} == {(8, 8 + 12, 3)}
    assert (film[0].image[:, :8] == 1).all()


class Floats(Walk):
    def observation(self) -> Frame:
        frame = super().observation()
        return replace(frame, images={"top": frame.images["top"].astype(np.float32) + 0.4})


def test_images_of_floats_are_filmed_and_shown_as_those_of_bytes():
    floats, plain = (
        result_of(Stub(lambda seed: chunk(0.25)), env, Trial("policy", "walk", 7, films="all")).film
        for env in (Floats(), Walk())
    )
    np.testing.assert_array_equal(floats[0].image, plain[0].image)
    assert data_uri(floats[0].image + np.float32(0.4)) == data_uri(plain[0].image)


class NoCamera(Walk):
    def observation(self) -> Frame:
        return replace(super().observation(), images={})


def test_an_episode_of_a_policy_that_sees_nothing_is_filmed():
    result = result_of(Stub(lambda seed: chunk(0.25)), NoCamera(), Trial("policy", "walk", 1, films="all"))
    assert result.outcome == "success"
    assert not result.film[0].image.any()
