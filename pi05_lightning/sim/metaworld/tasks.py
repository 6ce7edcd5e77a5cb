"""What the MetaWorld tasks are called, what stands on their tables, and what their experts are doing at the moment.

MetaWorld has neither instructions nor phases. The phases below are the branches of its scripted experts
(`metaworld/policies/sawyer_*_v3_policy.py`): the same geometric conditions, put into words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from pi05_lightning.sim.rendering import ModelPart, bodies

Parsed = Mapping[str, np.ndarray]
"""An expert's own reading of the observation, by its names: hand_pos, goal_pos, drwr_pos, …"""


@dataclass(frozen=True)
class TaskLanguage:
    """The words for one task.

    sentence  the instruction
    objects   {name: part}, the first one is what the hand goes for
    phase     the expert's reading of the observation -> the subtask of the moment; None: the sentence is the subtask
    """

    sentence: str
    objects: Mapping[str, ModelPart] = field(default_factory=dict)
    phase: Callable[[Parsed], str] | None = None


_GOAL = ModelPart(sites=("goal",))
_PUCK = ModelPart(geoms=("objGeom",))
_WINDOW = {
    "window handle": ModelPart(bodies=("windowb_a",), material="window_white"),
    "window": bodies("windowb_a", "windowb_b"),
}
_BUTTON = {"button": bodies("button"), "button box": bodies("buttonbox")}


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """Horizontal distance in metres."""
    return float(np.linalg.norm(a[:2] - b[:2]))


# of an expert: aside of the thing, and at its height
_ONTO = ("move above", "lower the gripper onto")
_BESIDE = ("move above", "lower the gripper beside")
_BEHIND = ("move above", "lower the gripper behind")
_BELOW = ("move below", "raise the gripper to")


def _approach(
    target: str, offset: tuple[float, float, float], xy: float, z: float, way: tuple[str, str], thing: str, act: str
) -> Callable[[Parsed], str]:
    """Most experts: go beside `target` + offset (within xy), then to its height (within z), then act."""

    def phase(parsed: Parsed) -> str:
        hand, goal = parsed["hand_pos"], parsed[target] + np.array(offset)
        if _apart(hand, goal) > xy:
            return f"{way[0]} the {thing}"
        return f"{way[1]} the {thing}" if abs(hand[2] - goal[2]) > z else act

    return phase


def _reach(parsed: Parsed) -> str:
    near = np.linalg.norm(parsed["hand_pos"] - parsed["goal_pos"]) < 0.05  # 0.05: the task's own success radius
    return "stay at the red ball" if near else "move to the red ball"


def _press_topdown(parsed: Parsed) -> str:
    aside = _apart(parsed["hand_pos"], parsed["button_pos"]) > 0.04
    return "move above the button" if aside else "press the button down"


def _press(parsed: Parsed) -> str:
    off = parsed["hand_pos"] - (parsed["button_pos"] + np.array([0.0, 0.0, -0.07]))
    aligned = abs(off[0]) <= 0.02 and abs(off[2]) <= 0.02
    return "push the button in" if aligned else "move in front of the button"


LANGUAGE: dict[str, TaskLanguage] = {
    "reach-v3": TaskLanguage("reach the red ball", {"red ball": _GOAL, "red puck": _PUCK}, _reach),
    "push-v3": TaskLanguage(
        "push the puck to the green ball",
        {"red puck": _PUCK, "green ball": _GOAL},
        _approach("puck_pos", (-0.005, 0.0, 0.0), 0.02, 0.04, _ONTO, "puck", "push the puck to the green ball"),
    ),
    "pick-place-v3": TaskLanguage(
        "pick up the puck and bring it to the blue ball",
        {"red puck": _PUCK, "blue ball": _GOAL},
        _approach("puck_pos", (-0.005, 0.0, 0.0), 0.02, 0.05, _ONTO, "puck", "carry the puck to the blue ball"),
    ),
    "window-open-v3": TaskLanguage(
        "open the window",
        _WINDOW,
        _approach("wndw_pos", (-0.03, -0.03, -0.08), 0.04, 0.02, _BESIDE, "window handle", "slide the window open"),
    ),
    "window-close-v3": TaskLanguage(
        "close the window",
        _WINDOW,
        _approach("wndw_pos", (0.03, -0.03, -0.08), 0.04, 0.02, _BESIDE, "window handle", "slide the window shut"),
    ),
    "drawer-open-v3": TaskLanguage(
        "open the drawer",
        {"drawer handle": _PUCK, "drawer": bodies("drawer_link", "drawercase_link")},
        _approach("drwr_pos", (0.0, 0.0, -0.02), 0.06, 0.04, _BEHIND, "drawer handle", "pull the drawer open"),
    ),
    "button-press-topdown-v3": TaskLanguage("press the button from above", _BUTTON, _press_topdown),
    "button-press-v3": TaskLanguage("press the button", _BUTTON, _press),
    "dial-turn-v3": TaskLanguage(
        "turn the dial",
        {"dial": ModelPart(material="dial_metal")},
        _approach("dial_pos", (0.05, 0.02, 0.09), 0.02, 0.02, _BESIDE, "dial", "turn the dial"),
    ),
    "faucet-close-v3": TaskLanguage(
        "close the faucet",
        {"faucet handle": bodies("faucet_link2"), "faucet": bodies("faucet_link", "faucet_link2")},
        _approach("faucet_pos", (0.04, 0.0, 0.03), 0.04, 0.04, _BESIDE, "faucet handle", "push the faucet handle shut"),
    ),
    "coffee-push-v3": TaskLanguage(
        "push the mug under the coffee machine",
        {"mug": bodies("mug"), "coffee machine": bodies("cm_link")},
        _approach("mug_pos", (0.01, 0.0, 0.05), 0.06, 0.02, _ONTO, "mug", "push the mug under the coffee machine"),
    ),
    "lever-pull-v3": TaskLanguage(
        "pull the lever up",
        {"lever": bodies("lever_link1")},
        _approach("lever_pos", (0.0, -0.055, 0.0), 0.02, 0.02, _BELOW, "lever", "pull the lever up"),
    ),
    "sweep-into-v3": TaskLanguage(
        "sweep the cube into the hole",
        {"cube": _PUCK},
        _approach("cube_pos", (-0.005, 0.0, 0.01), 0.04, 0.04, _ONTO, "cube", "sweep the cube into the hole"),
    ),
}


def task_language(task: str) -> TaskLanguage:
    """The words for a task; tasks without an entry get their name as a sentence (`door-open-v3` -> "door open")."""
    return LANGUAGE.get(task) or TaskLanguage(task.removesuffix("-v3").replace("-", " "))


def task_of_sentence(sentence: str) -> str:
    """The task that `task_language` describes with this sentence, as a dataset gives it back."""
    named = {language.sentence: task for task, language in LANGUAGE.items()}
    return named.get(sentence) or f"{sentence.replace(' ', '-')}-v3"
