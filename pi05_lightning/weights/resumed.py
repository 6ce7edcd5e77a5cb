"""What of a checkpoint holds under the options of today, which may be others than those that it was written with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from pi05_lightning.data.differences import differences
from pi05_lightning.data.processor import Processor
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.parallelize import Lora
from pi05_lightning.models.quantized import Kind

REMEDY = "Leave it as it was, or begin a new run from these weights: model.init_from instead of ckpt_path"
SHOWN = 8  # differences that are listed
_APPLIED = {"dropout", "train"}
"""Options of LoRA that change neither a tensor nor its meaning, and so may be others when a run is resumed."""


def check_model(
    saved: Mapping[str, Any],
    config: ModelConfig,
    lora: Lora | None,
    base: Kind | None,
    tensors: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises ValueError, with the keys and both values, where a checkpoint's weights are another model's.

    saved: its `pi05` entry.  tensors, expected: name → shape, of its weights and of those of today's model.
    """
    problems = differing("model.config", ModelConfig.from_dict(saved["model"]).to_dict(), config.to_dict())
    then, now = saved.get("lora"), None if lora is None else asdict(lora)
    if then is None or now is None:
        problems += [] if then == now else [f"model.lora is {now}, and {then} in the checkpoint"]
    else:
        kept = [{key: value for key, value in options.items() if key not in _APPLIED} for options in (then, now)]
        problems += differing("model.lora", *kept)
    if base != saved.get("base"):
        problems.append(f"model.base is {base}, and {saved.get('base')} in the checkpoint")
    if not problems and dict(tensors) != dict(expected):
        names = sorted(name for name in tensors.keys() | expected.keys() if tensors.get(name) != expected.get(name))
        key = (
            "model.heads"
            if all("auxiliary." in name for name in names)
            else "model.lora"
            if any(".lora_" in name for name in names)
            else "the model"
        )
        problems = [
            f"{key} differs: {name} is {_shape(expected.get(name))}, and {_shape(tensors.get(name))} in the checkpoint"
            for name in names
        ]
    if problems:
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ValueError("\n  ".join(["the checkpoint is another model's:", *problems[:SHOWN], *more, REMEDY]))


def _shape(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def differing(key: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Where today's options under a key are others than a checkpoint's, with both values; what it lacks is no other."""
    before = flat(then, key)
    found = {name: (value, before.get(name, value)) for name, value in flat(now, key).items()}
    return [f"{name} is {new!r}, and {old!r} in the checkpoint" for name, (new, old) in found.items() if new != old]


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = f"{above}.{name}".removeprefix(".")
        found |= flat(value, inner) if isinstance(value, Mapping) and value else {inner: value}
    return found


def changed_options(then: str, now: str) -> list[str]:
    """Where two configurations, as YAML, differ, with both values; not where one alone has a key, of nothing."""
    sides = [flat(yaml.safe_load(text)) for text in (then, now)]
    found = []
    for key in {**sides[1], **sides[0]}:
        values = [side[key] for side in sides if key in side]
        if values[0] != values[-1] or (len(values) == 1 and values[0] not in (None, {})):
            found.append(f"{key}: {' → '.join(repr(side[key]) if key in side else 'absent' for side in sides)}")
    return found


def has_options(then: str | None, now: str | None, *groups: str) -> bool:
    """Whether two configurations, as YAML, agree in groups of options; what one does not say is no disagreement."""
    before, today = (flat(yaml.safe_load(text)) if text else {} for text in (then, now))
    return all(
        before.get(key, value) == value
        for key, value in today.items()
        if key.startswith(tuple(f"{group}." for group in groups)) or key in groups
    )


def check_resumable(checkpoint: Mapping[str, Any]) -> None:
    """Raises ValueError for a checkpoint with which no run can go on, as it has no optimizer's state."""
    if "optimizer_states" not in checkpoint:
        raise ValueError(
            "the checkpoint holds weights alone (checkpoint.save_weights_only), with which no run can be resumed:"
            " begin a new one from them, with model.init_from instead of ckpt_path"
        )


def check_data(then: Mapping[str, Any], now: Processor) -> list[str]:
    """What is to be said of data that are not quite as they were. ValueError where they are others.

    then: the processor of the checkpoint, as a dictionary.  now: that of the data as they are.
    """
    found = differences(then, now)
    if serious := [f"{difference}" for difference in found if not difference.harmless]:
        raise ValueError(
            "\n  ".join(["the data are not those that the checkpoint was trained on:", *serious])
            + "\n  Restore the data and their options, or begin a new run from these weights, with model.init_from"
            " instead of ckpt_path"
        )
    return [f"{difference}" for difference in found]


def check_origin(init_from: str | None, saved: Mapping[str, Any]) -> str | None:
    """What is to be said of weights to begin with that are not those that the run began with."""
    if init_from is None or str(init_from) == saved.get("init_from", str(init_from)):
        return None
    return f"model.init_from {str(init_from)!r} is not used: the weights are the checkpoint's"


def check_steps(done: int, max_steps: int, total: int) -> str | None:
    """What is to be said of the steps that a run has left. ValueError where it shall have fewer than it has.

    done: 0 in a new run.  max_steps: the trainer's, which are `total`, the stages' together, where the user names none.
    """
    longer = "raise the stages' steps, and trainer.max_steps if it is set"
    if 0 <= max_steps < done:
        raise ValueError(
            f"the checkpoint was saved after {done} steps, and the run shall have {max_steps}: {longer}, or give an"
            " earlier checkpoint as ckpt_path"
        )
    if max_steps == done > 0:
        return f"the run is complete after {done} steps, and nothing is trained. To train on, {longer}"
    if 0 <= max_steps < total:
        return f"trainer.max_steps ends the run after {max_steps} of its stages' {total} steps"
    return None
