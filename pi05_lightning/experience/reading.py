"""How datasets are read for a policy, as those were that it was trained on, and how it is trained on them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from itertools import starmap
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args

import yaml

from pi05_lightning.data.labels import Sign
from pi05_lightning.data.mixture import Entry, Mixture
from pi05_lightning.data.processor import Language
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.evaluation.report.run import PROVENANCE
from pi05_lightning.files.hub import is_hub_id
from pi05_lightning.files.local import read_json
from pi05_lightning.models.heads.base import Head
from pi05_lightning.models.heads.fast import FastHead
from pi05_lightning.models.heads.flow import FlowHead
from pi05_lightning.models.heads.location import LocationHead
from pi05_lightning.models.heads.subtask import SubtaskHead
from pi05_lightning.module.pi05_module import DEFAULT_LR
from pi05_lightning.recipe import LossWeights, StageOptions
from pi05_lightning.types import Modality, Subset
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.training_checkpoint import TrainingCheckpoint

CLASS_PATH = f"{LeRobotConfig.__module__}.{LeRobotConfig.__name__}"
TRAINER: dict[str, Any] = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 20,
    "check_val_every_n_epoch": None,
    "val_check_interval": 1_000_000,
    "num_sanity_val_steps": 0,
}
"""Of the trainings on experience: nothing is validated on the way."""
MOST_LR = 1e-3
_OF_THE_METHOD = {"path", "labels", "frames", "same_robot_as"}
_OF_ITS_FILES = {"cameras", "state_keys", "action_keys", "subtask_key", "box_range", "task", "episodes"}
"""What says where a dataset has things, or which of it count: nothing of another dataset."""
_KNOWN = {option.name for option in fields(LeRobotConfig)}
_OF_THE_MODEL = ("heads", "flow_draws", "rtc_max_delay", "knowledge_insulation", "activation_checkpointing", "compile")
_OF_THE_MACHINE = ("accelerator", "devices", "strategy", "precision")
_OF_THE_STAGE = ("losses", "mixture", "flow_alpha")


@dataclass(frozen=True)
class Reading:
    """How a policy's datasets are read, and how it was last trained, as its run's configuration says.

    fast: FAST tokenizer.  sources: of the run, by name.  cameras: as the policy numbers them.
    model, trainer: options that trainings from it go on with.
    stage: losses, mixture, flow_alpha, freezing and lr_factors of the last one that trained the flow.
    lr: learning rate of trainings from it, if no other is given: its own, and at most 1e-3.
    """

    tokenizer: str = "tiny"
    language: dict[str, Any] = field(default_factory=dict)
    fast: str | None = None
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    lr: float = MOST_LR
    cameras: tuple[str, ...] = ()

    @classmethod
    def of(cls, policy: Path) -> Reading:
        """ValueError for weights that carry no configuration."""
        weights = locate(policy)
        if not isinstance(weights, TrainingCheckpoint) or "config" not in weights.content:
            raise ValueError(
                f"{policy} carries no configuration, which would say how its data was read and what it was trained on:"
                " give the run of `pi05 fit`, or its .ckpt"
            )
        config = yaml.safe_load(weights.run_config())
        data, model, trainer = config["data"], config["model"], config["trainer"]
        optimizer = model.get("optimizer")  # a function's name, such as the default's, or a class with its options
        options = optimizer.get("init_args", {}) if isinstance(optimizer, dict) else {}
        run = read_json(weights.path.parent.parent / PROVENANCE, default={})
        return cls(
            data["tokenizer"],
            data["language"],
            data["fast"],
            data["sources"],
            {name: model[name] for name in _OF_THE_MODEL if name in model},
            {name: trainer[name] for name in _OF_THE_MACHINE if trainer.get(name) is not None},
            last_stage(
                config["stages"], model.get("heads") or {}, run.get("samples", {}), weights.processor().language
            ),
            min(MOST_LR, options.get("lr", DEFAULT_LR)),
            weights.processor().cameras,
        )

    def adamw(self, lr: float | None, **options: Any) -> dict[str, Any]:
        """The optimizer of a run's configuration.  lr: None for `self.lr`.

        It is fused where trainings are on a GPU, but for 16-mixed, which cannot clip then.
        """
        on_cpu, precision = self.trainer.get("accelerator") in (None, "cpu"), str(self.trainer.get("precision"))
        fused = {} if on_cpu or precision == "16-mixed" else {"fused": True}
        given = {"lr": self.lr if lr is None else lr, **options, "weight_decay": 0.01, **fused}
        return {"class_path": "torch.optim.AdamW", "init_args": given}

    def source(
        self, path: str, like: str, collected: bool = False, attempts: bool = False, **options: Any
    ) -> dict[str, Any]:
        """A source of a run's configuration; see `options`."""
        read = self.options(path, like, collected, attempts)
        return {"class_path": CLASS_PATH, "init_args": {**read, "path": path, **options}}

    def options(self, path: str, like: str, collected: bool = False, attempts: bool = False) -> dict[str, Any]:
        """How a dataset is read, as options of `LeRobotConfig`: as the run read it, if it had that.

        like: another dataset of the same robot, as which one is read that the run had not; if it had neither, as the
        first that it had.  collected: `pi05 collect` wrote it, which names things in its own way.  attempts: all its
        episodes count, whichever of them the run was trained on.
        """
        robots, own = self._robots, self.name_of(path)
        taken = _KNOWN - _OF_THE_METHOD - ({"episodes"} if attempts else set())
        if own is None:
            taken -= _OF_ITS_FILES if collected else {"episodes"}
        name = own or self.name_of(like) or next(iter(robots), None)
        if name is None:
            return {}
        if robots[name].get("state_keys") == []:  # nothing of a policy without a state has one
            taken |= {"state_keys"}
        return {option: value for option, value in robots[name].items() if option in taken}

    def fed(self, losses: dict[str, Any], mixture: dict[str, float]) -> dict[str, Any]:
        """A stage's losses, as options, without those that nothing of its mixture can train."""
        trained_by = Language(**self.language).trained_by(_terms(self.model.get("heads") or {}))
        drawn = {Subset.parse(name).modality for name, share in mixture.items() if share}
        unfed = {term for term in LossWeights(**losses).used if drawn.isdisjoint(trained_by[term])}
        found = {term: weight for term, weight in losses.items() if term not in unfed}
        if "others" in found:
            found["others"] = {term: weight for term, weight in found["others"].items() if term not in unfed}
        return found

    def robot_of(self, path: str) -> str | None:
        """The source whose robot the run said that a dataset is of; None for one of its own, or that it had not."""
        name = self.name_of(path)
        return self._robots[name].get("same_robot_as") if name else None

    def frames_of(self, path: str) -> dict[str, Any]:
        """Which frames of demonstrations the run was trained on, as an option; nothing for all of them.

        ValueError for those of one sign, which only attempts have.
        """
        name = self.name_of(path)
        frames = self._robots[name].get("frames", "all") if name else "all"
        if frames in get_args(Sign):
            raise ValueError(
                f"{path} was read with `frames: {frames}`, as {name!r}: it holds attempts, so name it among the"
                " attempts and not among the demonstrations, which all succeeded"
            )
        return {} if frames == "all" else {"frames": frames}

    def of_one_robot(self, paths: Sequence[str], robot: str | None) -> list[str]:
        """Those of the datasets that are of one robot: that of a source, or by default of the first dataset."""
        first = self.robot_of(paths[0]) or self.name_of(paths[0])
        robots = [self.robot_of(path) or self.name_of(path) or first for path in paths]
        wanted = next((of for path, of in zip(paths, robots, strict=True) if self.name_of(path) == robot), first)
        return [path for path, of in zip(paths, robots, strict=True) if of == wanted]

    def name_of(self, path: str) -> str | None:
        """What the run called the dataset at a path."""
        asked = _resolved(path)
        return next((name for name, read in self._robots.items() if _resolved(read["path"]) == asked), None)

    @property
    def others(self) -> dict[str, dict[str, Any]]:
        """The run's sources that are no robot's, as far as their data is there."""
        found = {name: source for name, source in self.sources.items() if source["class_path"] != CLASS_PATH}
        paths = {name: str(source.get("init_args", {}).get("path", ".")) for name, source in found.items()}
        return {name: found[name] for name, path in paths.items() if _resolved(path).exists() or is_hub_id(path)}

    @property
    def _robots(self) -> dict[str, dict[str, Any]]:
        """Options of the run's LeRobot datasets, by the sources' names."""
        return {name: s["init_args"] for name, s in self.sources.items() if s["class_path"] == CLASS_PATH}


