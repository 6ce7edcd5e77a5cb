"""What each round of learning trains on, as a run's configuration: by which method, from which attempts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from pi05_lightning.data.attempts import Attempts, of_a_policy
from pi05_lightning.data.chosen_episodes import choose_episodes
from pi05_lightning.data.fast import FastTokenizer
from pi05_lightning.data.find_dataset import find_dataset
from pi05_lightning.data.labels import POSITIVE, Labels, Sign
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.sources.lerobot import LeRobotConfig, LeRobotSource
from pi05_lightning.data.sources.vision_text import VisionTextConfig
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.experience.reading import TRAINER, Reading
from pi05_lightning.types import Modality, Shapes

Method = Literal["recap", "successes", "dagger", "demonstrations"]
METHODS: tuple[Method, ...] = get_args(Method)
"""Signs of advantages in the prompt (π*0.6); the policy's successes alone (filtered behaviour cloning); the expert's
corrections alone (DAgger); more steps on the demonstrations."""
STAGE = "experience"
VISION_TEXT = f"{VisionTextConfig.__module__}.{VisionTextConfig.__name__}"


@dataclass(frozen=True)
class Training:
    """How a round's policy is trained: optimizer steps, frames of a step on each device, learning rate (None:
    see `Reading.lr`).

    demonstrations_share: of the draws; the attempts of all rounds share the rest.  omission: share of the samples that
    leave out the advantage.
    """

    steps: int
    batch_size: int
    lr: float | None
    demonstrations_share: float
    omission: float


@dataclass(frozen=True)
class AttemptSummary:
    """A dataset of attempts, and what there is to learn from in the episodes that it declares for training.

    labels: of the method recap.  signs: those of the advantages of what the policy did.  corrected: whether the expert
    took over in any.  successes: numbers of those that succeeded without; None as long as it is not recorded.
    collected: whether `pi05 collect` wrote it, which names things in its own way.
    """

    path: str
    labels: Path | None = None
    signs: Sequence[Sign] = get_args(Sign)
    corrected: bool = True
    successes: Sequence[int] | None = None
    collected: bool = True

    @classmethod
    def read(cls, path: str, labels: Path | None = None) -> AttemptSummary:
        """ValueError where a dataset does not say how an attempt ended, and for labels that do not fit it."""
        files = LeRobotFiles.open(find_dataset(path))
        attempts, signs = Attempts.read(files), get_args(Sign)
        trained = np.isin(attempts.episode, choose_episodes(files, "train", 0.0, None))
        corrected, own = trained & attempts.intervention, trained & ~attempts.intervention
        if labels is not None:
            found = Labels.read(labels, files).at(attempts.episode[own], attempts.frame[own], labels)
            signs = tuple(sign for sign in signs if (found[POSITIVE] == (sign == "positive")).any())
        alone = trained & ~np.isin(attempts.episode, attempts.episode[corrected])
        successes = np.unique(attempts.episode[alone & attempts.success])
        return cls(path, labels, signs, bool(corrected.any()), successes.tolist(), of_a_policy(files))


def check_datasets(
    policy: Path,
    reading: Reading,
    processor: Processor,
    demonstrations: Sequence[str],
    attempts: Sequence[str],
    robot: str | None = None,
) -> None:
    """ValueError for a dataset or a tokenizer that cannot be opened, or a dataset of another robot than the policy's.

    policy, processor: what is to learn from them.  robot: source whose robot it acts as.
    """
    _check_rehearsed(policy, reading, processor.shapes)
    names, actor = source_names(reading, demonstrations, robot)
    shown = demonstrations[names.index(actor)]
    for path in (*demonstrations, *attempts):
        is_attempt, files = path in attempts, LeRobotFiles.open(find_dataset(path))
        like = shown if is_attempt else demonstrations[0]
        is_known = reading.name_of(path) is not None
        as_read = path if is_known else like
        name = reading.robot_of(as_read) or reading.name_of(as_read)
        ours = processor.robots[name if name in processor.robots else processor.acting_as(robot)]
        read = reading.options(path, like, is_attempt and of_a_policy(files), is_attempt)
        config = LeRobotConfig(**{**read, "path": path})
        try:
            source = LeRobotSource(config, path, "train", processor.shapes.horizon, (0, 0), answers=False)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as the data of {policy}: {error}") from error
        cameras = source.camera_names if ours.cameras is None else ours.cameras
        found = {
            "cameras": (sorted(source.camera_names), sorted(cameras)),
            "dims of state": (source.columns.state.shape[1], ours.state_dim),
            "dims of action": (source.columns.action.shape[1], ours.action_dim),
            "frames per second": (files.fps, ours.fps if ours.fps_is_known else None),
        }
        if is_known or {*source.camera_names} <= {*cameras}:  # one robot's datasets may lack some
            del found["cameras"]
        if other := {what: both for what, both in found.items() if both[1] and both[0] != both[1]}:
            told = "; ".join(f"its {what} are {its}, and the policy's {own}" for what, (its, own) in other.items())
            raise ValueError(f"{path} is not of the robot of {policy}: {told}")


def _check_rehearsed(policy: Path, reading: Reading, shapes: Shapes) -> None:
    """ValueError for tokenizers, and for images with texts of the Hub's, that are gone since the policy was trained."""
    TextTokenizer.load(reading.tokenizer)
    if reading.fast is not None:
        FastTokenizer.load(reading.fast)
    for name, source in reading.others.items():
        options = source["init_args"]
        if source["class_path"] == VISION_TEXT and not Path(options["path"]).expanduser().exists():
            try:
                VisionTextConfig(**options).open(name, "train", shapes)
            except ValueError as error:
                raise ValueError(f"{policy} was trained on {name}, and goes on with it: {error}") from error


