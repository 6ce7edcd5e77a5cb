"""What a robot calls: observations in, actions in the robot's units out, one at a time."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from pi05_lightning.acting import Acting, check
from pi05_lightning.acting.device import Dtype, check_device, check_dtype
from pi05_lightning.acting.int8 import int8_weights
from pi05_lightning.acting.together import Request, RobotInference, predict_together
from pi05_lightning.data.observation import as_image, as_numbers, as_vector
from pi05_lightning.data.processor import Processor
from pi05_lightning.files.hub import check_repo
from pi05_lightning.files.suggestion import suggestion
from pi05_lightning.models.int8 import computes_in_int8
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Frame
from pi05_lightning.weights.abilities import UNKNOWN
from pi05_lightning.weights.folder import save
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.published import Licence, publish_policy, save_published

Observation = Mapping[str, Any]
"""{"image": u8|f32[3 H W] or [1 3 H W] or {camera: …}, "state": f32[S], "task": str}; float images are in [0, 1].

What the robot's data always had must be there, and nothing else may be. A policy of one task needs not be told it, one
of one camera not the camera's name."""
CudaGraph = Literal["plain", "compiled"]
MUCH = 10e9
"""Bytes of weights beyond which those of the full size are fp32."""

log = logging.getLogger(__name__)
KEYS = ("image", "state", "task")