def _resolved(path: str) -> Path:
    return Path(path).expanduser().resolve()


def last_stage(
    stages: dict[str, Any], heads: dict[str, Any], samples: dict[str, dict[str, int]], language: Language
) -> dict[str, Any]:
    """How the last stage trained that trained the flow; what it drew is spelled out.

    heads: the model's own.  samples: `source/modality` -> how many of them to train on.  language: how they were told.
    What was frozen or slower of adapters is left out: they are part of the weights by now.
    ValueError where it drew all that there was and nothing says what that was.
    """
    own = [(stages["pretrain_steps"], {**stages["pretrain"], "flow_alpha": 1.0})]
    own.append((stages["posttrain_steps"], {**stages["posttrain"], "flow_alpha": stages["flow_alpha"]}))
    own += [(stage["steps"], stage) for stage in stages["then"]]
    last: dict[str, Any] = next((stage for steps, stage in reversed(own) if steps and stage["losses"]["flow"]), {})
    found = {key: last[key] for key in _OF_THE_STAGE if key in last}
    found["freeze"] = [pattern for pattern in last.get("freeze", ()) if "lora" not in pattern]
    found["lr_factors"] = {p: factor for p, factor in last.get("lr_factors", {}).items() if "lora" not in p}
    exponent = last.get("mixture_temperature", 0.0)
    if last and (exponent or not last["mixture"]):
        if not samples:
            raise ValueError(
                f"the policy's last stage drew from all its data, and there is no {PROVENANCE} beside its checkpoints,"
                " which says what that was: give the run of `pi05 fit` as it left it"
            )
        sizes = {Subset.parse(name): number["train"] for name, number in samples.items() if number["train"]}
        trained_by = language.trained_by(_terms(heads))
        mixture = Mixture(list(starmap(Entry, sizes.items())), trained_by, batch_size=1)
        shares = mixture.weights(StageOptions(LossWeights(**last["losses"]), last["mixture"], exponent))
        found["mixture"] = {str(subset): float(share) for subset, share in zip(sizes, shares, strict=True) if share}
    return found


def _terms(heads: dict[str, Any]) -> dict[str, Collection[Modality]]:
    """As `Pi05.terms`, without a model.  heads: the auxiliary ones, as in the options."""
    classes: list[type[Head]] = [SubtaskHead, FastHead, FlowHead, LocationHead]
    classes += [resolve_name(":".join(head["class_path"].rsplit(".", 1))) for head in heads.values()]
    return {term: modalities for kind in classes for term, modalities in kind.terms.items()}
