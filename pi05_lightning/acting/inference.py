"""From observations to actions: what a policy, a rollout, a server and the evaluation ask of a model, written once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from pi05_lightning.acting.options import Acting, check, says_subtasks
from pi05_lightning.data.fast import FastDecodeError
from pi05_lightning.data.observation import Inputs, as_numbers, check_actions
from pi05_lightning.data.places import to_picture
from pi05_lightning.data.processor import Processor
from pi05_lightning.models.capture import CapturedChunk
from pi05_lightning.models.heads.token import Generators
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Frame, Prefix
from pi05_lightning.weights.abilities import UNKNOWN, Trained

Computed = Any
"""Of one frame what the model computes: normalised actions f32[T D], or a list of FAST tokens."""


class PrefixActions(NamedTuple):
    """Actions that a chunk goes on from, f32[d A]: in the robot's units, and normalised."""

    actions: np.ndarray
    normalized: np.ndarray


class Inference:
    """A model and its processor: frames in, subtasks and action chunks out, for any number of robots at once.

    Noise and sampled tokens come from `generator`.  trained: what the model was trained on.
    Frames lack nothing that the robot's data always had, see `Inputs`, and actions that are not finite never leave.
    Raises ValueError where `check` does.
    """

    def __init__(
        self, model: Pi05, processor: Processor, acting: Acting, seed: int = 0, trained: Trained = UNKNOWN
    ) -> None:
        self.model, self.processor, self.trained = model.eval(), processor, trained
        self.generator = torch.Generator().manual_seed(seed)
        self.failed_decodes = 0
        self._chunk: Callable[..., Tensor] = model.chunk
        self._set(acting)
        if acting.hierarchical is None and processor.predicts_subtasks(self.robot) and not self.hierarchical:
            warnings.warn(
                "the policy was not trained to say subtasks, so the task alone conditions its actions", stacklevel=3
            )

    def _set(self, acting: Acting) -> None:
        processor = self.processor
        self.abilities = check(acting, processor, self.trained)
        self.robot = processor.acting_as(acting.robot)
        robot = processor.robots[self.robot]
        self.action_dim = robot.action_dim
        self.inputs = Inputs(
            robot,
            processor.cameras_of(self.robot),
            acting.missing_cameras,
            acting.max_state_distance,
            acting.max_prompt_bytes,
        )
        self.horizon = min(self.model.config.horizon, robot.horizon or self.model.config.horizon)
        """Actions of a chunk, T: as many as its training had, which may be fewer than the model's horizon."""
        self.execution_horizon = acting.executed(self.horizon)
        self.hierarchical = says_subtasks(acting, processor, self.trained)
        able = self.abilities.advantage and acting.advantage != "none"
        self.advantage = (acting.advantage or "positive") if able else None
        self.acting = acting

    @property
    def resolved(self) -> Acting:
        """How it acts, with what the defaults came to."""
        return replace(
            self.acting,
            robot=self.robot,
            execution_horizon=self.execution_horizon,
            hierarchical=self.hierarchical,
            advantage=self.acting.advantage or self.advantage,
        )

    def acting_as(self, acting: Acting) -> Self:
        """The same weights, acting otherwise. Raises ValueError where `check` does."""
        other = copy.copy(self)
        other._set(acting)
        return other

    def capture(self, compile: bool) -> None:
        """From now on the chunk of one frame is a CUDA graph, see `CapturedChunk`; those of several are not.

        Raises ValueError where the model is on no CUDA device.
        """
        if self.model.device.type != "cuda":
            raise ValueError(f"cuda_graph: the model is on {self.model.device}; leave it out, or set device to cuda")
        self._chunk = CapturedChunk(self.model, compile)

    def replans(self, chunk: int) -> bool:
        """Whether a new subtask is predicted before chunk number `chunk` of an episode."""
        return self.hierarchical and chunk % self.acting.replan_subtask_every == 0

    def predict_subtasks(self, frames: Sequence[Frame], generator: Generators | None = None) -> list[str]:
        """What to do next, for each frame.

        generator: what tokens are drawn with instead of its own: one for all, or one for each frame.
        Raises ValueError for a frame that `Inputs` refuses, or if it cannot say.
        """
        if not (self.processor.robots[self.robot].has_subtasks and self.trained.able("subtask")):
            raise ValueError("the policy was not trained to say subtasks: ask it for actions alone")
        return self.say([self.inputs(frame) for frame in frames], generator or self.generator)

    def answer(self, frame: Frame, question: str, camera: str) -> str:
        """What it says to a question about a camera's picture; places in it are shares of the picture.

        Raises ValueError for a camera that the frame has not got, and where it was not trained to answer.
        """
        if not self.trained.able("text"):
            raise ValueError("the policy was not trained to answer questions (the loss term `text`)")
        if camera not in frame.images:
            raise ValueError(f"there is no image of a camera {camera!r}: ask about {', '.join(frame.images)}")
        sample = self.processor.question(frame, question, camera)
        batch = self.processor.collate([sample]).to(self.model.device)
        options = {"temperature": self.acting.temperature, "generator": self.generator}
        (text,) = generate_texts(self.model, self.processor, batch, **options)
        return to_picture(text.strip(), sample.letterboxes.values())

    def predict_chunks(
        self,
        frames: Sequence[Frame],
        subtasks: Sequence[str | None],
        noise: Tensor | np.ndarray | None = None,
        prefix_actions: Sequence[Tensor | np.ndarray] | None = None,
        generator: Generators | None = None,
    ) -> np.ndarray:
        """One chunk per frame, f32[B T A] in the robot's units, each conditioned on its subtask (None: on the task).

        noise f32[B horizon D], of the model's, makes it reproducible.  prefix_actions: per frame f32[d A] in the
        robot's units, what it will do in the chunk's first d steps whatever comes out; d may differ. The chunk begins
        with them and goes on from them.  generator: what tokens are drawn with instead of its own: one for all, or one
        for each frame.

        Raises ValueError for a frame that `Inputs` refuses, for noise and prefix_actions that are not finite or of
        another shape, for more prefix_actions than it was trained to go on from, and for a chunk that is not finite or
        holds an action beyond `max_action_distance`.
        """
        frames = [self.inputs(frame) for frame in frames]
        given: list[PrefixActions | None] = [None] * len(frames)
        if prefix_actions is not None:
            given = [
                self.prefix_actions_of(frame, actions) for frame, actions in zip(frames, prefix_actions, strict=True)
            ]
        start = self.start(noise, len(frames))
        computed = self.compute(frames, subtasks, start, given, generator or self.generator)
        return np.stack([self.finish(*row) for row in zip(computed, frames, given, strict=True)])

    # --- the steps of both, for frames that `Inputs` let through

    def say(self, frames: Sequence[Frame], generator: Generators) -> list[str]:
        """A subtask for each frame."""
        prompts = [self.processor.prompt(frame, self.robot, high_level=True) for frame in frames]
        batch = self.processor.collate(prompts).to(self.model.device)
        options = {"temperature": self.acting.temperature, "generator": generator}
        texts = generate_texts(self.model, self.processor, batch, **options)
        said = map(self.processor.language.prompts.said, texts)
        return [to_picture(text, prompt.letterboxes.values()) for text, prompt in zip(said, prompts, strict=True)]

    def prefix_actions_of(self, frame: Frame, prefix_actions: Tensor | np.ndarray) -> PrefixActions:
        """Actions f32[d A] in the robot's units that a chunk goes on from. ValueError where it cannot."""
        if self.acting.actions == "fast":
            raise ValueError("prefix_actions need the flow head: leave them out, or set `actions: flow`")
        actions = as_numbers("prefix_actions", prefix_actions)
        dims = self.action_dim
        if actions.ndim != 2 or actions.shape[1] != dims or len(actions) >= self.horizon:
            raise ValueError(
                f"prefix_actions has shape {list(actions.shape)}: expected [d {dims}] with d below the chunk's"
                f" {self.horizon} steps"
            )
        self.abilities.check_delay(len(actions), "prefix_actions")
        normalized = self.processor.normalize(replace(frame, actions=actions), self.robot).actions
        assert normalized is not None
        return PrefixActions(actions, normalized)

    def start(self, noise: Tensor | np.ndarray | None, rows: int) -> Tensor | None:
        """What the flow starts from, f32[B horizon D]: the noise, or else a draw; None where no flow is sampled.

        Raises ValueError for noise that is not finite or of another shape.
        """
        if self.acting.actions == "fast":
            return None
        shape = rows, self.model.config.horizon, self.model.config.action_dim
        if noise is None:
            return self.acting.noise_scale * torch.randn(shape, generator=self.generator)
        start = torch.from_numpy(np.ascontiguousarray(as_numbers("noise", noise)))
        if start.shape != shape:
            raise ValueError(f"noise has shape {list(start.shape[1:])}: expected [horizon D] = {list(shape[1:])}")
        return start

    @torch.no_grad()
    def compute(
        self,
        frames: Sequence[Frame],
        subtasks: Sequence[str | None],
        start: Tensor | None,
        given: Sequence[PrefixActions | None],
        generator: Generators,
    ) -> list[Computed]:
        """For each frame what the model computes, of which `finish` makes a chunk."""
        fast = start is None
        guided = {} if fast or self.acting.guidance == 1 else {"guidance": self.acting.guidance}
        prompts = [
            self.processor.prompt(frame, self.robot, subtask, fast=fast, advantage=advantage)
            for advantage in ((self.advantage, None) if guided else (self.advantage,))
            for frame, subtask in zip(frames, subtasks, strict=True)
        ]
        batch = self.processor.collate(prompts).to(self.model.device)
        if start is None:
            return generate_fast(
                self.model,
                self.processor,
                self.model.backbone(batch),
                self.action_dim,
                constrain=self.acting.constrain_fast,
                temperature=self.acting.temperature,
                generator=generator,
            )
        device = self.model.device
        start = start[:, : self.horizon]  # no later step was trained
        actions, count = (None, None) if not any(given) else (x.to(device) for x in self._stacked(given))
        chunk = self._chunk if len(batch) == 1 else self.model.chunk
        return list(chunk(batch, start.to(device), self.acting.num_steps, actions, count, **guided).cpu().numpy())

    def _stacked(self, given: Sequence[PrefixActions | None]) -> tuple[Tensor, Tensor]:
        """Given actions as `FlowHead.sample` takes them: f32[B T D], and how many of each row, i64[B]."""
        actions = torch.zeros(len(given), self.horizon, self.model.config.action_dim)
        rows = [np.zeros((0, self.action_dim), np.float32) if row is None else row.normalized for row in given]
        for place, row in zip(actions, rows, strict=True):
            place[: len(row), : self.action_dim] = torch.from_numpy(row)
        return actions, torch.tensor([len(row) for row in rows])

    def finish(self, computed: Computed, frame: Frame, given: PrefixActions | None) -> np.ndarray:
        """The chunk f32[T A] in the robot's units.

        Raises ValueError as `predict_chunks`. FAST tokens that are no chunk raise FastDecodeError, or are NaN and
        counted, as configured.
        """
        robot = self.processor.robots[self.robot]
        if isinstance(computed, list):
            assert self.processor.fast is not None
            try:
                computed = self.processor.fast.decode(computed, self.model.config.horizon, self.action_dim)
            except FastDecodeError:
                if self.acting.on_failed_decode == "raise":
                    raise
                self.failed_decodes += 1
                return np.full((self.horizon, self.action_dim), np.nan, np.float32)
        real = self.processor.real_actions(computed[: self.horizon], frame, self.robot)
        if given is not None:
            real[: len(given.actions)] = given.actions  # as they are, not normalised and back
        check_actions(real, frame, robot, self.acting.max_action_distance)
        return real


