"""Flow loss, gradients and sampled chunks against LeRobot's π0.5 on the same weights."""

from __future__ import annotations

import pytest
import torch
from lerobot.policies.pi05.modeling_pi05 import PI05Pytorch
from torch import Tensor

from pi05_lightning.models import kernels
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.lerobot import to_ours

from .reference import Inputs, make_inputs, relative_error

TOLERANCE = 1e-4

# cameras present per row, prompt lengths, length to which LeRobot pads
BATCHES = {
    "one_row": ([[True]], [7], 16),
    "all_present": ([[True, True, True]] * 2, [9, 9], 9),
    "each_camera_absent": (
        [[False, True, True], [True, False, True], [True, True, False], [False, False, True]],
        [1, 200, 30, 77],
        200,
    ),
    "only_one_camera_each": ([[False, True], [True, False], [False, True]], [3, 4, 5], 12),
    "a_row_without_cameras": ([[False, False], [True, True]], [6, 4], 8),
    "eight_rows_four_cameras": (
        [[i % 2 == 0, i % 3 > 0, i != 5, i < 4] for i in range(8)],
        [1, 200, 2, 60, 199, 3, 14, 121],
        200,
    ),
}


@pytest.fixture(params=[kernels.MIN_MULTIPLICATIONS, 1], ids=["pytorch", "onednn"], autouse=True)
def every_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """These sizes are all below what goes to oneDNN."""
    monkeypatch.setattr(kernels, "MIN_MULTIPLICATIONS", request.param)


@pytest.fixture(params=BATCHES.values(), ids=BATCHES.keys())
def inputs(request: pytest.FixtureRequest, config: ModelConfig) -> Inputs:
    present, lengths, padded = request.param
    return make_inputs(config, present, lengths, padded_length=padded)


def lerobot_loss(model: PI05Pytorch, x: Inputs) -> Tensor:
    return model(x.images, x.image_masks, x.tokens, x.token_mask, x.actions, x.noise, x.time)


def test_flow_loss_is_lerobots_element_by_element(lerobot: PI05Pytorch, ours: Pi05, inputs: Inputs) -> None:
    with torch.no_grad():
        expected = lerobot_loss(lerobot, inputs)
        flow = ours(inputs.batch, ["flow"])["flow"].values
    assert flow is not None
    assert relative_error(flow[:, 0], expected) < TOLERANCE


def test_every_gradient_is_lerobots(lerobot: PI05Pytorch, ours: Pi05, inputs: Inputs) -> None:
    lerobot.zero_grad()
    ours.zero_grad()
    lerobot_loss(lerobot, inputs).mean().backward()
    flow = ours(inputs.batch, ["flow"])["flow"].values
    assert flow is not None
    flow.mean().backward()
    expected = {to_ours(name): p.grad for name, p in lerobot.named_parameters() if to_ours(name)}
    found = dict(ours.named_parameters())
    assert expected.keys() == found.keys()

    scale = max(grad.abs().max() for grad in expected.values() if grad is not None)
    wrong = {}
    for name, parameter in found.items():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        reference = torch.zeros_like(parameter) if expected[name] is None else expected[name]
        assert reference is not None
        # k_proj.bias shifts all of SigLIP's logits of a query alike, so in theory its gradient is zero; so is that of
        # a single key, or of what no row reads
        if reference.abs().max() < 1e-7 * scale:
            error = grad.abs().max() / scale
        else:
            error = torch.tensor(relative_error(grad, reference))
        if error > TOLERANCE:
            wrong[name] = error.item()
    assert not wrong


def test_sampled_chunk_is_lerobots(lerobot: PI05Pytorch, ours: Pi05, inputs: Inputs) -> None:
    expected = lerobot.sample_actions(
        inputs.images, inputs.image_masks, inputs.tokens, inputs.token_mask, noise=inputs.noise, num_steps=10
    )
    assert inputs.batch.noise is not None
    with torch.no_grad():
        prefix = ours.backbone(inputs.batch, need_hidden=False)
    chunk = ours.flow_head.sample(prefix, inputs.batch.noise, num_steps=10)[:, 0]
    assert relative_error(chunk, expected) < TOLERANCE


@pytest.mark.parametrize("num_steps", [1, 3])
def test_sampling_takes_any_number_of_steps(
    lerobot: PI05Pytorch, ours: Pi05, config: ModelConfig, num_steps: int
) -> None:
    x = make_inputs(config, [[True, False], [True, True]], [5, 11], padded_length=11)
    expected = lerobot.sample_actions(
        x.images, x.image_masks, x.tokens, x.token_mask, noise=x.noise, num_steps=num_steps
    )
    assert x.batch.noise is not None
    with torch.no_grad():
        prefix = ours.backbone(x.batch, need_hidden=False)
    assert relative_error(ours.flow_head.sample(prefix, x.batch.noise, num_steps)[:, 0], expected) < TOLERANCE