def configuration(
    method: Method,
    policy: Path,
    reading: Reading,
    demonstrations: Sequence[str],
    attempts: Sequence[AttemptSummary],
    training: Training,
    robot: str | None = None,
) -> dict[str, Any]:
    """A run of `pi05 fit` of one stage, from the weights of `policy`, on all data so far.

    The stage goes on with what the policy was last trained on, so that it forgets nothing, as far as that is there; of
    its draws of actions, attempts have their share.

    attempts: datasets, of all rounds so far.  robot: source whose robot they were made as, by default that of the first
    demonstrations.
    Raises ValueError where there is nothing in the attempts for the method to learn from.
    """
    sources, mixture = sources_and_shares(
        method, reading, demonstrations, attempts, training.demonstrations_share, robot
    )
    says_subtasks = reading.language.get("condition_on") == "both"
    losses = reading.stage.get("losses", {"flow": 1.0, **({"subtask": 1.0} if says_subtasks else {})})
    stage = {
        **reading.stage,
        "losses": reading.fed(losses, mixture),
        "name": STAGE,
        "steps": training.steps,
        "mixture": mixture,
        "warmup_steps": min(20, training.steps),
        "final_lr_factor": 0.05,
    }
    return {
        "model": {
            **reading.model,
            "init_from": str(policy),
            "optimizer": reading.adamw(training.lr, betas=[0.9, 0.95]),
        },
        "data": {
            "sources": sources,
            "cameras": list(reading.cameras),
            "tokenizer": reading.tokenizer,
            "fast": reading.fast,
            "language": {**reading.language, "advantage_omission": training.omission},
            "batch_size": training.batch_size,
            "length_window": 1,
            "num_workers": 1,
            "augmentation": None,
        },
        "stages": {"pretrain_steps": 0, "posttrain_steps": 0, "then": [stage]},
        "trainer": TRAINER | reading.trainer,
    }


def source_names(reading: Reading, demonstrations: Sequence[str], robot: str | None) -> tuple[list[str], str]:
    """The sources' names of some demonstrations, and the one that the policy acts as. ValueError where it is none."""
    names: list[str] = []
    for number, path in enumerate(demonstrations):
        names.append(reading.name_of(path) or unused_name(f"demonstrations_{number}", {*reading.sources, *names}))
    actor = robot or names[0]
    if actor not in names:
        raise ValueError(f"robot {actor!r}: name its dataset among the demonstrations, which are {', '.join(names)}")
    return names, actor


