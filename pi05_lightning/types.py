"""The contracts between the parts: what a source yields, what the model gets, what the backbone hands to the flow head.

Axis letters, the same everywhere: B batch, C cameras, L tokens, S prefix length (image tokens + L), T action horizon,
A action dims of a dataset, D action dims of the model (A padded), W model width, H heads, K noise draws, N targets,
P images present in a batch, R rows of a batch that carry actions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Target(IntEnum):
    """What a token is a target of.

    NONE marks a token that is given, and SAID one that the policy wrote itself as the frame was recorded: what follows
    is conditioned on it, as on a SUBTASK, and nothing learns to say it.
    """

    NONE = 0
    SAID = 1
    TEXT = 2
    SUBTASK = 3
    FAST = 4


class Modality(StrEnum):
    """What a sample is there to teach; the names that metrics and tables carry."""

    WEB_CAPTION = "web_caption"
    QA = "qa"
    HL_SUBTASK = "hl_subtask"
    FAST = "fast_robot_actions"
    CONTINUOUS = "continuous_robot_actions"


@dataclass(frozen=True, order=True)
class Subset:
    """A source's data as one modality: what mixtures draw from, and what metrics and tables have a row for.

    As text `source/modality`; without a source, `modality`, it is what all sources have of it.
    """

    source: str
    modality: Modality

    @classmethod
    def parse(cls, name: str) -> Subset:
        """The inverse of `str`. Raises ValueError for an unknown modality."""
        source, _, modality = name.rpartition("/")
        return cls(source, Modality(modality))

    def __str__(self) -> str:
        return f"{self.source}/{self.modality}" if self.source else str(self.modality)


NUM_LOC, NUM_SEG = 1024, 128
"""PaliGemma's coordinate and segmentation tokens: the last ids of a vocabulary, in this order."""

Box = tuple[float, float, float, float]
"""ymin, xmin, ymax, xmax as shares of the image's height and width."""

BOX = re.compile(r"<loc(\d{4})>" * 4)
"""A box in a text."""


def edges_to_text(edges: Iterable[float]) -> str:
    """Coordinate tokens of shares of the image's height or width, in [0, 1]."""
    return "".join(f"<loc{min(int(edge * NUM_LOC), NUM_LOC - 1):04d}>" for edge in edges)


def box_to_text(box: Box) -> str:
    """`<locYYYY>` for ymin, xmin, ymax, xmax in [0, 1], in 1024 steps over the image (PaliGemma's convention).

    Raises ValueError for a box that is not inside the image, or inside out.
    """
    ymin, xmin, ymax, xmax = box
    if not (0 <= ymin <= ymax <= 1 and 0 <= xmin <= xmax <= 1):
        raise ValueError(f"the box {box} (ymin, xmin, ymax, xmax) is not inside the image, whose edges are 0 and 1")
    return edges_to_text(box)


def text_to_boxes(text: str) -> list[Box]:
    """The boxes (ymin, xmin, ymax, xmax) in [0, 1] that a text names, in its order; at the middle of their steps."""
    edges = [[(int(edge) + 0.5) / NUM_LOC for edge in match.groups()] for match in BOX.finditer(text)]
    return [(top, left, bottom, right) for top, left, bottom, right in edges]


