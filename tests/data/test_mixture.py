from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
import pytest

from pi05_lightning.data.mixture import Draw, Entry, Mixture, MixtureSampler
from pi05_lightning.recipe import LossWeights, Recipe, Stage, StageOptions
from pi05_lightning.types import Modality, Subset

TRAINED_BY = {"text": {Modality.QA}, "flow": {Modality.CONTINUOUS}}


def entry(name: str, *sizes: Any, **lengths: Any) -> Entry:
    return Entry(Subset.parse(name), *sizes, **lengths)


def mixture_of(entries: list[Entry], batch_size: int, **options: int) -> Mixture:
    return Mixture(entries, TRAINED_BY, batch_size, **options)


ENTRIES = [entry("robot/qa", 100), entry("robot/continuous_robot_actions", 300), entry("web/qa", 50)]


def shares(drawn: list[Draw]) -> np.ndarray:
    return np.bincount([entry for entry, _, _ in drawn], minlength=len(ENTRIES)) / len(drawn)


@pytest.mark.parametrize("window", [1, 4])
def test_a_batch_is_a_function_of_seed_and_index(window: int) -> None:
    one, other = mixture_of(ENTRIES, 8, seed=1, window=window), mixture_of(ENTRIES, 8, seed=1, window=window)
    weights = one.weights(StageOptions())
    for k in range(12):  # one goes through them in order, the other begins anew
        assert one.batch(k, weights) == mixture_of(ENTRIES, 8, seed=1, window=window).batch(k, weights)
    assert other.batch(7, weights) != other.batch(8, weights)
    assert other.batch(7, weights) != mixture_of(ENTRIES, 8, seed=2, window=window).batch(7, weights)


def test_shares_hold_in_every_batch_of_a_window_of_one() -> None:
    mixture = mixture_of(ENTRIES, 40)
    weights = mixture.weights(StageOptions(mixture={"robot/qa": 1.0, "web/qa": 3.0}))
    for k in range(20):
        np.testing.assert_allclose(shares(mixture.batch(k, weights)), [0.25, 0, 0.75], atol=1 / 40)


def test_shares_hold_in_every_window_to_one_sample() -> None:
    mixture = mixture_of(ENTRIES, 8, window=5)
    weights = mixture.weights(
        StageOptions(mixture={"robot/qa": 0.22, "robot/continuous_robot_actions": 0.67, "web/qa": 0.11})
    )
    for start in range(0, 30, 5):
        drawn = [draw for k in range(start, start + 5) for draw in mixture.batch(k, weights)]
        np.testing.assert_allclose(shares(drawn), [0.22, 0.67, 0.11], atol=1 / 40)


def test_temperature_weighs_by_size() -> None:
    mixture = mixture_of(ENTRIES, 8)
    np.testing.assert_allclose(mixture.weights(StageOptions()), [1 / 3, 1 / 3, 1 / 3])
    np.testing.assert_allclose(mixture.weights(StageOptions(mixture_temperature=1)), np.array([100, 300, 50]) / 450)
    roots = np.sqrt([100, 300, 50])
    np.testing.assert_allclose(mixture.weights(StageOptions(mixture_temperature=0.5)), roots / roots.sum())


def test_temperature_multiplies_the_shares_that_are_given() -> None:
    stage = StageOptions(mixture={"robot/qa": 1, "web/qa": 4}, mixture_temperature=1)
    np.testing.assert_allclose(mixture_of(ENTRIES, 8).weights(stage), [1 / 3, 0, 2 / 3])


def test_without_shares_all_are_drawn_that_the_losses_train() -> None:
    mixture = mixture_of(ENTRIES, 8)
    np.testing.assert_allclose(mixture.weights(StageOptions(LossWeights(flow=1))), [0, 1, 0])
    np.testing.assert_allclose(mixture.weights(StageOptions(LossWeights(text=1))), [0.5, 0, 0.5])


