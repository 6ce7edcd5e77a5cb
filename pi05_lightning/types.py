"""The contracts between the parts: what a source yields, what the model gets, what the backbone hands to the flow head.

Axis letters, the same everywhere: B batch, C cameras, L tokens, S prefix length (image tokens + L), T action horizon,
A action dims of a dataset, D action dims of the model (A padded), W model width, H heads, K noise draws, N targets,
P images present in a batch, R rows of a batch that carry actions, Q points that a batch asks for.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import IntEnum, StrEnum

import numpy as np
import torch
from torch import Tensor


class Target(IntEnum):
    """What a token is a target of; NONE marks a token that is given, not predicted."""

    NONE = 0
    TEXT = 1
    SUBTASK = 2
    FAST = 3


class Modality(StrEnum):
    """What a sample is there to teach; the names that metrics and tables carry."""

    WEB_CAPTION = "web_caption"
    QA = "qa"
    HL_SUBTASK = "hl_subtask"
    FAST = "fast_robot_actions"
    CONTINUOUS = "continuous_robot_actions"

    @property
    def id(self) -> int:
        return list(Modality).index(self)


NUM_LOC, NUM_SEG = 1024, 128
"""PaliGemma's coordinate and segmentation tokens: the last ids of a vocabulary, in this order."""

Box = tuple[float, float, float, float]
"""ymin, xmin, ymax, xmax as shares of the image's height and width."""


@dataclass(frozen=True)
class Shapes:
    """What the data must know of the model: sizes that samples are made to."""

    image_size: int
    horizon: int
    action_dim: int
    vocab_size: int
    fast_vocab_size: int
    fast_skip_tokens: int
    max_cameras: int | None = None
    """Cameras that it has parameters for; None where it treats all alike."""


@dataclass(frozen=True)
class Answer:
    """A question about a frame and its answer; boxes are answers made of `<locYYYY>` tokens (ymin xmin ymax xmax)."""

    question: str
    answer: str
    camera: str | None = None


@dataclass(frozen=True)
class Frame:
    """One observation as a dataset, a robot or a simulator gives it; in real units until it is normalised.

    images: {camera: u8[3 h w], or f32[3 h w] of the same 0..255};  state: f32[S];  actions: f32[T A] with
    action_is_pad: bool[T], True past the episode's end.  `subtask` is the instruction of the moment, `answers` what is
    asked about this frame.  embodiment, control_mode: what prompts may say of the robot.
    """

    images: dict[str, np.ndarray] = field(default_factory=dict)
    task: str = ""
    subtask: str | None = None
    answers: tuple[Answer, ...] = ()
    state: np.ndarray | None = None
    actions: np.ndarray | None = None
    action_is_pad: np.ndarray | None = None
    embodiment: str = ""
    control_mode: str = ""


@dataclass(frozen=True)
class Segment:
    """A piece of a token sequence. Up to the first predicted one segments attend both ways, from it on causally."""

    text: str | None = None
    tokens: tuple[int, ...] | None = None
    loss: Target = Target.NONE


@dataclass(frozen=True)
class Point:
    """Something that a box names: its question and its centre (y, x) in [0, 1] of one camera's image."""

    camera: str
    query: str
    centre: tuple[float, float]


@dataclass(frozen=True)
class Sample:
    """One training example, ready to collate: images u8[3 H W] of the model's size, normalised actions f32[T D].

    tokens: i64[L], of all its segments;  target_kind: u8[L], `Target` of predicting each.
    action_mask: bool[T D], False on padded steps and padded dims.  key seeds this draw's noise and flow time.
    """

    tokens: np.ndarray
    target_kind: np.ndarray
    modality: Modality
    images: dict[str, np.ndarray] = field(default_factory=dict)
    actions: np.ndarray | None = None
    action_mask: np.ndarray | None = None
    points: tuple[Point, ...] = ()
    source: int = 0
    key: int = 0
    skipped: tuple[str, ...] = ()
    """What was wrong with the samples in whose place this one is."""


@dataclass(frozen=True)
class Drawn:
    """What a batch was made of, as far as the host knows it: logging it waits for no device."""

    names: dict[str, int]
    """Samples by `source/modality`."""
    text_tokens: int
    """Tokens that are not padding, images left out."""
    skipped: tuple[str, ...] = ()
    """What was wrong with the samples that others took the place of."""


@dataclass
class Batch:
    """Samples collated; rows that carry actions come first, so that the flow head slices and never synchronises.

    pixels       u8[P 3 H W] (f32 at inference)   images present, absent cameras are not here
    image_index  i64[P]        their slot, row * C + place; present cameras take a row's first places
    camera       i64[P]        which of the data's cameras took it
    image_mask   bool[B C]     slots in use
    tokens       i64[B L]      token_mask bool[B L]: valid;  causal bool[B L]: sees only what is before it
                               (from a row's first token with a loss on: without `target_index` nothing is causal)
    target_kind  u8[B L]       `Target` of predicting this token
    target_index i64[N]        row * L + column of every token with a loss
    actions      f32[R T D]    action_mask bool[R T D]
    fast_actions f32[F T D]    fast_action_mask bool[F T D]: what the rows with FAST tokens say, for metrics only
    modality     i64[B]        `Modality.id`;  source i64[B];  key i64[B]
    point_image  i64[Q]        image of a point;  point_tokens i64[Q M], point_token_mask bool[Q M]: what it is called
    point_target f32[Q 2]      where it is: (y, x) in [0, 1]
    augmentation f64[P 7]      per image: angle (degrees), scale, shift right and down (shares of its size), factors of
                               brightness, contrast, saturation; stays on the host. None: images are left as they are
    noise        f32[R K T D]  time f32[R K], or f32[R K T] in which 0 marks actions that are given: both are drawn per
                               sample from `key`, see `losses.draw_noise`; None before that
    drawn                      of training batches: what they were made of
    """

    pixels: Tensor
    image_index: Tensor
    camera: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    causal: Tensor
    target_kind: Tensor
    target_index: Tensor
    actions: Tensor
    action_mask: Tensor
    modality: Tensor
    source: Tensor
    key: Tensor
    fast_actions: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0))
    fast_action_mask: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.bool))
    point_image: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    point_tokens: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    point_token_mask: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    point_target: Tensor = field(default_factory=lambda: torch.zeros(0, 2))
    augmentation: np.ndarray | None = None
    noise: Tensor | None = None
    time: Tensor | None = None
    drawn: Drawn | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        pinned = {
            f.name: getattr(self, f.name).pin_memory()
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **pinned)

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass
class Prefix:
    """What the backbone computed, once, for everything that reads it.

    hidden     [B L W] of the tokens, the last L of the S columns, after the last norm; None when only the flow head
               reads the prefix
    kv         one (K, V) per layer, each [B H_kv S head_dim], K rotated
    keypoints  f32[P K 2] (y, x) of the keypoint stem; None with SigLIP
    mask       bool[B S] valid;  flow_mask bool[B S]: what the flow head may see (images, prompt, subtask; never FAST)
    """

    hidden: Tensor | None
    kv: list[tuple[Tensor, Tensor]]
    mask: Tensor
    flow_mask: Tensor
    keypoints: Tensor | None = None

    def rows(self, n: int) -> Prefix:
        """The first n rows, which are those that carry actions, for the flow head (views)."""
        return Prefix(None, [(k[:n], v[:n]) for k, v in self.kv], self.mask[:n], self.flow_mask[:n])

    def detach(self) -> Prefix:
        """The same prefix without gradient: knowledge insulation is this and nothing else."""
        return replace(self, kv=[(k.detach(), v.detach()) for k, v in self.kv])
