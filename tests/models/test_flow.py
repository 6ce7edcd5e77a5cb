"""The flow head: interpolation, noise draws, per-step time, sampling, insulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pi05_lightning.models.heads.flow import interpolate, time_features
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch

from .small import make_batch, small_model, token_nll


@pytest.fixture
def model() -> Pi05:
    return small_model()


def gradients(model: Pi05, batch: Batch, **options: bool) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    out = model(batch, ["flow"], **options)["flow"].values
    assert out is not None
    out.mean().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_path_runs_from_actions_at_0_to_noise_at_1() -> None:
    noise, actions = torch.randn(2, 1, 3, 4), torch.randn(2, 3, 4)
    for t, end in ((0.0, actions[:, None]), (1.0, noise)):
        x_t, velocity = interpolate(noise, actions, torch.full((2, 1), t))
        torch.testing.assert_close(x_t, end)
        torch.testing.assert_close(velocity, noise - actions[:, None])


def test_time_features_resolve_the_shortest_period() -> None:
    t = torch.tensor([0.5, 0.5005])
    exact = torch.sin(2 * torch.pi / 4e-3 * t.double())
    torch.testing.assert_close(time_features(t, 16)[:, 0].double(), exact, atol=1e-6, rtol=0)


def test_dims_beyond_the_robots_are_trained_and_steps_past_the_end_are_not(model: Pi05) -> None:
    batch = make_batch(model.config, ["iipps", "ip"], acting=2)
    mask = torch.ones_like(batch.action_mask)
    mask[..., 1:] = False
    mask[0, 2:] = False
    counted = model(replace(batch, action_mask=mask), ["flow"])["flow"].mask
    assert counted.all(-1).equal(counted.any(-1))
    assert counted[0, :, :2].all()
    assert not counted[0, :, 2:].any()
    assert counted[1].all()


def test_steps_that_are_padding_are_seen_by_no_other(model: Pi05) -> None:
    batch = make_batch(model.config, ["iipps", "ip"], acting=2, draws=2)
    assert batch.noise is not None
    mask = batch.action_mask.clone()
    mask[0, 2:] = False

    def error(actions: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        values = model(replace(batch, actions=actions, noise=noise, action_mask=mask), ["flow"])["flow"].values
        assert values is not None
        return values

    expected, actions, noise = error(batch.actions, batch.noise), batch.actions.clone(), batch.noise.clone()
    actions[0, 2:], noise[0, :, 2:] = 3, -2
    found = error(actions, noise)
    torch.testing.assert_close(found[0, :, :2], expected[0, :, :2])
    torch.testing.assert_close(found[1], expected[1])
    assert not torch.allclose(found[0, :, 2:], expected[0, :, 2:])


def test_a_shorter_chunk_is_computed_as_it_was_trained(model: Pi05) -> None:
    batch = make_batch(model.config, ["iipps"], acting=1)
    assert batch.noise is not None
    head, prefix = model.flow_head, model.backbone(batch)
    steps = torch.arange(batch.noise.shape[2]) < 2
    whole = head(batch.noise, head.modulate(torch.full((1, 1), 0.7)), prefix, steps[None])
    short = head(batch.noise[:, :, :2], head.modulate(torch.full((1, 1), 0.7)), prefix)
    torch.testing.assert_close(short, whole[:, :, :2])


def test_k_draws_are_the_mean_of_k_passes(model: Pi05) -> None:
    batch = make_batch(model.config, ["iipps", "ip", "pptt"], acting=2, draws=3)
    assert batch.noise is not None
    assert batch.time is not None
    together = model(batch, ["flow"])["flow"].values
    grads = gradients(model, batch)
    losses, separate = [], []
    for k in range(3):
        one = replace(batch, noise=batch.noise[:, k : k + 1], time=batch.time[:, k : k + 1])
        losses.append(model(one, ["flow"])["flow"].values)
        separate.append(gradients(model, one))
    torch.testing.assert_close(together, torch.cat(losses, 1))
    for name, grad in grads.items():
        if grad is not None:
            mean = sum(part[name] for part in separate) / 3
            torch.testing.assert_close(grad, mean, msg=lambda text, name=name: f"{name}: {text}")


def test_time_per_step_equals_time_per_row_where_all_steps_share_it(model: Pi05) -> None:
    batch = make_batch(model.config, ["ip", "iip"], acting=2, draws=2)
    assert batch.time is not None
    per_step = replace(batch, time=batch.time[..., None].expand(-1, -1, model.config.horizon))
    torch.testing.assert_close(model(per_step, ["flow"])["flow"].values, model(batch, ["flow"])["flow"].values)


def test_time_per_step_modulates_each_step_by_its_own(model: Pi05) -> None:
    t = torch.rand(1, 1, model.config.horizon)
    per_step = model.flow_head.modulate(t)
    for step in range(model.config.horizon):
        for table, own in zip(per_step, model.flow_head.modulate(t[..., step]), strict=True):
            torch.testing.assert_close(table[:, :, step], own[:, :, 0])


def test_draws_are_sampled_as_if_alone(model: Pi05) -> None:
    batch = make_batch(model.config, ["iip", "p"], acting=2, draws=2)
    assert batch.noise is not None
    with torch.no_grad():
        prefix = model.backbone(batch, need_hidden=False)
    both = model.flow_head.sample(prefix, batch.noise, num_steps=4)
    for k in range(2):
        alone = model.flow_head.sample(prefix, batch.noise[:, k : k + 1], num_steps=4)
        torch.testing.assert_close(both[:, k : k + 1], alone)


def test_insulated_flow_loss_gives_the_backbone_no_gradient(model: Pi05) -> None:
    grads = gradients(model, make_batch(model.config, ["iipps"], acting=1), insulate=True)
    assert all(grad is None for name, grad in grads.items() if name.startswith("backbone."))
    assert all(grad is not None for name, grad in grads.items() if name.startswith("flow_head."))


def test_insulation_leaves_the_flow_loss_and_the_experts_gradient_as_they_are(model: Pi05) -> None:
    batch = make_batch(model.config, ["iipps"], acting=1)
    assert torch.equal(model(batch, insulate=True)["flow"].values, model(batch)["flow"].values)
    free, insulated = gradients(model, batch), gradients(model, batch, insulate=True)
    for name, grad in insulated.items():
        if name.startswith("flow_head."):
            torch.testing.assert_close(grad, free[name])


def test_without_insulation_everything_that_can_influence_the_actions_gets_gradient(model: Pi05) -> None:
    grads = gradients(model, make_batch(model.config, ["iipps"], acting=1))
    last = model.config.language.depth - 1
    # the last layer gives its keys and values; what it computes after them no action depends on
    after = (f"layers.{last}.self_attn.q_", f"layers.{last}.self_attn.o_", f"layers.{last}.post", f"layers.{last}.mlp")
    for name, grad in grads.items():
        if name.startswith(tuple(f"backbone.{part}" for part in (*after, "norm."))):
            assert grad is None, name
        else:
            assert grad is not None, name


def test_insulation_stops_only_the_flow_loss(model: Pi05) -> None:
    batch = make_batch(model.config, ["iippss"], acting=1)
    model.zero_grad()
    out = model(batch, insulate=True)
    (token_nll(out).mean() + out["flow"].values.mean()).backward()
    assert all(p.grad is not None for p in model.parameters())