def test_without_shares_none_is_drawn_for_a_flow_that_does_not_count() -> None:
    stage = Stage(name="words", steps=1, losses=LossWeights(text=1, flow=1), flow_alpha=0)
    np.testing.assert_allclose(mixture_of(ENTRIES, 8).weights(stage), [0.5, 0, 0.5])


def test_without_shares_none_is_drawn_that_may_teach_nothing() -> None:
    trained_by = TRAINED_BY | {"subtask": {Modality.HL_SUBTASK, Modality.CONTINUOUS}}
    acts = entry("robot/continuous_robot_actions", 300, lacking=frozenset({"subtask"}))
    mixture = Mixture([entry("robot/hl_subtask", 100), acts, entry("web/qa", 50)], trained_by, 8)
    words, both = LossWeights(text=1, subtask=1), LossWeights(text=1, subtask=1, flow=1)
    np.testing.assert_allclose(mixture.weights(StageOptions(words)), [0.5, 0, 0.5])
    np.testing.assert_allclose(mixture.weights(StageOptions(both)), [1 / 3, 1 / 3, 1 / 3])
    named = StageOptions(words, {"robot/continuous_robot_actions": 1.0})
    np.testing.assert_allclose(mixture.weights(named), [0, 1, 0])


@pytest.mark.parametrize("window", [1, 4])
def test_two_ranks_see_disjoint_samples_whose_union_is_one_larger_batch(window: int) -> None:
    small, large = mixture_of(ENTRIES, 8, window=window), mixture_of(ENTRIES, 16, window=window)
    weights = small.weights(StageOptions())
    for k in range(6):
        ranks = [small.batch(k, weights, rank, 2) for rank in range(2)]
        samples = [{draw[:2] for draw in rank} for rank in ranks]
        assert len(samples[0]) == len(samples[1]) == 8
        assert not samples[0] & samples[1]
        assert sorted(ranks[0] + ranks[1]) == sorted(large.batch(k, weights))


