"""What a robot or a simulator calls: observations in, actions in the robot's units out."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pi05_lightning.data.fast import FastDecodeError
from pi05_lightning.data.processor import Processor
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Frame
from pi05_lightning.weights.abilities import UNKNOWN
from pi05_lightning.weights.folder import save
from pi05_lightning.weights.locate import locate

Observation = Mapping[str, Any]
"""{"image": u8|f32[3 H W] or [1 3 H W] or {camera: …}, "state": f32[S], "task": str}; float images are in [0, 1]."""


class Pi05Policy:
    """π0.5 at inference.

    Args:
        model_path: a checkpoint file, a run's directory (its newest checkpoint), an exported folder, or a folder of
            LeRobot's or openpi's (PyTorch), or its Hub id; or a model and its processor themselves.
        policy_type: `pi0.5`, the only one there is.
        backbone_type, obs_dim, action_dim, image_dim: what the caller expects of the checkpoint; an error if it is not
            so. Images of any height and width are resized to the model's.
        use_flow_matching: sample actions with the flow head; otherwise decode them from FAST tokens.
        use_fast_tokens: the checkpoint must have a FAST tokenizer.
        pred_horizon: actions of a chunk that `predict` hands out before it asks for the next; by default all that are
            not handed out already.
        inference_delay: actions that `predict` still hands out while the next chunk is computed in the background.
            They are given to the flow head, so that the next chunk goes on from them (real-time chunking); train with
            `rtc_max_delay` of at least as many.
        hierarchical: a subtask is predicted from the task and conditions the actions; otherwise the task alone does,
            as it always does for a policy that was trained on tasks alone, or on data without subtasks.
        replan_subtask_every: chunks that a predicted subtask lasts.
        num_steps: Euler steps of the flow head.
        noise_scale: of the noise that the flow starts from; 0 starts from its mean, which draws nothing.
        temperature: of subtask and FAST tokens; 0 takes the likeliest.
        constrain_fast: FAST tokens are chosen among those that can still become a chunk, so that they always decode.
        on_failed_decode: what to do with FAST tokens that are no chunk: `raise` FastDecodeError, or `count` them in
            `failed_decodes` and return NaN.
        seed: of noise and sampled tokens.
        device: where the model runs.
        dtype: what the weights are cast to on loading, such as torch.bfloat16; by default they stay as they are.
        tokenizer: of a LeRobot or openpi folder: the local folder of PaliGemma's tokenizer.
        averaged: use a training checkpoint's averaged weights (`ema.decay`) if it has them.

    Raises ValueError when there is no policy at `model_path`, or another than expected.
    """

    def __init__(
        self,
        model_path: str | Path | tuple[Pi05, Processor],
        *,
        policy_type: Literal["pi0.5"] = "pi0.5",
        backbone_type: str | None = None,
        use_fast_tokens: bool = False,
        use_flow_matching: bool = True,
        obs_dim: int | None = None,
        action_dim: int | None = None,
        image_dim: Sequence[int] | None = None,
        pred_horizon: int | None = None,
        inference_delay: int = 0,
        hierarchical: bool = True,
        replan_subtask_every: int = 1,
        num_steps: int = 10,
        noise_scale: float = 1.0,
        temperature: float = 0.0,
        constrain_fast: bool = True,
        on_failed_decode: Literal["raise", "count"] = "raise",
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        tokenizer: str | None = None,
        averaged: bool = True,
    ) -> None:
        if isinstance(model_path, tuple):
            (model, self.processor), self.trained = model_path, UNKNOWN
        else:
            weights = locate(model_path, tokenizer=tokenizer, averaged=averaged)
            self.processor, self.trained = weights.processor(), weights.trained
            model = weights.model(dtype)  # last: it is gigabytes, and what is wrong with the others shows before
        self.model = model.to(device).eval()
        if not self.processor.acting:
            raise ValueError(f"{model_path} was trained on no robot's data: it has no actions to predict")
        self.robot = self.processor.acting[0]
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
        horizon = model.config.horizon
        if not 0 <= inference_delay < horizon:
            raise ValueError(f"inference_delay {inference_delay} is not within 0 and the model's horizon of {horizon}")
        if inference_delay and not use_flow_matching:
            raise ValueError("inference_delay needs the flow head: FAST tokens cannot be made to go on from actions")
        self.inference_delay = inference_delay
        self.execution_horizon = horizon - inference_delay if pred_horizon is None else pred_horizon
        if not 1 <= self.execution_horizon <= horizon - inference_delay:
            raise ValueError(
                f"pred_horizon {pred_horizon} is not within 1 and {horizon - inference_delay}: the model's {horizon}"
                f" actions less {inference_delay} of inference_delay"
            )
        for name, value, least in (
            ("num_steps", num_steps, 1),
            ("replan_subtask_every", replan_subtask_every, 1),
            ("noise_scale", noise_scale, 0),
            ("temperature", temperature, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}: it must be at least {least}")
        self.use_flow_matching, self.num_steps, self.noise_scale = use_flow_matching, num_steps, noise_scale
        self.temperature = temperature
        self.constrain_fast, self.on_failed_decode, self.failed_decodes = constrain_fast, on_failed_decode, 0
        self.hierarchical = hierarchical and self.processor.predicts_subtasks(self.robot)
        self.replan_subtask_every = replan_subtask_every
        self.generator = torch.Generator().manual_seed(seed)
        self._next: Future[np.ndarray] | None = None
        self._worker = ThreadPoolExecutor(1, "next-chunk") if inference_delay else None
        self.reset()

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Pi05Policy:
        """The policy at a path; the options are the constructor's."""
        return cls(path, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Export weights, dimensions and processor into a folder that `from_pretrained` reads."""
        save(folder, self.model, self.processor, self.trained)

    def to_device(self, device: str | torch.device) -> Pi05Policy:
        self.model.to(device)
        return self

    def reset(self) -> None:
        """Forget the action queue and the subtask: call it between episodes."""
        if self._next is not None:
            wait([self._next])  # it counts chunks and draws noise
            self._next = None
        self._given = 0
        self.subtask: str | None = None
        self._queue: deque[np.ndarray] = deque()
        self._chunks = 0

    # --- what a robot calls

    def predict(self, observation: Observation) -> np.ndarray:
        """The next action f32[A] in the robot's units; runs the chunk queue.

        The next chunk starts from the observation at which `inference_delay` actions are left in the queue; what
        happens does not depend on how long computing it takes.
        """
        if not self._queue:
            chunk = self._next.result() if self._next else self.predict_chunk(observation)
            self._queue.extend(chunk[self._given : self._given + self.execution_horizon])
            self._next, self._given = None, 0
        if self._worker and self._next is None and len(self._queue) <= self.inference_delay:
            self._given = len(self._queue)
            self._next = self._worker.submit(self.predict_chunk, observation, None, np.stack(self._queue))
        return self._queue.popleft()

    def predict_chunk(
        self,
        observation: Observation,
        noise: Tensor | np.ndarray | None = None,
        prefix_actions: Tensor | np.ndarray | None = None,
    ) -> np.ndarray:
        """An action chunk f32[T A] in the robot's units; noise f32[T D] makes it reproducible.

        prefix_actions f32[d A], in the robot's units: what it will do in the chunk's first d steps whatever comes out,
        because it executes them meanwhile. The chunk begins with them and goes on from them.
        """
        frame = self.frame(observation)
        if self.hierarchical and self._chunks % self.replan_subtask_every == 0:
            self.subtask = self.predict_subtasks([frame])[0]
        self._chunks += 1
        return self.predict_chunks(
            [frame],
            [self.subtask],
            None if noise is None else torch.as_tensor(noise)[None],
            None if prefix_actions is None else [np.asarray(prefix_actions)],
        )[0]

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
        self,
        frames: Sequence[Frame],
        subtasks: Sequence[str | None],
        noise: Tensor | None = None,
        prefix_actions: Sequence[np.ndarray] | None = None,
    ) -> np.ndarray:
        """One chunk per frame, f32[B T A] in the robot's units, each conditioned on its subtask (None: on the task).

        noise f32[B T D] makes it reproducible.  prefix_actions: per frame f32[d A], see `predict_chunk`; d may differ.
        """
        fast = not self.use_flow_matching
        samples = [
            self.processor.prompt(frame, self.robot, subtask, fast=fast)
            for frame, subtask in zip(frames, subtasks, strict=True)
        ]
        batch = self.processor.collate(samples)
        if fast:
            if prefix_actions is not None:
                raise ValueError("prefix_actions need the flow head: leave them out, or set use_flow_matching")
            actions = self.decode_actions(batch)
        else:
            given = None if prefix_actions is None else self._given_actions(frames, prefix_actions)
            actions = self.sample_actions(batch, noise, given).numpy()
        real = [self.processor.real_actions(a, f, self.robot) for a, f in zip(actions, frames, strict=True)]
        for chunk, first in zip(real, prefix_actions or (), strict=False):
            chunk[: len(first)] = first  # as they are, not normalised and back
        return np.stack(real)

    @torch.no_grad()
    def predict_subtasks(self, frames: Sequence[Frame]) -> list[str]:
        """What to do next, for each frame."""
        batch = self.processor.collate([self.processor.prompt(f, self.robot, high_level=True) for f in frames])
        prefix = self.model.backbone(batch.to(self.model.device))
        tokenizer, template = self.processor.tokenizer, self.processor.language.prompts.subtask
        opening = template.split("{subtask}")[0].strip()  # what may come before it are boxes
        tokens, valid, _ = self.model.subtask_head.generate(
            self.model.backbone, prefix, temperature=self.temperature, generator=self.generator
        )
        said = [tokenizer.decode(row[mask].tolist()) for row, mask in zip(tokens, valid, strict=True)]
        return [(text.rpartition(opening)[2] if opening else text).strip() for text in said]

    @torch.no_grad()
    def sample_actions(
        self, batch: Batch, noise: Tensor | None = None, given: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Normalised actions f32[B T D] for a prepared batch; noise and the given actions as `FlowHead.sample`."""
        config, device = self.model.config, self.model.device
        shape = len(batch), config.horizon, config.action_dim
        if noise is None:
            noise = self.noise_scale * torch.randn(shape, generator=self.generator)
        elif noise.shape != shape:
            raise ValueError(f"noise has shape {list(noise.shape[1:])}: expected [T D] = {list(shape[1:])}")
        prefix = self.model.backbone(batch.to(device), need_hidden=False)
        actions, count = (x.to(device) for x in given) if given else (None, None)
        noise = noise[:, None].to(device)
        return self.model.flow_head.sample(prefix, noise, self.num_steps, actions, count)[:, 0].cpu()

    def _given_actions(self, frames: Sequence[Frame], prefix_actions: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Normalised and padded to chunks f32[B T D], and how many of each are given, i64[B]."""
        config = self.model.config
        dims = len(self.processor.robots[self.robot].normalize.action.q01)
        given = torch.zeros(len(frames), config.horizon, config.action_dim)
        for row, (frame, actions) in enumerate(zip(frames, prefix_actions, strict=True)):
            if actions.ndim != 2 or actions.shape[1] != dims or len(actions) >= config.horizon:
                raise ValueError(
                    f"prefix_actions has shape {list(actions.shape)}: expected [d {dims}] with d below the chunk's"
                    f" {config.horizon} steps"
                )
            normalized = self.processor.normalize(replace(frame, actions=actions), self.robot).actions
            assert normalized is not None
            given[row, : len(actions), :dims] = torch.from_numpy(normalized)
        return given, torch.tensor([len(actions) for actions in prefix_actions])

    @torch.no_grad()
    def decode_actions(self, batch: Batch) -> np.ndarray:
        """Normalised actions f32[B T A] for a prepared batch from FAST tokens.

        Tokens that are no chunk raise FastDecodeError, or are NaN and counted in `failed_decodes`, as configured.
        """
        fast, tokenizer, prompts = self.processor.fast, self.processor.tokenizer, self.processor.language.prompts
        assert fast is not None
        horizon, dims = self.model.config.horizon, len(self.processor.robots[self.robot].normalize.action.q01)
        device = self.model.device
        tokens, valid = self.model.fast_head.generate(
            self.model.backbone,
            self.model.backbone(batch.to(device)),
            torch.from_numpy(fast.lengths).to(device),
            horizon * dims,
            torch.tensor(tokenizer.encode(prompts.fast_opening), device=device),
            closing_id=None if self.constrain_fast else tokenizer.encode(prompts.fast_closing)[0],
            temperature=self.temperature,
            generator=self.generator,
        )
        chunks = np.full((len(batch), horizon, dims), np.nan, dtype=np.float32)
        for row, (said, mask) in enumerate(zip(tokens, valid, strict=True)):
            try:
                chunks[row] = fast.decode(said[mask].tolist(), horizon, dims)
            except FastDecodeError:
                if self.on_failed_decode == "raise":
                    raise
                self.failed_decodes += 1
        return chunks

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