@torch.no_grad()
def generate_texts(model: Pi05, processor: Processor, batch: Batch, **options: Any) -> list[str]:
    """What the model says after each row of a batch on its device; options as `SubtaskHead.generate`.

    Where it would say more than it may, the text ends there, with a warning unless `max_tokens` says how much that is.
    """
    tokens, valid, _ = model.subtask_head.generate(model.backbone, model.backbone(batch), **options)
    if "max_tokens" not in options and (valid[:, -1] & (tokens[:, -1] != model.subtask_head.eos_id)).any():
        warnings.warn(f"what the policy says was cut off after {tokens.shape[1]} tokens", stacklevel=2)
    return [processor.tokenizer.decode(row[mask].tolist()) for row, mask in zip(tokens, valid, strict=True)]


@torch.no_grad()
def generate_fast(
    model: Pi05,
    processor: Processor,
    prefix: Prefix,
    action_dim: int,
    *,
    constrain: bool,
    temperature: float = 0.0,
    generator: Generators | None = None,
) -> list[list[int]]:
    """FAST tokens that the model writes after each row of a prefix, for chunks of the model's horizon.

    constrain: only tokens that can still become a chunk are written; otherwise any, up to the closing of the prompts.
    """
    fast, tokenizer, prompts = processor.fast, processor.tokenizer, processor.language.prompts
    assert fast is not None
    device = prefix.mask.device
    closing = [*tokenizer.encode(prompts.fast_closing), tokenizer.eos_id]  # as trained; the prompt's may be empty
    tokens, valid = model.fast_head.generate(
        model.backbone,
        prefix,
        torch.from_numpy(fast.lengths).to(device),
        model.config.horizon * action_dim,
        torch.tensor(tokenizer.encode(prompts.fast_opening), dtype=torch.long, device=device),
        closing_id=None if constrain else closing[0],
        temperature=temperature,
        generator=generator,
    )
    return [row[mask].tolist() for row, mask in zip(tokens, valid, strict=True)]
