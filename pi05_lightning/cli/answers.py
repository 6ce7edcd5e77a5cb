"""What a policy answers to some observations, recorded and made up, for another program's answers to be compared."""

from __future__ import annotations

import numpy as np
import torch

from pi05_lightning.acting.frames import made_up_frames, reading, recorded_frames
from pi05_lightning.acting.inference import Inference
from pi05_lightning.weights.lerobot_check import Answers


def answers_of(policy: Inference, data: str | None) -> Answers:
    """What a policy answers to frames of a dataset and to made-up ones, from fixed noise."""
    read = None if data is None else reading(policy.processor.robots[policy.robot], data)
    frames = [*recorded_frames(policy, read), *made_up_frames(policy)]
    config, generator = policy.model.config, torch.Generator().manual_seed(0)
    noise = torch.randn(len(frames), config.horizon, config.action_dim, generator=generator)
    prompts = [policy.processor.prompt(frame, policy.robot).tokens.tolist() for frame in frames]
    chunks = [policy.predict_chunks([frame], [None], noise[[i]])[0] for i, frame in enumerate(frames)]
    return Answers(
        frames, prompts, noise, np.stack(chunks), policy.processor.robots[policy.robot].normalize.action.span
    )
