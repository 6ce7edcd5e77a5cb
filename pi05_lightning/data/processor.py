"""Frames to samples, samples to batches, and model actions back to the robot's units.

One object serves training, validation, the policy and the checkpoint: what it was trained with is what it runs with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pi05_lightning.data.errors import BadFrame
from pi05_lightning.data.fast import FastTokenizer
from pi05_lightning.data.images import resize_image
from pi05_lightning.data.mixture import TrainedBy
from pi05_lightning.data.places import frame_to_model, said_to_model
from pi05_lightning.data.prompt import ConditionOn, Prompts
from pi05_lightning.data.robot import OUTLIER_REMEDY, Robot, outlier
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.files.ranges import check_range
from pi05_lightning.types import (
    Answer,
    Batch,
    Frame,
    HeadTargets,
    Letterbox,
    Modality,
    Sample,
    Segment,
    Shapes,
    Subset,
    Target,
    index_targets,
)


@dataclass(frozen=True)
class Language:
    """How frames become text."""

    prompts: Prompts = field(default_factory=Prompts)
    condition_on: ConditionOn = "subtask"
    """What actions are conditioned on: the subtask, the task, or both (the subtask said after the task's prompt)."""
    task_only_share: float = 0.0
    """Share of the action samples that hide the subtask, so that the policy also acts on the task alone."""
    no_task_share: float = 0.0
    """Share of the training samples whose task is left empty: language dropout. With 1, validation and policies have
    none either."""
    fast_share: float = 0.0
    """Share of the flow samples with a subtask that go on with the same actions as FAST tokens: both heads learn in one
    pass, and flow does not see the tokens (arXiv 2505.23705). Needs condition_on: both."""
    advantage_omission: float = 0.3
    """Share of the training's action samples that leave out the advantage, where their source says one (`labels`)."""
    questions_per_sample: int = 8
    """Training: at most this many questions about one image share a sample, each answered before the next is asked."""
    max_tokens: int = 1024
    """A sample whose text is longer is bad data."""

    def __post_init__(self) -> None:
        for name in ("task_only_share", "no_task_share", "fast_share", "advantage_omission"):
            check_range(f"data.language.{name}", getattr(self, name), 0, 1)
        if self.fast_share and self.condition_on != "both":
            raise ValueError(f"fast_share is {self.fast_share}: it needs condition_on: both, not {self.condition_on}")
        check_range("data.language.questions_per_sample", self.questions_per_sample, 1)
        check_range("data.language.max_tokens", self.max_tokens, 1)

    @property
    def untold(self) -> bool:
        """Whether nothing is ever said of the task."""
        return self.no_task_share == 1

    @property
    def saying_subtasks(self) -> frozenset[Modality]:
        """The modalities whose samples may have a subtask to be said, and not only one to act on."""
        if self.condition_on == "both" and self.task_only_share < 1:
            return frozenset({Modality.HL_SUBTASK, Modality.CONTINUOUS, Modality.FAST})
        return frozenset({Modality.HL_SUBTASK})

    def trained_by(self, terms: TrainedBy) -> TrainedBy:
        """What each loss term may be learned from with these texts.  terms: of the model."""
        beside_flow = {Modality.CONTINUOUS} if self.fast_share and self.task_only_share < 1 else set()
        return {**terms, "subtask": self.saying_subtasks, "fast": frozenset({Modality.FAST, *beside_flow})}


class Processor:
    """Everything between the data's units and the model's tensors.

    cameras: the names, in the order in which their tokens come.  robots: by the name of the source.
    fast: the FAST tokenizer, needed for `fast_robot_actions` only.
    targets: what makes those of heads, by their names; for training, and not kept in checkpoints.
    """

    def __init__(
        self,
        shapes: Shapes,
        tokenizer: TextTokenizer,
        cameras: Sequence[str],
        robots: Mapping[str, Robot],
        language: Language | None = None,
        fast: FastTokenizer | None = None,
        targets: Mapping[str, HeadTargets] | None = None,
    ) -> None:
        if tokenizer.vocab_size != shapes.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but the model's vocab_size is {shapes.vocab_size}:"
                " choose the tokenizer that the model was made for"
            )
        if fast is not None and fast.vocab_size > shapes.fast_vocab_size:
            raise ValueError(
                f"the FAST tokenizer has {fast.vocab_size} tokens but the model's fast_vocab_size is"
                f" {shapes.fast_vocab_size}: fit a smaller one or raise fast_vocab_size"
            )
        if shapes.max_cameras is not None and len(cameras) > shapes.max_cameras:
            raise ValueError(
                f"the data has the cameras {list(cameras)} but the model was made for {shapes.max_cameras} at most:"
                " name those that it shall see in the sources' `cameras`, or raise model.config.vision.max_cameras"
            )
        self.shapes, self.tokenizer, self.cameras = shapes, tokenizer, tuple(cameras)
        self.robots, self.language, self.fast = dict(robots), language or Language(), fast
        self.targets = dict(targets or {})

    # --- frames to samples

    def sample(
        self, frame: Frame, subset: Subset, key: int = 0, max_questions: int = 1, training: bool = False
    ) -> Sample:
        """A training or validation sample of a subset. key chooses questions, hides subtasks, and seeds noise.

        training: some do not say the task, or the advantage, either.

        Raises ValueError when the frame lacks what the modality needs, and BadFrame when it must not be trained on.
        """
        rng = np.random.Generator(np.random.Philox(key=[key % 2**63, 1]))
        letterboxes = self._letterboxes(frame)
        frame = frame_to_model(self.normalize(frame, subset.source), letterboxes)
        modality, images = subset.modality, frame.images
        if problem := outlier(frame):
            raise BadFrame(f"{problem}. {OUTLIER_REMEDY}")
        prompts, language = self.language.prompts, self.language
        share = language.no_task_share
        if language.untold or (training and share and rng.random() < share):
            frame = replace(frame, task="")
        actions = mask = None
        told = frame.task
        if modality in (Modality.QA, Modality.WEB_CAPTION):
            if not frame.answers:
                raise ValueError(f"{modality} needs a question and its answer, and there is none")
            asked = self._choose_questions(frame.answers, rng, max_questions if modality is Modality.QA else 1)
            images = {camera: images[camera] for camera in images if asked[0].camera in (None, camera)}
            segments = [segment for answer in asked for segment in prompts.ask(answer)]
            told = ""
        elif modality is Modality.HL_SUBTASK:
            if frame.subtask is None or not frame.subtask_is_target:
                raise ValueError("hl_subtask needs a subtask to be learned, and there is none")
            segments = [*prompts.high_level(frame), prompts.say_subtask(frame.subtask)]
        else:
            if frame.actions is None or frame.action_is_pad is None:
                raise ValueError(f"{modality} needs actions, and there are none")
            subtask = None if rng.random() < language.task_only_share else frame.subtask
            is_fast = modality is Modality.FAST
            with_fast = is_fast or (subtask is not None and rng.random() < language.fast_share)
            advantage = frame.advantage
            if training and advantage is not None and rng.random() < language.advantage_omission:
                advantage = None
            segments = prompts.low_level(frame, subtask, language.condition_on, fast=is_fast, advantage=advantage)
            if subtask is not None and language.condition_on == "subtask":
                told = ""
            if with_fast:
                segments.append(self._fast_segment(frame.actions))
            actions, mask = self._pad(frame.actions, frame.action_is_pad)
        shown = replace(frame, images=images, task=told)
        made = {name: own.maker.make(shown) for name, own in self.targets.items() if modality in own.modalities}
        targets = {name: target for name, target in made.items() if target is not None}
        tokens, kinds = self._encode(segments)
        return Sample(tokens, kinds, subset, self._resize(images), letterboxes, actions, mask, targets, key)

    @staticmethod
    def _choose_questions(answers: Sequence[Answer], rng: np.random.Generator, most: int) -> list[Answer]:
        """At most `most` questions in random order, all about the camera of the first one."""
        shuffled = [answers[i] for i in rng.permutation(len(answers))]
        return [answer for answer in shuffled if answer.camera == shuffled[0].camera][:most]

    def prompt(
        self,
        frame: Frame,
        source: str,
        subtask: str | None = None,
        *,
        high_level: bool = False,
        fast: bool = False,
        advantage: str | None = None,
    ) -> Sample:
        """What the model gets at inference: the same prompts, and nothing to predict.

        subtask: what actions are conditioned on, with places as shares of the picture; None for the task alone.
        advantage: what is said of the actions that are asked for, if anything.
        """
        letterboxes = self._letterboxes(frame)
        frame = frame_to_model(self.normalize(frame, source), letterboxes)
        if self.language.untold:
            frame = replace(frame, task="")
        subtask = None if subtask is None else said_to_model(subtask, letterboxes.values())
        prompts = self.language.prompts
        segments = (
            prompts.high_level(frame)
            if high_level
            else prompts.low_level(frame, subtask, self.language.condition_on, fast=fast, advantage=advantage)
        )
        modality = Modality.HL_SUBTASK if high_level else Modality.CONTINUOUS
        # not rounded back to uint8, as LeRobot does it; training images are, which is half a grey level
        images = {camera: np.asarray(image, np.float32) for camera, image in frame.images.items()}
        return Sample(*self._encode(segments), Subset(source, modality), self._resize(images), letterboxes)

    def question(self, frame: Frame, question: str, camera: str) -> Sample:
        """What the model gets to answer a question about a camera's image, with places as shares of the picture."""
        images = {camera: np.asarray(frame.images[camera], np.float32)}
        asked = Frame(images, task="", answers=(Answer(question, "", camera),))
        letterboxes = self._letterboxes(asked)
        segments = self.language.prompts.ask(*frame_to_model(asked, letterboxes).answers)[:1]
        return Sample(*self._encode(segments), Subset("", Modality.QA), self._resize(images), letterboxes)

    def as_seen(self, frame: Frame) -> Frame:
        """The frame with its images as `prompt` resizes them: for several prompts they are resized once."""
        pictures = {camera: image.shape[1:] for camera, image in frame.images.items()} | frame.picture_sizes
        images = {camera: np.asarray(image, np.float32) for camera, image in frame.images.items()}
        return replace(frame, images=self._resize(images), picture_sizes=pictures)

    @property
    def acting(self) -> tuple[str, ...]:
        """Names of the robots whose data held actions, each once; a policy acts as one of them."""
        return tuple(name for name, robot in self.robots.items() if robot.acts and not robot.same_as)

    def acting_as(self, name: str | None) -> str:
        """The robot of this name, or with None the only one. ValueError when it does not act, or there are several."""
        robots = ", ".join(self.acting)
        if not robots:
            raise ValueError("the policy was trained on no robot's data: it has no actions to predict")
        if name is None and len(self.acting) > 1:
            raise ValueError(f"the policy can act as several robots, {robots}: name one of them as `robot`")
        if name not in (None, *self.acting):
            raise ValueError(f"robot: the policy cannot act as {name!r}, only as {robots}")
        return name or self.acting[0]

    def keep_robot(self, name: str | None) -> None:
        """Forget all robots but one; none of them if none is named. ValueError for one that there is not."""
        if name is not None:
            kept = self.acting_as(name)
            self.robots = {kept: self.robots[kept]}

    def cameras_of(self, name: str) -> tuple[str, ...]:
        """The cameras of a robot's data, in the model's order; all where an older checkpoint does not say."""
        own = self.robots[name].cameras
        return self.cameras if own is None else tuple(camera for camera in self.cameras if camera in own)

    def predicts_subtasks(self, source: str) -> bool:
        """Whether a policy says what to do next before it acts; if nobody taught it, the task alone conditions it."""
        language = self.language
        taught = language.condition_on != "task" and language.task_only_share < 1
        return taught and self.robots[source].has_subtasks

    def normalize(self, frame: Frame, source: str) -> Frame:
        """The frame in the model's units, with what its robot is called; a source without a robot changes nothing."""
        if source not in self.robots:
            return frame
        robot = self.robots[source]
        named = replace(frame, embodiment=robot.embodiment, control_mode=robot.control_mode)
        return robot.to_model(named)

    def real_actions(self, actions: np.ndarray, frame: Frame, source: str) -> np.ndarray:
        """Model actions f32[... T D] to the robot's units and dimensions, f32[... T A]."""
        robot = self.robots[source]
        return robot.to_real(actions[..., : robot.action_dim], frame)

    def _letterboxes(self, frame: Frame) -> dict[str, Letterbox]:
        """Where the picture is in each image that the model sees; ValueError for cameras and shapes that are none."""
        unknown = set(frame.images) - set(self.cameras)
        if unknown:
            raise ValueError(f"unknown cameras {sorted(unknown)}; this model knows {list(self.cameras)}")
        for camera, image in frame.images.items():
            if image.ndim != 3 or image.shape[0] != 3 or not image.size:
                raise BadFrame(
                    f"camera {camera!r} gives an image of shape {list(image.shape)}: expected RGB as [3 h w]"
                )
        size = self.shapes.image_size, self.shapes.image_size
        pictures = {camera: image.shape[1:] for camera, image in frame.images.items()} | frame.picture_sizes
        return {camera: Letterbox.of(picture, size) for camera, picture in pictures.items()}

    def _resize(self, images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        size = self.shapes.image_size
        return {camera: resize_image(images[camera], (size, size)) for camera in self.cameras if camera in images}

    def _pad(self, actions: np.ndarray, is_pad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        horizon, dims = actions.shape
        if horizon != self.shapes.horizon or dims > self.shapes.action_dim:
            raise ValueError(
                f"an action chunk of {horizon} steps and {dims} dimensions does not fit the model's"
                f" {self.shapes.horizon} and {self.shapes.action_dim}"
            )
        padded = np.zeros((horizon, self.shapes.action_dim), dtype=np.float32)
        padded[:, :dims] = actions
        mask = np.zeros(padded.shape, dtype=bool)
        mask[:, :dims] = ~is_pad[:, None]
        return padded, mask

    def _fast_segment(self, actions: np.ndarray) -> Segment:
        if self.fast is None:
            raise ValueError(
                "fast_robot_actions and data.language.fast_share need a FAST tokenizer: make one with `pi05 tokenizer`"
                " and name it as data.fast"
            )
        prompts = self.language.prompts
        ids = [self.shapes.fast_top - token for token in self.fast.encode(actions[None])[0]]
        closing = [*self.tokenizer.encode(prompts.fast_closing), self.tokenizer.eos_id]
        return Segment(tokens=(*self.tokenizer.encode(prompts.fast_opening), *ids, *closing), loss=Target.FAST)

    def _encode(self, segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids i64[L] and the `Target` of each, u8[L]; predicted text ends with <eos>. BadFrame for too many."""
        ids = [self.tokenizer.bos_id]
        kinds = [int(Target.NONE)]
        for segment in segments:
            piece = list(segment.tokens) if segment.tokens is not None else self.tokenizer.encode(segment.text or "")
            if segment.loss and segment.tokens is None:
                piece.append(self.tokenizer.eos_id)
            ids += piece
            kinds += [int(segment.loss)] * len(piece)
        if len(ids) > self.language.max_tokens:
            longest = max((segment.text or "" for segment in segments), key=len)
            fast = sum(len(segment.tokens) for segment in segments if segment.tokens is not None)
            of_actions = f", {fast} of them for its actions (FAST)" if fast else ""
            raise BadFrame(
                f"its text is {len(ids)} tokens long{of_actions}, more than data.language.max_tokens,"
                f" {self.language.max_tokens} (its longest part begins {longest[:40]!r}). Shorten or drop it, or raise"
                " max_tokens"
            )
        return np.array(ids, dtype=np.int64), np.array(kinds, dtype=np.uint8)

    # --- samples to batches

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch of samples, rows with actions first; as many camera slots and tokens as its largest sample needs."""
        samples = sorted(samples, key=lambda sample: sample.subset.modality is not Modality.CONTINUOUS)
        rows = len(samples)
        length = few_lengths(max(len(sample.tokens) for sample in samples))
        tokens = np.full((rows, length), self.tokenizer.pad_id, dtype=np.int64)
        kinds = np.zeros((rows, length), dtype=np.uint8)
        token_mask = np.zeros((rows, length), dtype=bool)
        for row, sample in enumerate(samples):
            text = slice(len(sample.tokens))
            tokens[row, text], kinds[row, text], token_mask[row, text] = sample.tokens, sample.target_kind, True

        slots = max(len(sample.images) for sample in samples)
        image_mask = np.zeros((rows, slots), dtype=bool)
        pixels: list[np.ndarray] = []
        image_index: list[int] = []
        camera: list[int] = []
        fixed: list[bool] = []
        numbers: list[dict[str, int]] = []
        for row, sample in enumerate(samples):
            numbers.append({name: len(pixels) + place for place, name in enumerate(sample.images)})
            places = {c for name, target in sample.targets.items() for c in self.targets[name].maker.images(target)}
            image_mask[row, : len(sample.images)] = True
            image_index += range(row * slots, row * slots + len(sample.images))
            pixels += sample.images.values()
            camera += [self.cameras.index(name) for name in sample.images]
            fixed += [name in places for name in sample.images]
        size = self.shapes.image_size
        actions, action_mask = self._stack_actions(samples, Modality.CONTINUOUS)
        fast_actions, fast_action_mask = self._stack_actions(samples, Modality.FAST)
        return Batch(
            pixels=torch.from_numpy(np.stack(pixels) if pixels else np.zeros((0, 3, size, size), np.uint8)),
            image_index=torch.tensor(image_index, dtype=torch.long),
            camera=torch.tensor(camera, dtype=torch.long),
            image_mask=torch.from_numpy(image_mask),
            tokens=torch.from_numpy(tokens),
            token_mask=torch.from_numpy(token_mask),
            # causal from the first predicted token on: an answer must not see the question after it
            causal=torch.from_numpy(np.maximum.accumulate(kinds > 0, axis=1) & token_mask),
            target_kind=torch.from_numpy(kinds),
            target_index=index_targets(torch.from_numpy(kinds)),
            actions=actions,
            action_mask=action_mask,
            fast_actions=fast_actions,
            fast_action_mask=fast_action_mask,
            key=torch.tensor([sample.key for sample in samples]),
            auxiliary={
                name: own.maker.collate(
                    [sample.targets.get(name) for sample in samples], numbers, self.tokenizer.encode
                )
                for name, own in self.targets.items()
            },
            fixed_image=torch.tensor(fixed, dtype=torch.bool),
            letterboxes=[sample.letterboxes[name] for sample in samples for name in sample.images],
        )

    def _stack_actions(self, samples: Sequence[Sample], modality: Modality) -> tuple[torch.Tensor, torch.Tensor]:
        """Chunks f32[R T D] and masks bool[R T D] of the samples of a modality that have them."""
        chunk = (self.shapes.horizon, self.shapes.action_dim)
        own = [sample for sample in samples if sample.subset.modality is modality]
        actions = [sample.actions for sample in own if sample.actions is not None]
        masks = [sample.action_mask for sample in own if sample.action_mask is not None]
        return (
            torch.from_numpy(np.stack(actions) if actions else np.zeros((0, *chunk), np.float32)),
            torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *chunk), bool)),
        )

    # --- to and from a checkpoint

    def to_dict(self) -> dict[str, Any]:
        """Plain types that a checkpoint can carry; `from_dict` needs nothing else."""
        return {
            "shapes": asdict(self.shapes),
            "tokenizer": self.tokenizer.to_dict(),
            "cameras": list(self.cameras),
            "language": asdict(self.language),
            "fast": self.fast.to_dict() if self.fast else None,
            "robots": {name: robot.to_dict() for name, robot in self.robots.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Processor:
        language = {**values["language"], "prompts": Prompts(**values["language"]["prompts"])}
        return cls(
            shapes=Shapes(**values["shapes"]),
            tokenizer=TextTokenizer.from_dict(values["tokenizer"]),
            cameras=values["cameras"],
            robots={name: Robot.from_dict(robot) for name, robot in values["robots"].items()},
            language=Language(**language),
            fast=FastTokenizer.from_dict(values["fast"]) if values["fast"] else None,
        )


def few_lengths(length: int) -> int:
    """The length, rounded up by a 32nd at most: batches come in few distinct shapes, and none holds much padding."""
    step = 1 << max(0, length.bit_length() - 6)
    return -(-length // step) * step
