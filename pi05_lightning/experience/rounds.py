"""What each round of learning trains on, as a run's configuration: by which method, from which attempts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pi05_lightning.data.labels import Sign
from pi05_lightning.experience.reading import TRAINER, Reading

Method = Literal["recap", "successes", "dagger", "demonstrations"]
METHODS: tuple[Method, ...] = get_args(Method)
"""Signs of advantages in the prompt (π*0.6); the policy's successes alone (filtered behaviour cloning); the expert's
corrections alone (DAgger); more steps on the demonstrations."""
STAGE = "experience"


@dataclass(frozen=True)
class Training:
    """How a round's policy is trained: optimizer steps, frames of a step, learning rate.

    demonstrations_share: of the draws; the attempts of all rounds share the rest.  omission: share of the samples that
    leave out the advantage.
    """

    steps: int
    batch_size: int
    lr: float
    demonstrations_share: float
    omission: float


def configuration(
    method: Method,
    policy: Path,
    reading: Reading,
    demonstrations: Sequence[str],
    attempts: Sequence[str],
    labels: Sequence[Path],
    training: Training,
) -> dict[str, Any]:
    """A run of `pi05 fit` of one stage, from the weights of `policy`, on all data so far.

    attempts: datasets, one of each round.  labels: of the method recap, of each.
    """
    sources, shares = drawn(method, reading, demonstrations, attempts, labels, training.demonstrations_share)
    says_subtasks = reading.language.get("condition_on") == "both"
    stage = {
        "name": STAGE,
        "steps": training.steps,
        "losses": {"flow": 1.0, **({"subtask": 1.0} if says_subtasks else {})},
        "mixture": {f"{name}/continuous_robot_actions": share for name, share in shares.items()},
        "warmup_steps": min(20, training.steps),
        "final_lr_factor": 0.05,
    }
    return {
        "model": {
            "init_from": str(policy),
            "flow_draws": reading.flow_draws,
            "optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": training.lr, "betas": [0.9, 0.95], "weight_decay": 0.01},
            },
        },
        "data": {
            "sources": sources,
            "tokenizer": reading.tokenizer,
            # there is no FAST tokenizer: attempts train the flow alone
            "language": {**reading.language, "fast_share": 0.0, "advantage_omission": training.omission},
            "batch_size": training.batch_size,
            "length_window": 1,
            "num_workers": 1,
            "augmentation": None,
        },
        "stages": {"pretrain_steps": 0, "posttrain_steps": 0, "then": [stage]},
        "trainer": TRAINER,
    }


def drawn(
    method: Method,
    reading: Reading,
    demonstrations: Sequence[str],
    attempts: Sequence[str],
    labels: Sequence[Path],
    demonstrations_share: float,
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """The data sources of a run by name, all of one robot, and the share of the draws that each has."""
    is_recap = method == "recap"
    told = {"labels": "positive"} if is_recap else {}
    sources = {f"demonstrations_{n}": reading.source(path, **told) for n, path in enumerate(demonstrations)}
    first = next(iter(sources))
    for name in [*sources][1:]:
        sources[name]["init_args"]["same_robot_as"] = first
    own = [] if method == "demonstrations" else list(attempts)
    shares = {name: (demonstrations_share if own else 1.0) / len(sources) for name in sources}
    for number, path in enumerate(own):
        found = taken(method, labels[number] if is_recap else None)
        for kind, options in found.items():
            # every attempt that is not held out counts: what is left of a filter must not be held out too
            sources[f"{kind}_{number}"] = reading.source(path, same_robot_as=first, val_fraction=0.0, **options)
            shares[f"{kind}_{number}"] = (1 - demonstrations_share) / len(own) / len(found)
    return sources, shares


def taken(method: Method, labels: Path | None) -> dict[str, dict[str, Any]]:
    """What a method takes of a dataset of attempts: options of the sources, by their names.

    Frames of either sign are drawn as often as those of the other: a failure that goes on until time is up has so many
    frames that what went well would hardly be drawn.
    """
    match method:
        case "recap":
            return {sign: {"labels": str(labels), "frames": sign, "learn_subtasks": False} for sign in get_args(Sign)}
        case "dagger":
            return {"corrections": {"frames": "corrections", "episodes": "corrected"}}
        case _:
            return {"successes": {"episodes": "success", "learn_subtasks": False}}
