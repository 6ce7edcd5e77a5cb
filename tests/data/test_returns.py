"""Returns, their scale, n-step targets and thresholds, against episodes computed by hand."""

import numpy as np
import pytest

from pi05_lightning.data.returns import bootstrapped, monte_carlo, threshold

# a success of 3 frames, then a failure of 5, of a task whose longest episode has 10
LEFT = np.array([2, 1, 0, 4, 3, 2, 1, 0])
SUCCESS = np.array([True] * 3 + [False] * 5)
LONGEST = np.full(8, 10)
END = np.array([3] * 3 + [8] * 5)


def test_return_is_the_frames_to_success_over_the_longest_episode_and_a_failure_costs_as_much_as_that() -> None:
    returns = monte_carlo(LEFT, SUCCESS, LONGEST, None)
    np.testing.assert_allclose(returns, [-0.2, -0.1, 0.0, -1, -1, -1, -1, -1])


def test_cheaper_failure_is_told_from_afar_by_what_is_left() -> None:
    returns = monte_carlo(LEFT, SUCCESS, LONGEST, c_fail=4)
    np.testing.assert_allclose(returns, [-0.2, -0.1, 0.0, -0.8, -0.7, -0.6, -0.5, -0.4])


def test_each_task_has_its_own_scale() -> None:
    longest = np.array([4] * 3 + [10] * 5)
    returns = monte_carlo(LEFT, SUCCESS, longest, c_fail=4)
    np.testing.assert_allclose(returns, [-0.5, -0.25, 0.0, -0.8, -0.7, -0.6, -0.5, -0.4])


def test_value_after_two_steps_stands_for_the_rest_but_near_the_end() -> None:
    returns = monte_carlo(LEFT, SUCCESS, LONGEST, c_fail=4)
    value = np.array([-0.9, -0.8, -0.3, -0.6, -0.5, -0.4, -0.1, -0.95])
    targets = bootstrapped(returns, value, END, LONGEST, steps=2)
    # frame 0: two rewards of -1 / 10 and V of frame 2; frames 1 and 2 reach the end; frame 3: -0.2 + V of frame 5
    np.testing.assert_allclose(targets, [-0.5, -0.1, 0.0, -0.6, -0.3, -1.0, -0.5, -0.4])


def test_bootstrap_never_looks_into_the_next_episode() -> None:
    returns = monte_carlo(LEFT, SUCCESS, LONGEST, None)
    value = np.zeros(8)
    np.testing.assert_allclose(bootstrapped(returns, value, END, LONGEST, steps=3)[:3], returns[:3])


def test_a_value_of_another_task_is_taken_in_the_units_of_the_frames_own() -> None:
    """Frames 0 to 3 are of a task of 10 frames and 4 to 7 of one of 40, so V = R everywhere leaves no advantage."""
    longest, left = np.array([10] * 4 + [40] * 4), np.arange(8)[::-1]
    returns = monte_carlo(left, np.ones(8, bool), longest, None)
    targets = bootstrapped(returns, returns, np.full(8, 8), longest, steps=2)
    np.testing.assert_allclose(targets, returns)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_share_of_the_advantages_is_above_the_threshold(share: float) -> None:
    advantages = np.random.default_rng(0).normal(loc=3, size=1000)
    assert (advantages > threshold(advantages, share, "any")).mean() == pytest.approx(share, abs=0.002)


def test_what_went_no_better_than_expected_is_never_above_the_threshold() -> None:
    left = np.array([2, 1, 0, *range(19, -1, -1)])  # a success of 3 frames, a failure of 20
    success, longest = np.arange(23) < 3, np.full(23, 20)
    returns = monte_carlo(left, success, longest, None)
    value = np.array([-0.5, -0.1, -0.05, -0.5, *np.linspace(-0.99, -0.9999, 19)])
    above = returns - value > threshold(returns - value, 0.4, "any")
    assert np.flatnonzero(above).tolist() == [0, 1, 2]


def test_advantages_that_are_all_the_same_say_nothing() -> None:
    with pytest.raises(ValueError, match=r"'open the drawer': all of its 7 advantages are 0, .*learned nothing"):
        threshold(np.zeros(7), 0.3, "open the drawer")


def test_advantages_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not all finite"):
        threshold(np.array([0.1, np.nan]), 0.3, "open the drawer")


def test_single_frame_is_positive_where_it_went_better_than_expected() -> None:
    assert threshold(np.array([0.4]), 0.3, "open") == threshold(np.array([-0.4]), 0.3, "open") == 0
