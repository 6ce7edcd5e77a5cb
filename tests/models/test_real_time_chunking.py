"""Chunks whose first actions are given: what is trained on, what is read, and what sampling makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pi05_lightning.losses import mean_terms
from pi05_lightning.models.flow_noise import draw_noise, with_noise
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Prefix

from .small import make_batch, small_config, small_model

HORIZON, GIVEN = 6, 2
LATER = slice(GIVEN, None)


@pytest.fixture(scope="module")
def model() -> Pi05:
    return small_model(small_config(horizon=HORIZON))


@pytest.fixture
def batch(model: Pi05) -> Batch:
    """Two rows of two draws, the first actions of all of them given."""
    batch = make_batch(model.config, ["iipps", "ip"], acting=2, draws=2)
    assert batch.time is not None
    time = batch.time[..., None].repeat(1, 1, HORIZON)
    time[..., :GIVEN] = 0
    return replace(batch, time=time)


@pytest.fixture
def prefix(model: Pi05, batch: Batch) -> Prefix:
    with torch.no_grad():
        return model.backbone(batch, need_hidden=False)


def flow(model: Pi05, batch: Batch) -> Tensor:
    found = model(batch, ["flow"])["flow"].values
    assert found is not None
    return found


# --- what is drawn


def test_delays_are_uniform_and_the_rest_of_the_draw_is_as_without() -> None:
    key = torch.arange(3000)
    plain_noise, plain_time = draw_noise(key, seed=0, draws=1, horizon=HORIZON, action_dim=2)
    noise, time = draw_noise(key, seed=0, draws=1, horizon=HORIZON, action_dim=2, max_delay=3)
    assert torch.equal(noise, plain_noise)
    assert torch.equal(time[..., -1], plain_time)
    delay = (time == 0).sum(-1).flatten()
    assert ((time > 0) | (torch.arange(HORIZON) < delay[:, None, None])).all()
    share = delay.bincount() / len(key)
    assert len(share) == 4
    assert (share - 1 / 4).abs().max() < 0.04


def test_delay_of_a_sample_does_not_depend_on_its_batch() -> None:
    options = {"seed": 1, "draws": 2, "horizon": HORIZON, "action_dim": 3, "max_delay": 5}
    together = draw_noise(torch.tensor([5, 9, 2]), **options)[1]
    assert torch.equal(together[1], draw_noise(torch.tensor([9]), **options)[1][0])


def test_of_a_chunk_that_ends_early_not_all_actions_are_given(batch: Batch) -> None:
    mask = torch.arange(HORIZON)[:, None] < 2
    short = replace(batch, action_mask=mask.expand(batch.actions.shape))
    drawn = with_noise(short, seed=0, draws=32, max_delay=HORIZON - 1)
    delay = (drawn.time == 0).sum(-1)
    assert set(delay.unique().tolist()) == {0, 1}


# --- training


def test_loss_is_the_mean_over_the_actions_that_are_not_given(model: Pi05, batch: Batch) -> None:
    terms = model(batch, ["flow"])
    mean = mean_terms(terms, {"flow": terms["flow"].mask.sum()})[0]["flow"]
    torch.testing.assert_close(mean, terms["flow"].values[:, :, LATER].mean())


def test_padding_and_given_actions_are_both_left_out(model: Pi05, batch: Batch) -> None:
    mask = batch.action_mask.clone()
    mask[0, 4:] = False
    counted = model(replace(batch, action_mask=mask), ["flow"])["flow"].mask.any(-1)
    assert counted.tolist() == [[[False, False, True, True, False, False]] * 2, [[False] * 2 + [True] * 4] * 2]


def test_given_actions_are_read_without_noise(model: Pi05, batch: Batch) -> None:
    assert batch.noise is not None
    noise = batch.noise.clone()
    noise[:, :, :GIVEN] += 1
    assert torch.equal(flow(model, replace(batch, noise=noise))[:, :, LATER], flow(model, batch)[:, :, LATER])
    actions = batch.actions.clone()
    actions[:, :GIVEN] += 1
    assert (flow(model, replace(batch, actions=actions))[:, :, LATER] != flow(model, batch)[:, :, LATER]).any()


# --- sampling


def test_given_actions_come_back_as_they_are_and_the_others_go_on_from_them(model: Pi05, prefix: Prefix) -> None:
    noise = torch.randn(2, 3, HORIZON, 4)
    given, count = torch.randn(2, HORIZON, 4), torch.tensor([GIVEN, GIVEN])
    chunk = model.flow_head.sample(prefix, noise, 4, given, count)
    assert torch.equal(chunk[:, :, :GIVEN], given[:, None, :GIVEN].expand(-1, 3, -1, -1))
    assert (chunk[:, :, LATER] != model.flow_head.sample(prefix, noise, 4)[:, :, LATER]).any(-1).all()
    beyond = given.clone()
    beyond[:, LATER] += 1
    assert torch.equal(model.flow_head.sample(prefix, noise, 4, beyond, count), chunk)


def test_nothing_given_is_plain_sampling(model: Pi05, prefix: Prefix) -> None:
    noise = torch.randn(2, 1, HORIZON, 4)
    chunk = model.flow_head.sample(prefix, noise, 4, torch.randn(2, HORIZON, 4), torch.tensor([0, 0]))
    assert torch.equal(chunk, model.flow_head.sample(prefix, noise, 4))


def test_rows_may_differ_in_how_much_is_given(model: Pi05, prefix: Prefix) -> None:
    noise, given = torch.randn(2, 1, HORIZON, 4), torch.randn(2, HORIZON, 4)
    mixed = model.flow_head.sample(prefix, noise, 4, given, torch.tensor([1, 5]))
    for row, count in enumerate((1, 5)):
        alike = model.flow_head.sample(prefix, noise, 4, given, torch.tensor([count, count]))
        torch.testing.assert_close(mixed[row], alike[row])


def test_a_sampling_step_is_the_velocity_that_training_sees(model: Pi05, batch: Batch, prefix: Prefix) -> None:
    """One Euler step from t = 1, with given actions, against the squared error of the training pass."""
    assert batch.noise is not None
    assert batch.time is not None
    time = torch.where(batch.time > 0, 1.0, 0.0)
    chunk = model.flow_head.sample(prefix, batch.noise, 1, batch.actions, torch.tensor([GIVEN, GIVEN]))
    velocity = batch.noise - chunk
    error = (velocity - (batch.noise - batch.actions[:, None])).square()
    torch.testing.assert_close(error[:, :, LATER], flow(model, replace(batch, time=time))[:, :, LATER])


def test_a_trained_chunk_goes_on_from_what_is_given() -> None:
    """Two ways to act, told apart by their first actions alone: given one's, the rest must be that one's."""
    torch.manual_seed(0)
    model = small_model(small_config(depth=1, horizon=4, action_dim=1))
    batch = make_batch(model.config, ["p"] * 16, acting=16)
    way = torch.where(torch.arange(16) % 2 == 0, 1.0, -1.0)
    actions = way[:, None, None].expand(16, 4, 1)
    optimizer = torch.optim.AdamW(model.flow_head.parameters(), lr=1e-2)
    with torch.no_grad():
        prefix = model.backbone(replace(batch, tokens=batch.tokens[:1].expand(16, -1)), need_hidden=False)
    for step in range(80):
        noise, time = draw_noise(torch.arange(16) + 16 * step, 0, 1, 4, 1, max_delay=2)
        error = model.flow_head.squared_error(prefix, actions, noise, time)
        optimizer.zero_grad()
        error[(time > 0)[..., None]].mean().backward()
        optimizer.step()
    chunk = model.flow_head.sample(prefix, torch.randn(16, 8, 4, 1), 10, actions, torch.full((16,), 2))
    right = (chunk.sign() == way[:, None, None, None]).float()
    assert right[:, :, 2:].mean() > 0.95
