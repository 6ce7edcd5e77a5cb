"""Frames to samples, samples to batches, and model actions back to the robot's units.

One object serves training, validation, the policy and the checkpoint: what it was trained with is what it runs with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from pi05_lightning.data.fast import FastTokenizer
from pi05_lightning.data.images import resize_image
from pi05_lightning.data.prompt import ConditionOn, Prompts
from pi05_lightning.data.tokenizer import TextTokenizer, text_to_boxes
from pi05_lightning.data.transforms import Group, Normalize, Quantiles, Unnormalize
from pi05_lightning.types import Answer, Batch, Frame, Loss, Modality, Point, Sample, Segment, Shapes

LENGTH_MULTIPLE = 8  # token counts are rounded up to it: few distinct shapes, no more than 7 pads on the longest row
MAX_TOKENS = 1024  # a longer text is a mistake in the data, not a sample


@dataclass(frozen=True)
class Language:
    """How frames become text."""

    prompts: Prompts = field(default_factory=Prompts)
    condition_on: ConditionOn = "subtask"
    """What actions are conditioned on: the subtask, the task, or both (the subtask said after the task's prompt)."""
    task_only_share: float = 0.0
    """Share of the action samples that hide the subtask, so that the policy also acts on the task alone."""
    questions_per_sample: int = 8
    """Training: at most this many questions about one image share a sample, each answered before the next is asked."""

    def __post_init__(self) -> None:
        if not 0 <= self.task_only_share <= 1:
            raise ValueError(f"task_only_share is {self.task_only_share}: it is a share, 0 to 1")


@dataclass(frozen=True)
class Robot:
    """What a policy must know of the robot that a source's data came from."""

    normalize: Normalize
    """Quantiles of the training part's state and actions."""
    fps: float
    """Observations, and so actions, per second."""
    tasks: tuple[str, ...] = ()
    """The instructions that it was trained on."""
    dataset: str = ""
    """Where the demonstrations were."""


class Processor:
    """Everything between the data's units and the model's tensors.

    cameras: the names, in the order in which their tokens come.  robots: by the name of the source.
    fast: the FAST tokenizer, needed for `fast_robot_actions` only.
    """

    def __init__(
        self,
        shapes: Shapes,
        tokenizer: TextTokenizer,
        cameras: Sequence[str],
        robots: Mapping[str, Robot],
        language: Language | None = None,
        fast: FastTokenizer | None = None,
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
        self.shapes, self.tokenizer, self.cameras = shapes, tokenizer, tuple(cameras)
        self.robots, self.language, self.fast = dict(robots), language or Language(), fast
        self.transforms = {
            name: Group().push(robot.normalize, Unnormalize(robot.normalize.action)) for name, robot in robots.items()
        }

    # --- frames to samples

    def sample(
        self, frame: Frame, modality: Modality, source: str = "", key: int = 0, index: int = 0, max_questions: int = 1
    ) -> Sample:
        """A training or validation sample. key chooses questions, hides subtasks, and seeds the noise.

        Raises ValueError when the frame lacks what the modality needs.
        """
        rng = np.random.Generator(np.random.Philox(key=[key % 2**63, 1]))
        frame = self.normalize(frame, source)
        images = frame.images
        prompts, language = self.language.prompts, self.language
        actions = mask = None
        if modality in (Modality.QA, Modality.WEB_CAPTION):
            if not frame.answers:
                raise ValueError(f"{modality} needs a question and its answer, and there is none")
            asked = self._choose_questions(frame.answers, rng, max_questions)
            images = {camera: images[camera] for camera in images if asked[0].camera in (None, camera)}
            segments = [segment for answer in asked for segment in prompts.ask(answer)]
        elif modality is Modality.HL_SUBTASK:
            if frame.subtask is None:
                raise ValueError("hl_subtask needs a subtask, and there is none")
            segments = [*prompts.high_level(frame), prompts.say_subtask(frame.subtask)]
        else:
            if frame.actions is None or frame.action_is_pad is None:
                raise ValueError(f"{modality} needs actions, and there are none")
            subtask = None if rng.random() < language.task_only_share else frame.subtask
            is_fast = modality is Modality.FAST
            segments = prompts.low_level(frame, subtask, language.condition_on, fast=is_fast)
            if is_fast:
                segments.append(self._fast_segment(frame.actions))
            else:
                actions, mask = self._pad(frame.actions, frame.action_is_pad)
        points = tuple(
            Point(answer.camera, answer.question, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
            for answer in frame.answers
            if answer.camera in images
            for box in text_to_boxes(answer.answer)[:1]
        )
        return Sample(tuple(segments), modality, self._resize(images), actions, mask, points, index, key)

    @staticmethod
    def _choose_questions(answers: Sequence[Answer], rng: np.random.Generator, most: int) -> list[Answer]:
        """At most `most` questions in random order, all about the camera of the first one."""
        shuffled = [answers[i] for i in rng.permutation(len(answers))]
        return [answer for answer in shuffled if answer.camera == shuffled[0].camera][:most]

    def prompt(
        self, frame: Frame, source: str, subtask: str | None = None, *, high_level: bool = False, fast: bool = False
    ) -> Sample:
        """What the model gets at inference: the same prompts, and nothing to predict."""
        frame = self.normalize(frame, source)
        prompts = self.language.prompts
        segments = (
            prompts.high_level(frame)
            if high_level
            else prompts.low_level(frame, subtask, self.language.condition_on, fast=fast)
        )
        modality = Modality.HL_SUBTASK if high_level else Modality.CONTINUOUS
        # not rounded back to uint8, as LeRobot does it; training images are, which is half a grey level
        images = {camera: np.asarray(image, np.float32) for camera, image in frame.images.items()}
        return Sample(tuple(segments), modality, self._resize(images))

    def normalize(self, frame: Frame, source: str) -> Frame:
        return self.transforms[source].on_frame(frame) if source in self.transforms else frame

    def real_actions(self, actions: np.ndarray, frame: Frame, source: str) -> np.ndarray:
        """Model actions f32[... T D] to the robot's units and dimensions, f32[... T A]."""
        dims = len(self.robots[source].normalize.action.q01)
        return self.transforms[source].on_actions(actions[..., :dims], frame)

    def _resize(self, images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        unknown = set(images) - set(self.cameras)
        if unknown:
            raise ValueError(f"unknown cameras {sorted(unknown)}; this model knows {list(self.cameras)}")
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
            raise ValueError("fast_robot_actions needs a FAST tokenizer: make one with `pi05 tokenizer` and name it")
        prompts = self.language.prompts
        tokens = self.fast.encode(actions[None])[0]
        ids = self.fast.to_vocab(tokens, self.shapes.vocab_size, self.shapes.fast_skip_tokens)
        closing = [*self.tokenizer.encode(prompts.fast_closing), self.tokenizer.eos_id]
        return Segment(tokens=(*self.tokenizer.encode(prompts.fast_opening), *ids, *closing), loss=Loss.FAST)

    # --- samples to batches

    def tokens(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Token ids of a sample and the `Loss` of each; predicted text ends with <eos>."""
        ids = [self.tokenizer.bos_id]
        kinds = [int(Loss.NONE)]
        for segment in sample.segments:
            piece = list(segment.tokens) if segment.tokens is not None else self.tokenizer.encode(segment.text or "")
            if segment.loss and segment.tokens is None:
                piece.append(self.tokenizer.eos_id)
            ids += piece
            kinds += [int(segment.loss)] * len(piece)
        if len(ids) > MAX_TOKENS:
            raise ValueError(f"the text is {len(ids)} tokens long, more than {MAX_TOKENS}: shorten or drop it")
        return ids, kinds

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch of samples, rows with actions first; as many camera slots and tokens as its largest sample needs."""
        samples = sorted(samples, key=lambda sample: sample.actions is None)
        encoded = [self.tokens(sample) for sample in samples]
        rows = len(samples)
        length = max(len(ids) for ids, _ in encoded)
        length = -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        tokens = np.full((rows, length), self.tokenizer.pad_id, dtype=np.int64)
        kinds = np.zeros((rows, length), dtype=np.uint8)
        token_mask = np.zeros((rows, length), dtype=bool)
        for row, (ids, kind) in enumerate(encoded):
            tokens[row, : len(ids)], kinds[row, : len(ids)], token_mask[row, : len(ids)] = ids, kind, True

        slots = max(len(sample.images) for sample in samples)
        image_mask = np.zeros((rows, slots), dtype=bool)
        pixels: list[np.ndarray] = []
        image_index: list[int] = []
        camera: list[int] = []
        points: list[tuple[int, Point]] = []
        for row, sample in enumerate(samples):
            for place, (name, image) in enumerate(sample.images.items()):
                points += [(len(pixels), point) for point in sample.points if point.camera == name]
                image_mask[row, place] = True
                pixels.append(image)
                image_index.append(row * slots + place)
                camera.append(self.cameras.index(name))
        size, shapes = self.shapes.image_size, self.shapes
        queries = pad_sequence(
            [torch.tensor(self.tokenizer.encode(point.query)) for _, point in points] or [torch.zeros(0).long()],
            batch_first=True,
            padding_value=self.tokenizer.pad_id,
        )[: len(points)]
        chunk = (shapes.horizon, shapes.action_dim)
        actions = [sample.actions for sample in samples if sample.actions is not None]
        masks = [sample.action_mask for sample in samples if sample.action_mask is not None]
        return Batch(
            pixels=torch.from_numpy(np.stack(pixels) if pixels else np.zeros((0, 3, size, size), np.uint8)),
            image_index=torch.tensor(image_index, dtype=torch.long),
            camera=torch.tensor(camera, dtype=torch.long),
            image_mask=torch.from_numpy(image_mask),
            tokens=torch.from_numpy(tokens),
            token_mask=torch.from_numpy(token_mask),
            # causal from the first predicted token on: an answer must not see the question after it
            causal=torch.from_numpy(np.maximum.accumulate(kinds > 0, axis=1) & token_mask),
            loss_kind=torch.from_numpy(kinds),
            target_index=torch.from_numpy(np.flatnonzero(kinds)),
            actions=torch.from_numpy(np.stack(actions) if actions else np.zeros((0, *chunk), np.float32)),
            action_mask=torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *chunk), bool)),
            modality=torch.tensor([sample.modality.id for sample in samples]),
            source=torch.tensor([sample.source for sample in samples]),
            key=torch.tensor([sample.key for sample in samples]),
            point_image=torch.tensor([image for image, _ in points], dtype=torch.long),
            point_tokens=queries,
            point_token_mask=queries != self.tokenizer.pad_id,
            point_target=torch.tensor([point.centre for _, point in points]).reshape(-1, 2),
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
            "robots": {name: _robot_to_dict(robot) for name, robot in self.robots.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Processor:
        language = {**values["language"], "prompts": Prompts(**values["language"]["prompts"])}
        return cls(
            shapes=Shapes(**values["shapes"]),
            tokenizer=TextTokenizer.from_dict(values["tokenizer"]),
            cameras=values["cameras"],
            robots={name: _robot_from_dict(robot) for name, robot in values["robots"].items()},
            language=Language(**language),
            fast=FastTokenizer.from_dict(values["fast"]) if values["fast"] else None,
        )


def _robot_to_dict(robot: Robot) -> dict[str, Any]:
    quantiles = {"state": robot.normalize.state, "action": robot.normalize.action}
    return {
        "fps": robot.fps,
        "tasks": list(robot.tasks),
        "dataset": robot.dataset,
        "quantiles": {part: {"q01": q.q01.tolist(), "q99": q.q99.tolist()} for part, q in quantiles.items()},
    }


def _robot_from_dict(values: Mapping[str, Any]) -> Robot:
    quantiles = {part: Quantiles(np.array(q["q01"]), np.array(q["q99"])) for part, q in values["quantiles"].items()}
    return Robot(Normalize(**quantiles), values["fps"], tuple(values["tasks"]), values["dataset"])
