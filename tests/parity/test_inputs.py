"""Prompts, state bins, normalisation and images against LeRobot's processors, edge values included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.lerobot_types import TransitionKey
from lerobot.policies.common.vla_utils import resize_with_pad_torch
from lerobot.policies.pi0_fast.processor_pi0_fast import Pi0FastPrepareStateAndLanguageTokenizerProcessorStep
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep

from pi05_lightning.data.images import resize_with_pad
from pi05_lightning.data.prompt import STATE_BINS, Prompts
from pi05_lightning.data.transforms import Quantiles
from pi05_lightning.types import Frame

TASKS = ["pick up the cup", " Open_the drawer\nthen  close it ", "", "Ärmel_hoch, {nothing}"]
AS_LEROBOT = Prompts(clip_state=False)
EDGES = np.concatenate(
    [
        STATE_BINS,
        np.nextafter(STATE_BINS.astype(np.float32), np.float32(-9)),
        np.nextafter(STATE_BINS.astype(np.float32), np.float32(9)),
        [-1e9, -1.0001, 0.99999994, 1.0, 1.0001, 1e9, -0.0],
    ]
).astype(np.float32)


def prompts_of(step: object, tasks: list[str], states: np.ndarray) -> list[str]:
    transition = {
        TransitionKey.OBSERVATION: {"observation.state": torch.from_numpy(states)},
        TransitionKey.COMPLEMENTARY_DATA: {"task": tasks},
    }
    return step(transition)[TransitionKey.COMPLEMENTARY_DATA]["task"]  # type: ignore[operator]


def states(rows: int) -> np.ndarray:
    return np.random.default_rng(0).choice(EDGES, (rows, 7))


def test_flow_prompt_is_lerobots() -> None:
    found = [
        AS_LEROBOT.low_level(Frame(task=task, state=state), None, "task", fast=False)[0].text
        for task, state in zip(TASKS, states(4), strict=True)
    ]
    assert found == prompts_of(Pi05PrepareStateTokenizerProcessorStep(), TASKS, states(4))


def test_fast_prompt_is_lerobots() -> None:
    found = [
        AS_LEROBOT.low_level(Frame(task=task, state=state), None, "task", fast=True)[0].text
        for task, state in zip(TASKS, states(4), strict=True)
    ]
    assert found == prompts_of(Pi0FastPrepareStateAndLanguageTokenizerProcessorStep(), TASKS, states(4))


def test_every_edge_of_every_state_bin_is_lerobots() -> None:
    lerobot = prompts_of(Pi05PrepareStateTokenizerProcessorStep(), ["x"], EDGES[None])[0]
    assert f"Task: x, State: {AS_LEROBOT.state(Frame(state=EDGES))};\nAction: " == lerobot


def test_clipping_changes_nothing_but_the_bin_below_the_first() -> None:
    free = AS_LEROBOT.state(Frame(state=EDGES)).split()
    clipped = Prompts().state(Frame(state=EDGES)).split()
    assert [("0" if bin == "-1" else bin) for bin in free] == clipped
    assert "-1" in free


# --- normalisation

Q01 = np.array([-1.0, 0.3, 2.0, -0.7, 0.1], dtype=np.float32)
Q99 = np.array([1.0, 0.3, 2.5, 0.9, 12345.6], dtype=np.float32)  # the second dimension is constant


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    rng = np.random.default_rng(0)
    fraction = np.concatenate([rng.uniform(-0.5, 1.5, 2000), np.arange(257) / 256])[:, None]
    return np.concatenate([Q01 + fraction * (Q99 - Q01), [Q01, Q99]]).astype(np.float32)


# a processor that comes from a checkpoint holds them so
QUANTILES = Quantiles(Q01.astype(np.float64), Q99.astype(np.float64))


def normalizer(step: type) -> object:
    return step(
        features={"action": PolicyFeature(FeatureType.ACTION, (5,))},
        norm_map={FeatureType.ACTION: NormalizationMode.QUANTILES},
        stats={"action": {"q01": torch.from_numpy(Q01), "q99": torch.from_numpy(Q99)}},
    )


def applied(step: object, values: np.ndarray) -> np.ndarray:
    return step({TransitionKey.ACTION: torch.from_numpy(values)})[TransitionKey.ACTION].numpy()  # type: ignore[operator]


def test_quantile_normalisation_is_lerobots_to_the_last_bit(values: np.ndarray) -> None:
    found = QUANTILES.normalize(values)
    np.testing.assert_array_equal(found, applied(normalizer(NormalizerProcessorStep), values))


def test_normalised_state_falls_in_lerobots_bins(values: np.ndarray) -> None:
    """A last-bit difference would put a value that lies on an edge in the next bin, which is another token."""
    found = AS_LEROBOT.state(Frame(state=QUANTILES.normalize(values).ravel()))
    expected = AS_LEROBOT.state(Frame(state=applied(normalizer(NormalizerProcessorStep), values).ravel()))
    assert found == expected


def test_unnormalisation_is_lerobots_to_the_last_bit(values: np.ndarray) -> None:
    found = QUANTILES.unnormalize(values)
    np.testing.assert_array_equal(found, applied(normalizer(UnnormalizerProcessorStep), values))


# --- images


@pytest.mark.parametrize(
    "size", [(64, 64), (56, 56), (480, 640), (640, 480), (17, 300), (300, 7), (1, 1), (55, 56), (224, 100)]
)
def test_resized_and_padded_image_is_lerobots(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = resize_with_pad_torch(images.permute(0, 2, 3, 1), 56, 56).permute(0, 3, 1, 2)
    torch.testing.assert_close(resize_with_pad(images, (56, 56)), expected, rtol=0, atol=0)


def test_resized_bytes_are_within_half_a_level_of_lerobots_floats() -> None:
    images = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = resize_with_pad_torch(images.permute(0, 2, 3, 1) / 255, 56, 56).permute(0, 3, 1, 2)
    difference = resize_with_pad(images, (56, 56)).float() - 255 * expected
    assert difference.abs().max() < 0.5001