class Letterbox(NamedTuple):
    """The rows and columns of an image of `size` that one of another shape fills, scaled with its aspect kept."""

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]
    """(H, W) of the whole."""

    @classmethod
    def of(cls, picture: Sequence[int], size: tuple[int, int]) -> Letterbox:
        """Of an image of (h, w): centred, and rounded as LeRobot 0.6.1 does it (`resize_with_pad_torch`)."""
        (h, w), (height, width) = picture, size
        ratio = max(w / width, h / height)
        inner_h, inner_w = max(1, int(h / ratio)), max(1, int(w / ratio))
        return cls((height - inner_h) // 2, (width - inner_w) // 2, inner_h, inner_w, size)

    @property
    def rows(self) -> slice:
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.left + self.width)

    @property
    def window(self) -> Box:
        """The same as shares of the whole."""
        height, width = self.size
        bottom, right = self.top + self.height, self.left + self.width
        return self.top / height, self.left / width, bottom / height, right / width


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

    @property
    def fast_top(self) -> int:
        """The id of FAST's token 0, in the language model's vocabulary; the others go down from it."""
        return self.vocab_size - 1 - self.fast_skip_tokens


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

    Places in its texts, as `<locYYYY>`, are shares of the picture that the camera took.
    """

    images: dict[str, np.ndarray] = field(default_factory=dict)
    picture_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(h, w) of the picture that the camera took, for images that were letterboxed since."""
    task: str = ""
    subtask: str | None = None
    subtask_is_target: bool = True
    """False where the policy itself said it: it is acted on, and not learned."""
    answers: tuple[Answer, ...] = ()
    state: np.ndarray | None = None
    actions: np.ndarray | None = None
    action_is_pad: np.ndarray | None = None
    embodiment: str = ""
    control_mode: str = ""
    advantage: str | None = None
    """Whether what is done is better than what was to be expected, `positive` or `negative`; None where nobody says."""
    returns: float | None = None
    """What is left of the episode, from 0 at its success to -1; see `data.returns`."""


@dataclass(frozen=True)
class Segment:
    """A piece of a token sequence. Up to the first predicted one segments attend both ways, from it on causally."""

    text: str | None = None
    tokens: tuple[int, ...] | None = None
    loss: Target = Target.NONE


class TargetMaker(Protocol):
    """Makes a head's targets, where they are neither tokens nor actions, in the loader's workers."""

    def make(self, frame: Frame) -> Any:
        """Of one frame, whose images are those that the sample shows, state and actions normalised; None for none.

        Its task is empty where the prompt does not tell it, as in a question's.
        """
        ...

    def images(self, target: Any) -> set[str]:
        """Cameras in whose images the target is a place: augmentation leaves their geometry as it is."""
        ...

    def collate(
        self, targets: Sequence[Any], images: Sequence[Mapping[str, int]], encode: Callable[[str], list[int]]
    ) -> dict[str, Tensor]:
        """What the batch carries. targets: of each row, None where it has none;  images: of each row {camera: number of
        its image in the batch};  encode: a text's token ids."""
        ...


class HeadTargets(NamedTuple):
    """What makes a head's targets, and the modalities whose samples have some."""

    maker: TargetMaker
    modalities: frozenset[Modality]


@dataclass(frozen=True)
class Sample:
    """One training example, ready to collate: images u8[3 H W] of the model's size, normalised actions f32[T D].

    tokens: i64[L], of all its segments;  target_kind: u8[L], `Target` of predicting each.
    action_mask: bool[T D], False on padded steps and padded dims.  key seeds this draw's noise and flow time.
    """

    tokens: np.ndarray
    target_kind: np.ndarray
    subset: Subset
    images: dict[str, np.ndarray] = field(default_factory=dict)
    letterboxes: dict[str, Letterbox] = field(default_factory=dict)
    """Where in each image the picture is that the camera took."""
    actions: np.ndarray | None = None
    action_mask: np.ndarray | None = None
    targets: dict[str, Any] = field(default_factory=dict)
    """What target makers made of it, by the head's name."""
    key: int = 0
    frame: int = 0
    """Its number in the source."""
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
    """What was wrong with the samples that others took the place of, or that were left out."""
    frames: tuple[tuple[str, int], ...] = ()
    """Of each sample its source and its number there."""


