"""How far chunks of few calls of the flow head are from those of a hundred Euler steps, by the way of integrating."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor

from pi05_lightning.acting import Acting
from pi05_lightning.acting.frames import recorded_frames
from pi05_lightning.acting.inference import Inference
from pi05_lightning.files.local import write_json
from pi05_lightning.weights.locate import locate

Velocity = Callable[[Tensor, float], Tensor]
"""Of noisy actions at a time of the flow, which goes from 1 to 0."""

CALLS = (1, 2, 3, 4, 5, 6, 8, 10, 20)
REFERENCE = 100


def euler(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    for step in range(steps):
        x = x - velocity(x, 1 - step / steps) / steps
    return x


def midpoint(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Two calls a step: the velocity half way along an Euler step is taken for all of it."""
    for step in range(steps):
        t = 1 - step / steps
        x = x - velocity(x - velocity(x, t) / (2 * steps), t - 1 / (2 * steps)) / steps
    return x


def heun(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Two calls a step: the mean of the velocities at both ends of an Euler step is taken for all of it."""
    for step in range(steps):
        t = 1 - step / steps
        first = velocity(x, t)
        x = x - (first + velocity(x - first / steps, t - 1 / steps)) / (2 * steps)
    return x


def adams_bashforth(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """One call a step: the velocity goes on as it changed since the last step; the first step is Euler's."""
    before = None
    for step in range(steps):
        now = velocity(x, 1 - step / steps)
        x = x - (now if before is None else 1.5 * now - 0.5 * before) / steps
        before = now
    return x


WAYS = {"Euler": (euler, 1), "midpoint": (midpoint, 2), "Heun": (heun, 2), "Adams-Bashforth": (adams_bashforth, 1)}
"""name -> how, and calls of the flow head a step"""


@torch.no_grad()
def distance(checkpoint: Path, out: Path, frames: int = 64) -> None:
    """Write the root mean square and the maximum of the differences, of actions normalised to -1..1.

    Args:
        checkpoint: of a policy whose demonstrations are where they were.
        out: JSON file to write.
        frames: of its demonstrations, evenly spaced.
    """
    weights = locate(checkpoint)
    policy = Inference(weights.model(torch.float32), weights.processor(), Acting(), trained=weights.trained)
    seen = recorded_frames(policy, None, frames)
    if not seen:
        raise SystemExit(f"{checkpoint}: its demonstrations are not here")
    prompts = [policy.processor.prompt(frame, policy.robot, None) for frame in seen]
    batch = policy.processor.collate(prompts)
    model, config = policy.model, policy.model.config
    noise = torch.randn(len(seen), 1, config.horizon, config.action_dim, generator=torch.Generator().manual_seed(0))
    context = model.flow_head.context(model.backbone(batch), noise)
    dims = policy.processor.robots[policy.robot].action_dim

    def velocity(x: Tensor, t: float) -> Tensor:
        return model.flow_head.velocity(x, model.flow_head.modulate(torch.tensor([[t]])), context)

    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for name, start in (("without noise", torch.zeros_like(noise)), ("noise of scale 1", noise)):
        exact = euler(velocity, start, REFERENCE)
        found[name] = {way: {} for way in WAYS}
        for way, (integrate, calls) in WAYS.items():
            for number in (n for n in CALLS if n % calls == 0):
                error = (integrate(velocity, start, number // calls) - exact)[..., :dims]
                found[name][way][number] = [float(error.square().mean().sqrt()), float(error.abs().max())]
                print(f"{name}, {way}, {number} calls: rms {found[name][way][number][0]:.4f},", end=" ")
                print(f"at most {found[name][way][number][1]:.3f}")
    write_json(out, found)


if __name__ == "__main__":
    auto_cli(distance)
