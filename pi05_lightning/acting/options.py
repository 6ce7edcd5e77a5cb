"""How a policy acts: one set of options, with one default, for robot, rollout, server, prediction and training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pi05_lightning.data.processor import Processor
from pi05_lightning.weights.abilities import Abilities, Actions, Trained

Advantage = Literal["positive", "negative", "none"]
ROLLOUT = Path("rollout", "rollout.json")
"""Within a run: what its rollout came to, and how the policy acted in it."""


@dataclass(frozen=True)
class Acting:
    """How a policy acts, whoever asks it to: on a robot, in a rollout, behind a server, over a dataset, in training."""

    robot: str | None = None
    """The name of the data source whose robot it acts as; needed where the policy was trained on several robots."""
    actions: Actions = "flow"
    """From the `flow` head, or decoded `fast` tokens."""
    execution_horizon: int | None = None
    """Actions of a chunk that are executed before the next one; by default 1, or `inference_delay` if that is more."""
    inference_delay: int = 0
    """Actions of the last chunk that are still executed while the next one is computed in the background."""
    rtc: bool = True
    """Real-time chunking: chunks go on from the actions of `inference_delay`, which are given, without a jump."""
    hierarchical: bool | None = None
    """Whether a predicted subtask conditions the actions, or the task alone; by default wherever it was trained to."""
    replan_subtask_every: int = 1
    """Chunks that a predicted subtask lasts."""
    num_steps: int = 10
    """Euler steps per chunk of the flow head."""
    advantage: Advantage | None = None
    """What the prompt says of the actions (π*0.6); by default `positive` where it was trained to be told."""
    guidance: float = 1.0
    """β: how far the flow follows the advantage; 1 needs one pass."""
    noise_scale: float = 0.0
    """Of the noise that a chunk's flow starts from: 0 starts from its mean, which draws nothing, 1 is as trained."""
    temperature: float = 0.0
    """Of subtask and FAST tokens; 0 takes the likeliest."""
    constrain_fast: bool = True
    """Only FAST tokens that always decode."""
    on_failed_decode: Literal["raise", "count"] = "raise"
    """FAST tokens that are no chunk: a FastDecodeError, or counted, with NaN as the chunk."""
    missing_cameras: tuple[str, ...] = ()
    """Cameras that an observation may lack."""
    max_state_distance: float | None = 5.0
    """Quantile ranges (q99 - q01) that a state may be outside the training data. One that is further is refused, from
    1 on it is logged; null refuses none."""
    max_action_distance: float | None = None
    """The same for predicted actions: a chunk with one that is further is an error, not clipped; null bounds none."""
    max_prompt_bytes: int | None = 1024
    """Bytes (UTF-8) of an instruction; a longer one is refused, as it costs time. null bounds none."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """From options by name. ValueError for one that there is not."""
        known = [option.name for option in fields(cls)]
        if unknown := sorted(options.keys() - set(known)):
            raise ValueError(f"acting: there is no option {unknown[0]!r}: they are {', '.join(known)}")
        return cls(**options)

    def __post_init__(self) -> None:
        wholes = {"inference_delay": 0, "replan_subtask_every": 1, "num_steps": 1, "max_prompt_bytes": 1}
        bounds = {"max_state_distance": 0, "max_action_distance": 0, "max_prompt_bytes": 1}
        for name, least in (wholes | bounds | {"noise_scale": 0, "temperature": 0, "guidance": 0}).items():
            value = getattr(self, name)
            kind: Any = Integral if name in wholes else Real
            if value is None and name in bounds:
                continue
            if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < math.inf:
                whole = "whole " if name in wholes else ""
                raise ValueError(f"{name} is {value!r}: it must be a {whole}number, and at least {least}")
        if isinstance(self.missing_cameras, str):
            raise ValueError(f"missing_cameras is {self.missing_cameras!r}: give a list of names")
        object.__setattr__(self, "missing_cameras", tuple(self.missing_cameras))
        if self.actions not in get_args(Actions):
            raise ValueError(f"actions is {self.actions!r}: expected {' or '.join(get_args(Actions))}")
        if self.advantage not in (None, *get_args(Advantage)):
            raise ValueError(f"advantage is {self.advantage!r}: expected {', '.join(get_args(Advantage))}")
        if self.guidance != 1 and (self.actions == "fast" or self.advantage == "none"):
            raise ValueError(
                f"guidance is {self.guidance}: it leads the flow head towards an advantage, so it needs `actions: flow`"
                " and an advantage; leave it out"
            )
        if self.given and self.actions == "fast":
            raise ValueError(
                "inference_delay with rtc needs the flow head: FAST tokens cannot be made to go on from actions; set"
                " rtc to false"
            )

    @property
    def given(self) -> int:
        """Actions that the next chunk is told, and goes on from."""
        return self.inference_delay if self.rtc else 0

    def executed(self, horizon: int) -> int:
        """Actions that are executed of a chunk of `horizon`.

        Raises ValueError when a chunk does not hold as many, or less than are executed while the next is computed.
        """
        delay, most = self.inference_delay, horizon - self.inference_delay
        if delay > most:
            raise ValueError(
                f"inference_delay is {delay}, and a chunk has {horizon} actions: at most {horizon // 2}, as it has to"
                " last until the next one has come"
            )
        least = max(1, delay)
        if self.execution_horizon is None:
            return least
        if not isinstance(self.execution_horizon, Integral) or not least <= self.execution_horizon <= most:
            raise ValueError(
                f"execution_horizon: {self.execution_horizon} (pred_horizon in Python) is no whole number within"
                f" {least} and {most}: a chunk's {horizon} actions less {delay} of inference_delay, which it has"
                " to last for"
            )
        return self.execution_horizon


def check(acting: Acting, processor: Processor, trained: Trained) -> Abilities:
    """What the policy can do. ValueError, which says that, where it cannot act so, or one of its robots must be named.

    It needs no weights, so that what is wrong shows before they are read.
    """
    robot, abilities = processor.acting_as(acting.robot), Abilities.of(processor, trained)
    if acting.actions == "fast" and processor.fast is None:
        raise ValueError("`actions: fast`: the policy has no FAST tokenizer; leave it out, or train with data.fast")
    abilities.check_actions(acting.actions)
    abilities.check_delay(acting.given, "inference_delay")
    if not abilities.advantage and (acting.advantage in ("positive", "negative") or acting.guidance != 1):
        raise ValueError(
            "advantage, guidance: the policy was not trained on actions with their advantage (a stage that draws from"
            " sources with `labels`): leave them out"
        )
    if acting.guidance != 1 and not processor.language.advantage_omission:
        raise ValueError(
            "guidance: the policy never acted without an advantage (data.language.advantage_omission was 0), so"
            " there is nothing to be led away from: leave it out"
        )
    if acting.hierarchical and not (processor.predicts_subtasks(robot) and trained.able("subtask")):
        raise ValueError(f"hierarchical: the policy was not trained to say subtasks as {robot}; leave it out")
    return abilities


def says_subtasks(acting: Acting, processor: Processor, trained: Trained) -> bool:
    """Whether a predicted subtask conditions the actions: wherever it was trained to, unless it is not to."""
    able = processor.predicts_subtasks(processor.acting_as(acting.robot)) and trained.able("subtask")
    return able and acting.hierarchical is not False