@pytest.mark.parametrize("window", [1, 4])
def test_step_has_the_same_samples_whatever_ranks_and_accumulated_batches_split_it(window: int) -> None:
    large = mixture_of(ENTRIES, 24, window=window)
    weights = large.weights(StageOptions())
    for world, parts in ((1, 2), (2, 2), (3, 1), (1, 6), (2, 3)):
        small = mixture_of(ENTRIES, 24 // world // parts, window=window)
        for step in range(3, 9):
            split = [
                small.batch(step, weights, rank, world, 3, part, parts)
                for part in range(parts)
                for rank in range(world)
            ]
            assert {len(batch) for batch in split} == {24 // world // parts}
            assert sorted(chain(*split)) == sorted(large.batch(step, weights, first=3))


def test_accumulated_batches_of_a_step_are_cut_by_length() -> None:
    lengths = np.arange(240)
    mixture = mixture_of([entry("a/qa", 240, text=lengths)], 6, window=10)
    weights = mixture.weights(StageOptions())
    for step in range(10):
        batches = [[lengths[index] for _, index, _ in mixture.batch(step, weights, part=m, parts=4)] for m in range(4)]
        assert all(max(batch) < min(after) for batch, after in pairwise(batches))


@pytest.mark.parametrize("window", [1, 4])
def test_keys_never_repeat(window: int) -> None:
    mixture = mixture_of(ENTRIES, 8, window=window)
    weights = mixture.weights(StageOptions())
    keys = [key for k in range(50) for rank in range(2) for _, _, key in mixture.batch(k, weights, rank, 2)]
    assert len(keys) == len(set(keys))


def test_samples_of_an_entry_are_drawn_equally_often_in_a_window() -> None:
    mixture = mixture_of([entry("a/qa", 20)], 8, window=8)
    weights = mixture.weights(StageOptions())
    drawn = np.bincount([index for k in range(8) for _, index, _ in mixture.batch(k, weights)])
    assert set(drawn) == {3, 4}


def test_batch_holds_no_sample_twice_though_its_window_does() -> None:
    for text in (np.zeros(1), np.arange(60), np.arange(60) % 3):
        mixture = mixture_of([entry("a/qa", 1000), entry("b/qa", 60, np.ones(1), text)], 8, window=64)
        weights = mixture.weights(StageOptions())
        for k in range(64):
            assert len({draw[:2] for draw in mixture.batch(k, weights)}) == 8


def test_entry_smaller_than_its_part_of_a_batch_repeats_its_samples() -> None:
    mixture = mixture_of([entry("a/qa", 3)], 8, window=64)
    assert len(mixture.batch(0, mixture.weights(StageOptions()))) == 8


def test_batches_hold_samples_with_as_many_images() -> None:
    entries = [entry(f"{cameras}/qa", 40, np.full(1, cameras)) for cameras in range(3)]
    mixture = mixture_of(entries, 8, window=64)
    weights = mixture.weights(StageOptions())
    kinds = [{number for number, _, _ in mixture.batch(k, weights)} for k in range(64)]
    assert sum(len(kind) > 1 for kind in kinds) == 2  # where one kind ends and the next begins


def test_batches_of_a_window_hold_samples_of_similar_length() -> None:
    rng = np.random.default_rng(0)
    lengths = [rng.integers(10, 1000, entry.size) for entry in ENTRIES]
    entries = [Entry(e.subset, e.size, text=length) for e, length in zip(ENTRIES, lengths, strict=True)]

    def padding(window: int) -> float:
        mixture = mixture_of(entries, 8, window=window)
        weights = mixture.weights(StageOptions())
        rows = [[lengths[e][i] for e, i, _ in mixture.batch(k, weights)] for k in range(60)]
        return 1 - sum(map(sum, rows)) / sum(8 * max(row) for row in rows)

    assert padding(1) > 0.4
    assert padding(12) < 0.1


@pytest.mark.parametrize(
    ("stage", "named"),
    [
        (StageOptions(mixture={"robot/qq": 1.0}), r"'robot/qq' \(did you mean robot/qa\?\); the data has .*web/qa"),
        (StageOptions(LossWeights(flow=1), {"robot/qa": 1.0}), "nothing is learned from robot/qa"),
    ],
)
def test_wrong_shares_are_named(stage: StageOptions, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        mixture_of(ENTRIES, 8).weights(stage)


@pytest.mark.parametrize("share", [-1.0, 0.0, float("nan")])
def test_shares_of_which_nothing_can_be_drawn_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"mixture: .*share.*robot/qa"):
        StageOptions(mixture={"robot/qa": share})


@pytest.mark.parametrize(
    ("entries", "named"), [([], "nothing to draw from"), ([entry("a/qa", 0)], "a/qa has no samples")]
)
def test_empty_data_are_named(entries: list[Entry], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        mixture_of(entries, 8)


@pytest.mark.parametrize("window", [1, 64])
def test_stage_of_a_batch_is_decided_by_its_step(window: int) -> None:
    recipe = Recipe.of(
        2, 2, pretrain=StageOptions(mixture={"robot/qa": 1.0}), posttrain=StageOptions(mixture={"web/qa": 1.0})
    )
    sampler = MixtureSampler(mixture_of(ENTRIES, 4, window=window), recipe, num_steps=4, accumulate=2)
    assert [{number for number, _, _ in batch} for batch in sampler] == [{0}] * 4 + [{2}] * 4


@pytest.mark.parametrize("window", [1, 3])
def test_a_sampler_that_starts_later_goes_on_where_the_other_was(window: int) -> None:
    recipe = Recipe.of(pretrain_steps=4, posttrain_steps=5)

    def sampler(start: int) -> MixtureSampler:
        return MixtureSampler(mixture_of(ENTRIES, 4, window=window), recipe, num_steps=9, start=start)

    for start in range(9):
        assert list(sampler(start)) == list(islice(sampler(0), start, None))
