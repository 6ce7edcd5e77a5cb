"""The policy as LeRobot calls it: batches in, a loss or actions out. Model and losses are pi05_lightning's."""

from __future__ import annotations

import copy
import logging
import re
from collections import deque
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig, parser
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies import PreTrainedPolicy
from torch import Tensor

from lerobot_policy_pi05_lightning.configuration_pi05_lightning import Pi05LightningConfig
from lerobot_policy_pi05_lightning.frames import Taught, camera_names, depth_cameras, frames_of
from pi05_lightning.acting.inference import Inference
from pi05_lightning.data.augment import augment
from pi05_lightning.data.fast import NO_CHUNK, FastDecodeError, FastTokenizer
from pi05_lightning.data.mixture import TrainedBy
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.tokenizer import GEMMA_SIZE, SHIPPED, TextTokenizer
from pi05_lightning.files.hub import is_on_hub, local_folder
from pi05_lightning.files.local import read_json
from pi05_lightning.losses import mean_terms, total_loss
from pi05_lightning.models.flow_noise import with_noise
from pi05_lightning.models.parallelize import checkpoint_blocks
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.module.history import trained_heads
from pi05_lightning.optim import param_groups
from pi05_lightning.types import Batch, Frame, Modality, Sample, Subset
from pi05_lightning.weights.abilities import Trained
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.beginning import begin, carried_on
from pi05_lightning.weights.folder import save
from pi05_lightning.weights.lerobot_processor import ACTION, PALIGEMMA, ROBOT, STATE
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.safetensors import CONFIG

log = logging.getLogger(__name__)


