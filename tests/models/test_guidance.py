"""Classifier-free guidance of the flow: v_u + β (v_c - v_u), from one prefix of twice the rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch

from .small import make_batch, small_config, small_model

ROWS = 2


@pytest.fixture(scope="module")
def model() -> Pi05:
    return small_model(small_config())


@pytest.fixture
def both(model: Pi05) -> Batch:
    """Two rows that are told something, and two others that are not."""
    return make_batch(model.config, ["ipspp", "iipp", "ips", "iip"])


@pytest.fixture
def noise(model: Pi05) -> Tensor:
    shape = ROWS, model.config.horizon, model.config.action_dim
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def velocity(model: Pi05, batch: Batch, rows: slice, x: Tensor, t: float) -> Tensor:
    prefix = model.backbone(batch, need_hidden=False)
    prefix.kv = [(k[rows], v[rows]) for k, v in prefix.kv]
    prefix.mask, prefix.flow_mask = prefix.mask[rows], prefix.flow_mask[rows]
    time = torch.full((1, 1), t)
    with torch.no_grad():
        return model.flow_head(x[:, None], model.flow_head.modulate(time), prefix)[:, 0]


@pytest.mark.parametrize("guidance", [0.0, 0.5, 2.5])
def test_every_step_goes_from_the_one_velocity_to_the_other_and_beyond(
    model: Pi05, both: Batch, noise: Tensor, guidance: float
) -> None:
    x = noise
    for t in (1.0, 0.5):
        led, free = (velocity(model, both, rows, x, t) for rows in (slice(ROWS), slice(ROWS, None)))
        x = x - 0.5 * (free + guidance * (led - free))
    torch.testing.assert_close(model.chunk(both, noise, 2, guidance=guidance), x, rtol=1e-4, atol=1e-5)


def test_guidance_changes_what_is_done(model: Pi05, both: Batch, noise: Tensor) -> None:
    assert not torch.allclose(model.chunk(both, noise, 2, guidance=2.0), model.chunk(both, noise, 2, guidance=0.0))


def test_given_actions_come_back_as_they_are(model: Pi05, both: Batch, noise: Tensor) -> None:
    given, count = torch.ones_like(noise), torch.tensor([1, 2])
    chunk = model.chunk(both, noise, 3, given, count, guidance=1.5)
    assert (chunk[0, :1] == 1).all()
    assert (chunk[1, :2] == 1).all()
    assert not (chunk[0, 1:] == 1).any()


def test_one_robot_is_led_as_several_are(model: Pi05, both: Batch, noise: Tensor) -> None:
    one = make_batch(model.config, ["ipspp", "ips"])
    alone = model.chunk(make_batch(model.config, ["ipspp"]), noise[:1], 2)
    assert not torch.allclose(model.chunk(one, noise[:1], 2, guidance=1.5), alone)
    assert model.chunk(one, noise[:1], 2, guidance=1.5).shape == alone.shape
