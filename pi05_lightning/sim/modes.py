"""The modes of a rollout: ways in which a policy acts, and what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:  # processes that run baselines alone need no model
    from pi05_lightning.acting import Acting

PolicyMode = Literal["policy", "flat", "fast", "rtc", "async"]
Mode = PolicyMode | Literal["mean_replay", "random", "expert"]
POLICY_MODES: tuple[PolicyMode, ...] = get_args(PolicyMode)
DELAYED: tuple[PolicyMode, ...] = ("rtc", "async")
MODES: tuple[Mode, ...] = (*POLICY_MODES, "mean_replay", "random", "expert")


def acting_in(mode: Mode, acting: Acting, delays: Sequence[int] = ()) -> Acting:
    """How a policy acts in a mode of its rollout.

    acting: how it does in the mode `policy`.  delays: actions that are executed while a chunk is computed, of which one
    is drawn for each; by default always `inference_delay`. RTC is given `inference_delay` of them, by default the most
    that may be drawn: an earlier chunk then changes nothing, as it begins with what is executed anyhow.

    Raises ValueError for a mode that needs a delay, where there is none.
    """
    if mode == "flat":
        return replace(acting, hierarchical=False)
    if mode == "fast":
        return replace(acting, actions="fast", guidance=1.0, rtc=acting.rtc and not acting.inference_delay)
    if mode not in DELAYED:
        return acting
    most = max(delays, default=acting.inference_delay)
    if most < 1:
        raise ValueError(f"mode {mode}: there is no delay; give one in control steps, as --delays [2]")
    how = replace(acting, execution_horizon=max(acting.execution_horizon or 1, most))  # not sooner than answers come
    if mode == "async":
        return replace(how, rtc=False, inference_delay=most)
    return replace(how, rtc=True, actions="flow", inference_delay=acting.inference_delay or most)