class Pi05LightningPolicy(PreTrainedPolicy):
    """π0.5 in LeRobot. It takes and gives real units; `processor` normalises, and travels with the weights.

    Args:
        config: the options.
        dataset_meta: the dataset to train on, whose statistics count; without one, as where a policy is evaluated,
            they are those of the weights.
        weights: to begin with; by default those of `config.init_from`, or random ones.

    Raises ValueError for data and options that do not go together.
    """

    config_class = Pi05LightningConfig
    name = "pi05_lightning"

    def __init__(
        self,
        config: Pi05LightningConfig,
        dataset_meta: LeRobotDatasetMetadata | None = None,
        weights: Weights | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        if dataset_meta is not None and (depth := depth_cameras(Path(dataset_meta.root), config.image_features)):
            log.warning("depth cameras are not learned from: %s", ", ".join(depth))
            config.input_features = {key: x for key, x in config.input_features.items() if key not in depth}
        config.validate_features()
        self.config: Pi05LightningConfig = config
        if weights is None and config.init_from is not None:
            # with a dataset the tokenizer is a part of the processor that is made of it
            weights = locate(config.init_from, tokenizer=config.tokenizer if dataset_meta is None else None)
        self.cameras, self.has_state = camera_names(list(config.image_features)), STATE in config.input_features
        self.model = Pi05.without_memory(config.sizes)
        self.taught: Taught | None = None
        if dataset_meta is not None:
            self.taught = Taught(
                Path(dataset_meta.root),
                self.cameras,
                config.sizes.shapes,
                state_keys=[STATE] if self.has_state else [],
                subtask_key=config.subtask_key,
                relative_dims=config.relative_dims,
                relative_state_dims=config.relative_state_dims,
                min_range=config.min_range,
            )
            self.processor = self._processor_of(self.taught, weights)
        elif weights is not None:
            if config.sizes.horizon > (horizon := weights.config().horizon):
                raise ValueError(
                    f"chunk_size is {config.sizes.horizon}, and the weights were trained on chunks of {horizon}"
                    " actions: leave it out, or give less"
                )
            self.processor = weights.processor()
        else:
            raise ValueError("a policy that nobody trained has no statistics: give a dataset, or --policy.path")
        begin(self.model, weights, self.processor)
        self.trained = Trained(complete=True) if weights is None else carried_on(weights, self.processor)
        self._learned: set[str] = set()
        self._prepare_training()
        self.reset()

    # --- building

    def _processor_of(self, taught: Taught, weights: Weights | None) -> Processor:
        """Statistics of the dataset; tokenizers of the options, or else those of the weights."""
        config, default = self.config, SHIPPED if self.config.sizes.vocab_size < GEMMA_SIZE else PALIGEMMA
        before: Processor | None = None
        if weights is not None and None in (config.tokenizer, config.fast):
            try:
                before = weights.processor()
            except ValueError:  # of weights that are no policy
                if config.tokenizer is None:
                    raise
        if config.tokenizer is None and before is not None:
            text = before.tokenizer
        else:
            text = TextTokenizer.load(config.tokenizer or default)
        if config.fast is not None:
            fast: FastTokenizer | None = FastTokenizer.load(config.fast)
        else:
            fast = before.fast if before else None
        if fast is not None and (unfit := fast.misfit(config.sizes.horizon, taught.robot.action_dim)):
            if config.fast is not None:
                raise ValueError(f"fast: the tokenizer {unfit}: fit one with `pi05 tokenizer`")
            fast = None  # of the robot that the weights were trained on
        return Processor(
            shapes=config.sizes.shapes,
            tokenizer=text,
            cameras=list(self.cameras.values()),
            robots={ROBOT: taught.robot},
            language=config.language,
            fast=fast,
            targets=self.model.targets,
        )

    def _prepare_training(self) -> None:
        """What is trained, and on which of a frame's modalities. Raises ValueError for what the data cannot teach."""
        config, model = self.config, self.model
        recipe = config.recipe_of(config.weights)
        recipe.check_terms(model.terms)
        recipe.check_followed([name for name, _ in model.named_parameters()])
        (stage,) = recipe.stages
        if self.taught is not None:
            learned = {term for head in trained_heads(stage, model) for term in head.terms}
            lacking = {term: why for term in stage.weights if (why := self._lacks(term, learned))}
            for term, why in lacking.items():
                if config.losses is not None:
                    raise ValueError(f"losses: {term} cannot be trained, as {why}; give it, or leave the term out")
                log.warning("stage %s: %s is not trained, as %s", stage.name, term, why)
            kept = {term: weight for term, weight in config.weights.used.items() if term not in lacking}
            if not kept:
                raise ValueError(f"stage {stage.name} has nothing to train: " + "; ".join(lacking.values()))
            (stage,) = config.recipe_of(config.weights_of(kept)).stages
            self._shares = self._shares_of(list(stage.weights))
        self.stage = stage
        for name, parameter in model.named_parameters():
            parameter.requires_grad = not stage.freezes(name)
        if config.gradient_checkpointing:
            checkpoint_blocks(model)

    @property
    def _trained_by(self) -> TrainedBy:
        return self.processor.language.trained_by(self.model.terms)

    def _lacks(self, term: str, learned: Collection[str]) -> str:
        """Why a loss term cannot be learned from the dataset; nothing where it can.

        learned: the terms of those heads that are trained.
        """
        assert self.taught is not None
        if term not in learned:
            return "all that it would train is frozen, or has a learning rate of 0"
        if term == "fast" and self.processor.fast is None:
            return "there is no FAST tokenizer (make one with `pi05 tokenizer`, and name it as --policy.fast)"
        if term == "subtask" and not self.taught.share[Modality.HL_SUBTASK]:
            return "the dataset has no subtasks (language_persistent, subtask_index, or --policy.subtask_key)"
        if any(self.taught.share[modality] for modality in self._trained_by[term]):
            return ""
        return "the dataset has no questions with answers (language_events)"

    def _shares_of(self, terms: list[str]) -> dict[Modality, float]:
        """How often a frame that can serve as a modality does, by the shares that all of them have in the mixture."""
        assert self.taught is not None
        learned = {modality for term in terms for modality in self._trained_by[term]}
        if self.processor.fast is None:
            learned -= {Modality.FAST}
        found = {m: share for m, share in self.taught.share.items() if share and m in learned}
        mixture = {Modality(name): share for name, share in self.config.mixture.items()} or dict.fromkeys(found, 1.0)
        for modality in mixture.keys() - found.keys():
            raise ValueError(f"mixture: nothing is learned from {modality} with these data, and losses {terms}")
        # those that few frames can serve as are chosen more often where they can
        return {modality: share / found[modality] for modality, share in mixture.items()}

    # --- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> Self:
        """A policy at a folder or Hub id, as LeRobot's commands and `pi05 convert --format plugin` write them.

        Raises ValueError for options that do not go with it.
        """
        pinned = revision is not None and is_on_hub(pretrained_name_or_path)
        folder = local_folder(f"{pretrained_name_or_path}@{revision}" if pinned else pretrained_name_or_path)
        if config is None:
            config = PreTrainedConfig.from_pretrained(folder)
        if not isinstance(config, Pi05LightningConfig):
            raise ValueError(f"{pretrained_name_or_path} is a policy of the type {config.type}, not {cls.name}")
        # a run that began with init_from and is resumed has both too, and no such argument
        if config.init_from is not None and parser.get_path_arg("policy") is not None:
            raise ValueError("init_from: --policy.path says what weights to begin with: leave out one of them")
        _check_stage(config, read_json(folder / CONFIG, default={}))
        policy = cls(config, weights=locate(folder), **{k: v for k, v in options.items() if k == "dataset_meta"})
        return policy.to(config.device).eval()

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights, processor and what was trained, as an export of ours; over its config.json LeRobot's."""
        prefix = "model."
        whole = None if state_dict is None else {k.removeprefix(prefix): v for k, v in state_dict.items()}
        save(save_directory, self.model, self.processor, self.trained, whole)
        config = copy.copy(self.config)
        config.init_from = config.tokenizer = config.fast = None  # what they named is in the folder
        config._save_pretrained(save_directory)

    # --- training

    def wrap_with_peft(self, *_: Any, **__: Any) -> NoReturn:
        """Raises ValueError: LeRobot would save adapters without the dataset's statistics."""
        raise ValueError(
            "peft: LeRobot saves nothing but adapters then, and not this policy's statistics: train them"
            " with `pi05 fit --model.lora.rank 16` instead"
        )

    def get_optim_params(self) -> list[dict[str, Any]]:
        """Groups of the parameters that are trained, each with its decay and its rate."""
        trained = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        groups = []
        for group in param_groups(trained, self.config.recipe_of(self.config.weights)):
            decay = {"weight_decay": group["weight_decay"]} if "weight_decay" in group else {}
            (factor,) = group["lr_factors"]
            groups.append({"params": group["params"], "lr": factor * self.config.optimizer_lr, **decay})
        return groups

    def samples(self, batch: Mapping[str, Any]) -> list[Sample]:
        """What the frames of a batch serve as, by chance that depends on seed, step and frame; without those that serve
        as nothing."""
        if self.taught is None:
            raise ValueError("the policy was opened without a dataset: it can act, and not be trained")
        frames = self.taught.frames(frames_of(batch, self.cameras, self.has_state), batch)
        step = sum(self.trained.stages.values()) if self.training else 0
        samples = []
        for frame, index in zip(frames, batch["index"].reshape(-1).tolist(), strict=True):
            key = (step << 40) + int(index)
            if modality := self._modality(frame, key):
                samples.append(self._sample(frame, Subset(ROBOT, modality), key, int(index)))
        return samples

    def _sample(self, frame: Frame, subset: Subset, key: int, index: int) -> Sample:
        questions = self.config.language.questions_per_sample if self.training else 1
        try:
            return self.processor.sample(frame, subset, key, questions, self.training)
        except ValueError as error:
            raise ValueError(f"frame {index} of the dataset: {error}") from error

    def _modality(self, frame: Frame, key: int) -> Modality | None:
        able = [
            modality
            for modality in self._shares
            if {
                Modality.QA: bool(frame.answers),
                Modality.HL_SUBTASK: frame.subtask is not None and frame.subtask_is_target,
            }.get(modality, True)
        ]
        weights = np.array([self._shares[modality] for modality in able])
        if not weights.sum():
            return None
        rng = np.random.Generator(np.random.Philox(key=[(self.config.seed + key) % 2**63, 3]))
        return able[rng.choice(len(able), p=weights / weights.sum())]

    def collated(self, samples: list[Sample]) -> Batch:
        """A batch of samples on the host, with noise and flow time, and in training with augmentation drawn."""
        config = self.config
        draws, delay = (config.flow_draws, config.rtc_max_delay) if self.training else (1, 0)
        batch = with_noise(self.processor.collate(samples), config.seed, draws, delay)
        if self.training and config.augmentation is not None:
            batch = config.augmentation.draw(batch, self.processor.cameras, self.processor.tokenizer.loc_ids)
        return batch

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """The stage's loss of a batch of LeRobot's loader, and the loss terms that it is made of.

        A batch whose frames all serve as nothing, as few have questions, has the loss 0.
        """
        if reduction != "mean":
            raise ValueError("sample_weighting: π0.5's loss terms are means over tokens and actions, not over samples")
        weights, device = self.stage.weights, self.model.device
        terms, every = {}, dict.fromkeys(self.model.terms, torch.tensor(0))
        if samples := self.samples(batch):
            host = self.collated(samples)
            every = dict(zip(self.model.terms, self.model.counts(host), strict=True))
            insulate = self.config.knowledge_insulation and self.training
            terms = self.model(augment(host.to(device)), weights, insulate=insulate)
        means, found = mean_terms(terms, {name: n.to(device) for name, n in every.items() if name in weights})
        loss = total_loss(means, weights)
        if not terms:  # the next batch has something to learn from, or other ranks have
            loss = loss + 0 * next(p for p in self.model.parameters() if p.requires_grad).sum()
        names = [name for name, count in found.items() if count]
        self._learned = set(names)
        return loss, {f"loss_{name}": means[name].item() for name in names}

    def update(self) -> None:
        """LeRobot calls it after every optimizer step: take note of what was trained."""
        if not self._learned:
            return
        delay = self.config.rtc_max_delay if "flow" in self._learned else 0
        self.trained = self.trained + Trained(
            {self.stage.name: 1}, dict.fromkeys(self._learned, 1), complete=True, delays={delay: 1} if delay else {}
        )
        self.__dict__.pop("inference", None)  # of other abilities

    # --- acting

    @cached_property
    def inference(self) -> Inference:
        """The policy with its weights as they are. Raises ValueError for what it was not trained for."""
        return Inference(self.model, self.processor, self.config.acting, self.config.seed, self.trained)

    def reset(self) -> None:
        """Forget queue and subtasks: LeRobot calls it when episodes begin."""
        self._queue: deque[np.ndarray] = deque()
        self._chunks = 0
        self._tasks: list[str] | None = None
        self.subtasks: list[str | None] = []
        """What each robot of the batch does, in words; None where the task alone conditions the actions."""

    def _seen(self, batch: Mapping[str, Any]) -> list[Frame]:
        """The frames of a batch, checked; other tasks than the last batch's begin anew."""
        seen = frames_of({**batch, ACTION: None}, self.cameras, self.has_state)
        frames = [self.inference.inputs(frame) for frame in seen]
        tasks = [frame.task for frame in frames]
        if tasks != self._tasks:
            self.reset()
        self._tasks = tasks
        return frames

    def _chunk(self, frames: list[Frame], noise: Tensor | None = None) -> np.ndarray:
        """f32[B T A], in real units; predicts what to do next first, where that is due.

        Raises FastDecodeError for FAST tokens that are no chunk, also where they are counted: a robot gets no NaN.
        """
        if self.inference.replans(self._chunks):
            self.subtasks = list(self.inference.predict_subtasks(frames))
        elif not self.subtasks:
            self.subtasks = [None] * len(frames)
        self._chunks += 1
        chunks = self.inference.predict_chunks(frames, self.subtasks, noise)
        if np.isnan(chunks).any():
            raise FastDecodeError(NO_CHUNK)
        return chunks

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], noise: Tensor | None = None, **_: Any) -> Tensor:
        """Chunks f32[B T A] in real units; noise f32[B horizon D], of the model's, makes them reproducible."""
        return torch.from_numpy(self._chunk(self._seen(batch), noise)).to(self.model.device)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], noise: Tensor | None = None, **_: Any) -> Tensor:
        """The next action f32[B A] of each robot in real units; the subtask is predicted here too."""
        frames = self._seen(batch)
        if not self._queue:
            chunk = self._chunk(frames, noise)
            self._queue.extend(chunk[:, : self.inference.execution_horizon].transpose(1, 0, 2))
        return torch.from_numpy(self._queue.popleft().copy()).to(self.model.device)

    def supports_text_generation(self) -> bool:
        """Whether it says what to do next."""
        return self.inference.hierarchical

    def generate_text(self, batch: dict[str, Any]) -> list[str]:
        """What each robot of a batch is to do next, in words."""
        return self.inference.predict_subtasks(self._seen(batch))


def _check_stage(config: Pi05LightningConfig, saved: Mapping[str, Any]) -> None:
    """Raises ValueError for another stage than the saved config.json's with what that stage alone was trained by."""
    before = saved.get("stage", config.stage)
    options = [*(parser.get_cli_overrides("policy") or ()), *parser.get_yaml_overrides("policy")]
    given = {re.split("[=.]", option.lstrip("-"))[0] for option in options}
    for name in ("losses", "flow_alpha"):
        value = getattr(config, name)
        if before != config.stage and name not in given and value is not None and value == saved.get(name):
            raise ValueError(
                f"{name} is {value}, which --policy.path took over from the stage {before}: give --policy.{name} for"
                f" the stage {config.stage}, or --policy.{name}=null for its own; to keep it, begin with"
                " --policy.type and --policy.init_from instead"
            )
