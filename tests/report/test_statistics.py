import pytest

from pi05_lightning.evaluation.statistics import wilson_interval


def test_wilson_interval_equals_the_formula() -> None:
    # (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n) = (0.896036 ± 0.199887) / 1.192073
    # with p = 0.8, n = 20, z = 1.959964
    assert wilson_interval(16, 20) == pytest.approx((0.583983, 0.919343), abs=1e-5)


def test_wilson_interval_of_no_success_starts_at_zero() -> None:
    low, high = wilson_interval(0, 25)
    assert low == 0
    assert 0.1 < high < 0.2


def test_wilson_interval_needs_a_trial() -> None:
    with pytest.raises(ValueError, match="at least one trial"):
        wilson_interval(0, 0)