class Pi05Policy(RobotInference):
    """π0.5 at inference, as one robot asks it; for many robots at once see `Inference`.

    Args:
        model_path: a checkpoint file, a run's directory (its newest checkpoint), an exported folder, or a folder of
            LeRobot's or openpi's, or its Hub id; or a model and its processor themselves.
        policy_type: `pi0.5`, the only one there is.
        backbone_type: what the caller expects of the checkpoint, an error if it is not so; as are the next three.
        obs_dim: the state's dimensions.
        action_dim: the action's dimensions.
        image_dim: [3 H W] of the caller's images. Of any height and width, they are resized to the model's.
        use_fast_tokens: the checkpoint must have a FAST tokenizer.
        pred_horizon: another name for `execution_horizon`.
        acting: how it acts, as keywords: the fields of `Acting`, such as `robot`, `actions` and `execution_horizon`.
        seed: of noise and sampled tokens.
        device: where the model runs.
        dtype: what the weights are cast to on loading, such as torch.bfloat16; by default they stay as they are. With
            `int8`, linear layers compute in 8 bits on a CPU, as far as actions stay what they are (acting/int8.py).
        tokenizer: of a LeRobot or openpi folder: the local folder of PaliGemma's tokenizer.
        averaged: use a training checkpoint's averaged weights (`ema.decay`, or openpi's) if it has them.
        base: of a checkpoint of adapters: a path or Hub id of the weights that they stand beside, if they moved.
        cuda_graph: on a CUDA device, sample chunks by CUDA graphs: several times as fast for one robot. `plain` takes
            a second where a prompt has a new length, `compiled` is faster still and takes the first two half a minute.

    Raises ValueError when there is no policy at `model_path`, another than expected, or one that was not trained for
    what is asked of it.
    """

    def __init__(
        self,
        model_path: str | Path | tuple[Pi05, Processor],
        *,
        policy_type: Literal["pi0.5"] = "pi0.5",
        backbone_type: str | None = None,
        use_fast_tokens: bool = False,
        obs_dim: int | None = None,
        action_dim: int | None = None,
        image_dim: Sequence[int] | None = None,
        pred_horizon: int | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | Dtype | None = None,
        tokenizer: str | None = None,
        averaged: bool = True,
        base: str | Path | None = None,
        cuda_graph: CudaGraph | None = None,
        **acting: Any,
    ) -> None:
        known = {field.name for field in fields(Acting)}
        for name in acting.keys() - known:
            raise TypeError(f"Pi05Policy has no option {name!r}{suggestion(name, known | {'pred_horizon', 'device'})}")
        how = Acting(**acting)
        if None not in (how.execution_horizon, pred_horizon) and how.execution_horizon != pred_horizon:
            raise ValueError(
                f"execution_horizon is {how.execution_horizon} and pred_horizon {pred_horizon}: they mean the same,"
                " give one"
            )
        if pred_horizon is not None:
            how = replace(how, execution_horizon=pred_horizon)
        check_device(device)
        check_dtype(dtype, device)
        if cuda_graph and how.guidance != 1:
            raise ValueError("cuda_graph: the graph is of one row, and guidance takes two: leave out one of them")
        if cuda_graph and how.actions == "fast":
            raise ValueError(
                "cuda_graph: the graph is of the flow head, and FAST tokens need none: leave out one of them"
            )
        if isinstance(model_path, tuple):
            (model, processor), trained = model_path, UNKNOWN
            if dtype is not None:
                raise ValueError(f"dtype is {dtype}: it is for weights that are read; cast the model, or leave it out")
        else:
            weights = locate(model_path, tokenizer=tokenizer, averaged=averaged, base=base)
            processor, trained = weights.processor(), weights.trained
            check(how, processor, trained)
            # last: it is gigabytes, and what is wrong with the others shows before
            if dtype == "int8":
                model = int8_weights(weights, how)
            else:
                model = weights.model(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
                if torch.device(device).type == "cuda" and sum(p.nbytes for p in model.parameters()) > MUCH:
                    log.warning("the weights are fp32: dtype bfloat16 halves their memory, and a GPU is faster in it")
        super().__init__(model.to(device), processor, how, seed, trained)
        if use_fast_tokens and processor.fast is None:
            raise ValueError(f"{model_path} has no FAST tokenizer: leave out use_fast_tokens, or train with data.fast")
        for name, value, wanted in (
            ("policy_type", "pi0.5", policy_type),
            ("backbone_type", model.config.backbone_type, backbone_type),
            ("obs_dim", processor.robots[self.robot].state_dim, obs_dim),
            ("action_dim", self.action_dim, action_dim),
            ("image_dim's channels", 3, image_dim[0] if image_dim else None),
        ):
            if wanted not in (None, value):
                raise ValueError(f"{name} is {value} in {model_path}, not {wanted}: correct it or leave it out")
        if cuda_graph:
            self.capture(compile=cuda_graph == "compiled")
        self._begin_queue()

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Pi05Policy:
        """The policy at a path; the options are the constructor's."""
        return cls(path, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Export weights, dimensions and processor into a folder that `from_pretrained` reads.

        Raises ValueError where it computes in 8 bits: its weights are not whole any more.
        """
        self._check_whole("saved")
        save(folder, self.model, self.processor, self.trained)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool = False,
        license: str | None = None,
        license_name: str | None = None,
        license_link: str | None = None,
    ) -> str:
        """Publish the policy as `user/name` on the Hugging Face Hub, with a card; returns the commit's address.

        license: an identifier of the Hub's, such as apache-2.0, or `other` with its name and a link.  `pi05 push` also
        puts a run's results on the card.
        Raises ValueError when the Hub refuses or cannot be reached; readers then see what was there before.
        """
        check_repo(repo)
        licence = Licence(license, license_name, license_link)
        self._check_whole("published")
        with TemporaryDirectory() as folder:
            save_published(Path(folder), repo, self.model, self.processor, self.trained, licence)
            return publish_policy(Path(folder), repo, private)

    def to_device(self, device: str | torch.device) -> Pi05Policy:
        """Move the model, without its CUDA graphs. ValueError where it computes in 8 bits, which a CPU alone does."""
        if torch.device(device).type != "cpu":
            self._check_whole(f"moved to {device}")
        self.model.to(device)
        self._chunk = self.model.chunk
        return self

    def _check_whole(self, what: str) -> None:
        if computes_in_int8(self.model):
            raise ValueError(f"a policy of dtype int8 cannot be {what}: load it without dtype for that")

    def acting_as(self, acting: Acting) -> Self:
        policy = super().acting_as(acting)
        policy._begin_queue()
        return policy

    def session(self, seed: int) -> Pi05Policy:
        """A policy for another robot over the same weights, with a queue, a subtask and noise of its own."""
        policy = copy.copy(self)
        policy.generator = torch.Generator().manual_seed(seed)
        policy.inputs = self.inputs.anew()
        policy.failed_decodes = 0
        policy._begin_queue()
        return policy

    def reset(self) -> None:
        """Forget the action queue and the subtask: call it between episodes."""
        if self._next is not None:
            wait([self._next])  # it counts chunks and draws noise
        self._clear_queue()

    def _begin_queue(self) -> None:
        self._worker = ThreadPoolExecutor(1, "next-chunk") if self.acting.inference_delay else None
        self._clear_queue()

    def _clear_queue(self) -> None:
        self._queue: deque[np.ndarray] = deque()
        self._next: Future[np.ndarray] | None = None
        self._given = 0
        self.chunks_begun = 0
        self.subtask = None
        self._task: str | None = None

    # --- what a robot calls

    def predict(self, observation: Observation) -> np.ndarray:
        """The next action f32[A] in the robot's units; runs the chunk queue.

        The next chunk starts from the observation at which `inference_delay` actions are left in the queue; what
        happens does not depend on how long computing it takes, and is what a rollout does.  With another task, queue
        and subtask of the last one are forgotten.  Raises ValueError for an observation that does not fit, whether or
        not a chunk is due.
        """
        frame = self.frame(observation)
        self.follow(frame)
        if not self._queue:
            pending, given = self._next, self._given
            self._next, self._given = None, 0  # before it may fail: the next call then begins anew
            chunk = pending.result() if pending else self.predict_chunk(frame)
            ahead = 0 if pending else self.acting.inference_delay  # a first chunk goes on until the next one has come
            self._queue.extend(chunk[given : given + self.execution_horizon + ahead])
        if self._worker and self._next is None and len(self._queue) <= self.acting.inference_delay:
            self._given = len(self._queue)
            kept = copy.deepcopy(frame)  # the caller may write into its images meanwhile
            running = np.stack(self._queue) if self.acting.rtc else None
            self._next = self._worker.submit(self.predict_chunk, kept, None, running)
        return self._queue.popleft()

    def follow(self, frame: Frame) -> None:
        if self._task not in (None, frame.task):
            self.reset()
        self._task = frame.task

    def predict_chunk(
        self,
        observation: Observation | Frame,
        noise: Tensor | np.ndarray | None = None,
        prefix_actions: Tensor | np.ndarray | None = None,
    ) -> np.ndarray:
        """An action chunk f32[T A] in the robot's units; noise f32[horizon D], of the model's, makes it reproducible.

        prefix_actions f32[d A], in the robot's units: what it will do in the chunk's first d steps whatever comes out,
        because it executes them meanwhile. The chunk begins with them and goes on from them.

        Raises ValueError as `predict_chunks`.
        """
        return predict_together([self.request(observation, noise, prefix_actions)]).of(0)

    def request(
        self,
        observation: Observation | Frame,
        noise: Tensor | np.ndarray | None = None,
        prefix_actions: Tensor | np.ndarray | None = None,
    ) -> Request:
        """What `predict_chunk` is asked for, to be computed later; nothing of the policy changes until then.

        Raises ValueError for all that is wrong with it.
        """
        frame = self.processor.as_seen(self.frame(observation))
        self.processor.prompt(frame, self.robot, high_level=self.hierarchical)  # which may be too long
        start = None if noise is None else self.start(as_numbers("noise", noise)[None], 1)
        given = None if prefix_actions is None else self.prefix_actions_of(frame, prefix_actions)
        return Request(self, frame, start, given)

    def predict_subtask(self, observation: Observation | Frame) -> str:
        """What to do next, in words."""
        return self.predict_subtasks([self.frame(observation)])[0]

    def answer(self, observation: Observation | Frame, question: str, camera: str) -> str:
        """What it says to a question about a camera's picture; places in it are shares of the picture.

        Raises ValueError as `Inference.answer`, and for a dictionary that does not fit.
        """
        frame = observation if isinstance(observation, Frame) else self.frame(observation)
        return super().answer(frame, question, camera)

    def prepare(self, observation: Observation | Sequence[Observation]) -> Batch:
        """Exactly the tensors that the model gets, of one observation or of a list of them, conditioned on the task."""
        several = [observation] if isinstance(observation, Mapping) else observation
        frames = [self.frame(one) for one in several]
        fast = self.acting.actions == "fast"
        prompts = [self.processor.prompt(frame, self.robot, fast=fast, advantage=self.advantage) for frame in frames]
        return self.processor.collate(prompts)

    def frame(self, observation: Observation | Frame) -> Frame:
        """An observation as a Frame. Raises ValueError for what does not fit this policy, with key, index and value."""
        return self.inputs(observation if isinstance(observation, Frame) else self._read(observation))

    def _read(self, observation: Observation) -> Frame:
        if not isinstance(observation, Mapping):
            raise ValueError(f"an observation is a dictionary, not a {type(observation).__name__}")
        for key in observation:
            if key not in KEYS:
                hint = suggestion(str(key), KEYS)
                raise ValueError(f"an observation has no key {key!r}{hint}; it has {', '.join(KEYS)}")
        given = {key: value for key, value in observation.items() if value is not None}
        if "state" in given and not self.inputs.robot.state_dim:
            raise ValueError("a state is given, and the policy was trained without one: leave it out")
        if not str(given.get("task", "?")).strip():
            raise ValueError("task is blank: say what to do")
        images = given.get("image", {})
        if not isinstance(images, Mapping):
            as_image("image", images)
            if len(self.inputs.needed_cameras) != 1:
                cameras = ", ".join(self.inputs.cameras)
                raise ValueError(f"image is one image, and the policy's cameras are {cameras}: give {{camera: image}}")
            images = {self.inputs.needed_cameras[0]: images}
        return Frame(
            images={camera: as_image(f"image {camera!r}", image) for camera, image in images.items()},
            task=given.get("task", ""),
            state=as_vector("state", given["state"]) if "state" in given else None,
        )
