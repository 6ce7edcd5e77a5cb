"""The modes of a rollout: ways in which a policy acts, and what it is compared with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:  # processes that run baselines alone need no model
    from pi05_lightning.acting import Acting

PolicyMode = Literal["policy", "flat"]
Mode = PolicyMode | Literal["mean_replay", "random", "expert"]
POLICY_MODES: tuple[PolicyMode, ...] = get_args(PolicyMode)
MODES: tuple[Mode, ...] = (*POLICY_MODES, "mean_replay", "random", "expert")


def acting_in(mode: Mode, acting: Acting) -> Acting:
    """How a policy acts in a mode of its rollout. acting: how it does in the mode `policy`."""
    return replace(acting, hierarchical=False) if mode == "flat" else acting
