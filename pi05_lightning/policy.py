"""What a robot or a simulator calls: observations in, actions in the robot's units out."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pi05_lightning import checkpoint
from pi05_lightning.types import Batch, Frame

Observation = Mapping[str, Any]
"""{"image": u8|f32[3 H W] or [1 3 H W] or {camera: …}, "state": f32[S], "task": str}; float images are in [0, 1]."""


class Pi05Policy:
    """π0.5 at inference.

    Args:
        model_path: a checkpoint file, a run's directory (its newest checkpoint) or an exported folder.
        policy_type: `pi0.5`, the only one there is.
        backbone_type, obs_dim, action_dim, image_dim: what the caller expects of the checkpoint; an error if it is not
            so. Images of any height and width are resized to the model's.
        use_flow_matching: sample actions with the flow head; otherwise decode them from FAST tokens.
        use_fast_tokens: the checkpoint must have a FAST tokenizer.
        pred_horizon: actions of a chunk that `predict` hands out before it asks for the next; by default all.
        hierarchical: a subtask is predicted from the task and conditions the actions; otherwise the task alone does.
        replan_subtask_every: chunks that a predicted subtask lasts.
        num_steps: Euler steps of the flow head.
        seed: of the noise.
        device: where the model runs.

    Raises ValueError when there is no policy at `model_path`, or another than expected.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        policy_type: Literal["pi0.5"] = "pi0.5",
        backbone_type: str | None = None,
        use_fast_tokens: bool = False,
        use_flow_matching: bool = True,
        obs_dim: int | None = None,
        action_dim: int | None = None,
        image_dim: Sequence[int] | None = None,
        pred_horizon: int | None = None,
        hierarchical: bool = True,
        replan_subtask_every: int = 1,
        num_steps: int = 10,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        model, self.processor = checkpoint.load(model_path)
        self.model = model.to(device).eval()
        self.robot = next(iter(self.processor.robots))
        normalize = self.processor.robots[self.robot].normalize
        expected = {
            "policy_type": (policy_type, "pi0.5"),
            "backbone_type": (backbone_type, model.config.backbone_type),
            "obs_dim": (obs_dim, len(normalize.state.q01)),
            "action_dim": (action_dim, len(normalize.action.q01)),
            "image_dim's channels": (image_dim[0] if image_dim else None, 3),
        }
        for name, (wanted, found) in expected.items():
            if wanted not in (None, found):
                raise ValueError(f"{name} is {found} in {model_path}, not {wanted}: correct it or leave it out")
        if (use_fast_tokens or not use_flow_matching) and self.processor.fast is None:
            raise ValueError(f"{model_path} has no FAST tokenizer: leave out use_fast_tokens, or train with data.fast")
        self.execution_horizon = pred_horizon or model.config.horizon
        if not 1 <= self.execution_horizon <= model.config.horizon:
            raise ValueError(f"pred_horizon {pred_horizon} is not within 1 and the model's {model.config.horizon}")
        self.use_flow_matching, self.num_steps = use_flow_matching, num_steps
        self.hierarchical, self.replan_subtask_every = hierarchical, replan_subtask_every
        self.generator = torch.Generator().manual_seed(seed)
        self.reset()

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Pi05Policy:
        """The policy at a path; the options are the constructor's."""
        return cls(path, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Export weights, dimensions and processor into a folder that `from_pretrained` reads."""
        checkpoint.save(folder, self.model, self.processor)

    def to_device(self, device: str | torch.device) -> Pi05Policy:
        self.model.to(device)
        return self

    def reset(self) -> None:
        """Forget the action queue and the subtask: call it between episodes."""
        self.subtask: str | None = None
        self._queue: deque[np.ndarray] = deque()
        self._chunks = 0

    # --- what a robot calls

    def predict(self, observation: Observation) -> np.ndarray:
        """The next action f32[A] in the robot's units; runs the chunk queue."""
        if not self._queue:
            self._queue.extend(self.predict_chunk(observation)[: self.execution_horizon])
        return self._queue.popleft()

    def predict_chunk(self, observation: Observation, noise: Tensor | np.ndarray | None = None) -> np.ndarray:
        """An action chunk f32[T A] in the robot's units; noise f32[T D] makes it reproducible."""
        frame = self.frame(observation)
        if self.hierarchical and self._chunks % self.replan_subtask_every == 0:
            self.subtask = self.predict_subtasks([frame])[0]
        self._chunks += 1
        return self.predict_chunks([frame], [self.subtask], None if noise is None else torch.as_tensor(noise)[None])[0]

    def predict_subtask(self, observation: Observation) -> str:
        """What to do next, in words."""
        return self.predict_subtasks([self.frame(observation)])[0]

    def prepare(self, observation: Observation | Sequence[Observation]) -> Batch:
        """Exactly the tensors that the model gets, of one observation or of a list of them, conditioned on the task."""
        several = [observation] if isinstance(observation, Mapping) else observation
        frames = [self.frame(one) for one in several]
        return self.processor.collate([self.processor.prompt(frame, self.robot) for frame in frames])

    # --- many robots at once

    def predict_chunks(
        self, frames: Sequence[Frame], subtasks: Sequence[str | None], noise: Tensor | None = None
    ) -> np.ndarray:
        """One chunk per frame, f32[B T A] in the robot's units, each conditioned on its subtask (None: on the task).

        noise f32[B T D] makes it reproducible.
        """
        fast = not self.use_flow_matching
        samples = [
            self.processor.prompt(frame, self.robot, subtask, fast=fast)
            for frame, subtask in zip(frames, subtasks, strict=True)
        ]
        batch = self.processor.collate(samples)
        actions = self.sample_actions(batch, noise).numpy() if self.use_flow_matching else self.decode_actions(batch)
        return np.stack([self.processor.real_actions(a, f, self.robot) for a, f in zip(actions, frames, strict=True)])

    @torch.no_grad()
    def predict_subtasks(self, frames: Sequence[Frame]) -> list[str]:
        """What to do next, for each frame."""
        batch = self.processor.collate([self.processor.prompt(f, self.robot, high_level=True) for f in frames])
        prefix = self.model.backbone(batch.to(self.model.device))
        tokenizer, template = self.processor.tokenizer, self.processor.language.prompts.subtask
        opening = template.split("{subtask}")[0]
        tokens, valid, _ = self.model.subtask_head.generate(self.model.backbone, prefix)
        said = [tokenizer.decode(row[mask].tolist()) for row, mask in zip(tokens, valid, strict=True)]
        return [text.strip().removeprefix(opening.strip()).strip() for text in said]

    @torch.no_grad()
    def sample_actions(self, batch: Batch, noise: Tensor | None = None) -> Tensor:
        """Normalised actions f32[B T D] for a prepared batch."""
        config = self.model.config
        if noise is None:
            noise = torch.randn(len(batch), config.horizon, config.action_dim, generator=self.generator)
        device = self.model.device
        prefix = self.model.backbone(batch.to(device), need_hidden=False)
        return self.model.flow_head.sample(prefix, noise[:, None].to(device), self.num_steps)[:, 0].cpu()

    @torch.no_grad()
    def decode_actions(self, batch: Batch) -> np.ndarray:
        """Normalised actions f32[B T A] for a prepared batch from FAST tokens, which are made to decode."""
        fast, tokenizer = self.processor.fast, self.processor.tokenizer
        assert fast is not None
        horizon, dims = self.model.config.horizon, len(self.processor.robots[self.robot].normalize.action.q01)
        device = self.model.device
        tokens, valid = self.model.fast_head.generate(
            self.model.backbone,
            self.model.backbone(batch.to(device)),
            torch.from_numpy(fast.lengths).to(device),
            horizon * dims,
            torch.tensor(tokenizer.encode(self.processor.language.prompts.fast_opening), device=device),
        )
        return np.stack(
            [fast.decode(row[mask].tolist(), horizon, dims) for row, mask in zip(tokens, valid, strict=True)]
        )

    def frame(self, observation: Observation) -> Frame:
        """An observation as a Frame; raises ValueError for what does not fit this policy, by key."""
        if isinstance(observation, Frame):
            return observation
        images = observation.get("image", {})
        if not isinstance(images, Mapping):
            images = {self.processor.cameras[0]: images}
        state = observation.get("state")
        return Frame(
            images={camera: _image(camera, image) for camera, image in images.items()},
            task=observation.get("task", ""),
            state=None if state is None else np.asarray(state, dtype=np.float32).reshape(-1),
        )


def _image(camera: str, image: Any) -> np.ndarray:
    """As u8[3 H W], or f32[3 H W] of grey levels 0..255 when it was given in [0, 1]."""
    array = np.asarray(image)
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3 or array.shape[0] != 3:
        raise ValueError(f"image {camera!r} has shape {array.shape}: expected [3 H W] or [1 3 H W]")
    if array.dtype == np.uint8:
        return array
    if array.min() < 0 or array.max() > 1:
        warnings.warn(
            f"image {camera!r} has values outside 0..1 and is clipped: give floats in 0..1, or uint8", stacklevel=4
        )
        array = array.clip(0, 1)
    return array.astype(np.float32) * 255