@dataclass
class Batch:
    """Samples collated; rows that carry actions come first, so that the flow head slices and never synchronises.

    pixels       u8[P 3 H W] (f32 at inference)   images present, absent cameras are not here
    image_index  i64[P]        their slot, row * C + place; present cameras take a row's first places
    camera       i64[P]        which of the data's cameras took it
    image_mask   bool[B C]     slots in use
    tokens       i64[B L]      token_mask bool[B L]: valid;  causal bool[B L]: sees only what is before it
                               (from a row's first target on: without targets nothing is causal)
    target_kind  u8[B L]       `Target` that this token is
    target_index {Target: i64[N]}   row * L + column of every token that is one
    actions      f32[R T D]    action_mask bool[R T D]
    fast_actions f32[F T D]    fast_action_mask bool[F T D]: what the rows with FAST tokens say, for metrics only
    key          i64[B]        seeds a sample's noise and flow time
    auxiliary    {head: {name: tensor}}  targets that a head's `TargetMaker` made
    fixed_image  bool[P]       images in which a target is a place: their geometry stays
    letterboxes  [P]           where in each image the picture is that the camera took; on the host, for who looks at it
    augmentation f32[P 7]      per image: angle (degrees), scale, shift right and down (shares of its size), factors of
                               brightness, contrast, saturation. None: images are left as they are
    noise        f32[R K T D]  time f32[R K], or f32[R K T] in which 0 marks actions that are given: both are drawn per
                               sample from `key`, see `flow_noise.draw_noise`; None before that
    drawn                      of batches of `Samples`: what they were made of
    step_counts  i64[terms]    of training batches: elements of each loss term of the model, in its order, in all the
                               batches that this rank accumulates in the optimizer step
    """

    pixels: Tensor
    image_index: Tensor
    camera: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    causal: Tensor
    target_kind: Tensor
    target_index: dict[Target, Tensor]
    actions: Tensor
    action_mask: Tensor
    key: Tensor
    fast_actions: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0))
    fast_action_mask: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.bool))
    auxiliary: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    fixed_image: Tensor | None = None
    letterboxes: Sequence[Letterbox] | None = None
    augmentation: Tensor | None = None
    noise: Tensor | None = None
    time: Tensor | None = None
    drawn: Drawn | None = None
    step_counts: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return _mapped(self, lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return _mapped(self, Tensor.pin_memory)

    @property
    def has_token_targets(self) -> bool:
        return any(len(index) for index in self.target_index.values())

    def __len__(self) -> int:
        return self.tokens.shape[0]


def index_targets(target_kind: Tensor) -> dict[Target, Tensor]:
    """`Batch.target_index` of kinds u8[B L]."""
    flat = target_kind.flatten()
    return {target: (flat == target).nonzero()[:, 0] for target in Target if target is not Target.NONE}


@dataclass
class Prefix:
    """What the backbone computed, once, for everything that reads it.

    hidden     [B L W] of the tokens, the last L of the S columns, after the last norm; None where no head reads it
    kv         one (K, V) per layer, each [B H_kv S head_dim], K rotated
    vision     what the vision stem hands to auxiliary heads, by name
    mask       bool[B S] valid;  flow_mask bool[B S]: what the flow head may see (images, prompt, subtask; never FAST)
    """

    hidden: Tensor | None
    kv: list[tuple[Tensor, Tensor]]
    mask: Tensor
    flow_mask: Tensor
    vision: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, chosen: slice | Tensor) -> Prefix:
        """Some rows, for the flow head; the first ones, which are those that carry actions, as views."""
        return Prefix(None, [(k[chosen], v[chosen]) for k, v in self.kv], self.mask[chosen], self.flow_mask[chosen])

    def detach(self) -> Prefix:
        """The same prefix without gradient: knowledge insulation is this and nothing else."""
        return _mapped(self, Tensor.detach)


def _mapped[T: (Batch, Prefix)](whole: T, function: Callable[[Tensor], Tensor]) -> T:
    """The same with a function applied to all of its tensors."""
    return replace(whole, **tree_map_only(Tensor, function, vars(whole)))
