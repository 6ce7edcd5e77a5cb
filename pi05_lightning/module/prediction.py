"""What the policies do that the weights of today give, over the frames of datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pi05_lightning.acting import Acting
from pi05_lightning.acting.inference import Inference
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.samples import Observed
from pi05_lightning.models.flow_noise import draw_noise
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.abilities import Trained


@dataclass
class Predicted:
    """What a policy would do at each frame of a batch.

    actions: f32[B T A] in the robot's units, absolute.  subtasks: what it said it would do, which conditioned the
    actions; None where the task alone did.
    """

    actions: np.ndarray
    subtasks: list[str | None]


class Predictor:
    """A policy for each of several data sources, which acts as the robot that the source is of.

    sources: by name, the cameras of each, as data of the same robot may have others.
    Raises ValueError for what the policies cannot do, see `Inference`.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[str]],
        model: Pi05,
        processor: Processor,
        acting: Acting,
        seed: int,
        trained: Trained,
    ) -> None:
        self.seed = seed
        self._policies = dict[str, Inference]()
        for name, cameras in sources.items():
            same_as = processor.robots[name].same_as
            policy = Inference(model, processor, replace(acting, robot=same_as or name), seed, trained)
            if same_as:
                policy.inputs = policy.inputs.seen_by(cameras)
            self._policies[name] = policy

    def predict(self, batch: Observed) -> Predicted:
        """Raises ValueError, with the place of the frames, where the policy refuses one, or its own chunk."""
        policy = self._policies[batch.source]
        config = policy.model.config
        subtasks: list[str | None] = [None] * len(batch.frames)
        if not batch.frames:
            return Predicted(np.zeros((0, policy.horizon, policy.action_dim), np.float32), subtasks)
        noise, _ = draw_noise(torch.tensor(batch.keys), self.seed, 1, config.horizon, config.action_dim)
        try:
            if policy.hierarchical:
                subtasks = list(policy.predict_subtasks(batch.frames))
            chunks = policy.predict_chunks(batch.frames, subtasks, policy.acting.noise_scale * noise[:, 0])
        except ValueError as error:
            raise ValueError(
                f"data.sources.{batch.source}, a frame from {batch.places[0]} to {batch.places[-1]}: {error}"
            ) from error
        return Predicted(chunks, subtasks)