def sources_and_shares(
    method: Method,
    reading: Reading,
    demonstrations: Sequence[str],
    attempts: Sequence[AttemptSummary],
    demonstrations_share: float,
    robot: str | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """The data sources of a run by name, and the share of the draws of each subset."""
    is_recap = method == "recap"
    told: dict[str, Any] = {"labels": "positive"} if is_recap else {}
    names, actor = source_names(reading, demonstrations, robot)
    sources = {}
    for name, path in zip(names, demonstrations, strict=True):
        known = reading.name_of(path) is not None
        same = reading.robot_of(path) if known else (names[0] if name != names[0] else None)
        if same not in (None, *names):
            raise ValueError(f"{path} was read as of the robot of {same!r}: name that among the demonstrations too")
        chosen = reading.frames_of(path)
        sources[name] = reading.source(path, demonstrations[0], same_robot_as=same, **told, **chosen)
    shown, same = demonstrations[names.index(actor)], sources[actor]["init_args"]["same_robot_as"] or actor
    own = (
        {}
        if method == "demonstrations"
        else {n: sources_of_attempts(method, summary) for n, summary in enumerate(attempts)}
    )
    having = {number: found for number, found in own.items() if found}
    if own and not having:
        raise ValueError(
            f"{method} has nothing to learn from: {_NOTHING[method]} in {', '.join(t.path for t in attempts)}"
        )
    shares = dict.fromkeys(names, (demonstrations_share if own else 1.0) / len(names))
    for number, found in having.items():
        for kind, (share, options) in found.items():
            # every attempt that is not held out counts: what is left of a filter must not be held out too
            options |= {"same_robot_as": same, "val_fraction": 0.0}
            summary, name = attempts[number], unused_name(f"{kind}_{number}", {*sources, *reading.others})
            sources[name] = reading.source(summary.path, shown, summary.collected, attempts=True, **options)
            shares[name] = (1 - demonstrations_share) / len(having) * share
    rest = rehearsed_shares(reading, names)
    others = sorted({subset.partition("/")[0] for subset in rest} - sources.keys())
    acted = f"/{Modality.CONTINUOUS}"
    acting = sum(share for subset, share in reading.stage.get("mixture", {}).items() if subset.endswith(acted)) or 1.0
    mixture = {f"{name}{acted}": acting * share for name, share in shares.items()}
    return sources | {name: reading.others[name] for name in others}, mixture | rest


def unused_name(name: str, taken: Collection[str]) -> str:
    """The name, with a number behind it where something else has it."""
    return next(n for n in (name, *(f"{name}_{number}" for number in range(2, len(taken) + 3))) if n not in taken)


def rehearsed_shares(reading: Reading, demonstrations: Sequence[str]) -> dict[str, float]:
    """What the policy was last trained on beside the flow of actions: the shares of the subsets that are there now."""
    there = {*demonstrations, *reading.others}
    return {
        subset: share
        for subset, share in reading.stage.get("mixture", {}).items()
        if subset.partition("/")[0] in there and not subset.endswith(f"/{Modality.CONTINUOUS}")
    }


def sources_of_attempts(method: Method, summary: AttemptSummary) -> dict[str, tuple[float, dict[str, Any]]]:
    """What a method takes of a dataset of attempts, by the sources' names: share of its draws, and options.

    Frames of either sign are drawn as often as those of the other: a failure that goes on until time is up has so many
    frames that what went well would hardly be drawn. Corrections are drawn as often as both: they are few, and positive
    frames are mostly what the policy does already. They are positive too, and so among the positive frames again. Which
    episodes succeeded is said by their numbers: recordings tell that in different columns, and of corrections it is
    enough to name the frames.
    """
    corrections = {"frames": "corrections"}
    match method:
        case "recap":
            told = {"labels": str(summary.labels)}
            rest = 0.5 if summary.corrected else 1.0
            signs = {sign: (rest / len(summary.signs), told | {"frames": sign}) for sign in summary.signs}
            share = 0.5 if signs else 1.0
            return signs | ({"corrections": (share, told | corrections)} if summary.corrected else {})
        case "dagger":
            return {"corrections": (1.0, corrections)} if summary.corrected else {}
        case _:
            any_may = summary.successes is None or len(summary.successes)
            return {"successes": (1.0, {"episodes": summary.successes})} if any_may else {}


_NOTHING: dict[Method, str] = {
    "dagger": "the expert never took over",
    "successes": "no attempt succeeded without the expert",
}
