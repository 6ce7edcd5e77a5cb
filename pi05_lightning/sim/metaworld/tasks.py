"""What the MetaWorld tasks are called, what stands on their tables, and what their experts are doing at the moment.

MetaWorld has neither instructions nor phases: see `phases`. Goals that it draws, as balls, are among the objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pi05_lightning.sim.metaworld.phases import (
    BEHIND,
    BELOW,
    IN_FRONT,
    LEFT_OF,
    LEVEL,
    ONTO,
    RIGHT_OF,
    Phase,
    above,
    approach,
    assemble,
    carry_over_wall,
    dunk,
    goal_height,
    hammer,
    in_line,
    insert_hand,
    insert_peg,
    kick,
    lift,
    lock_door,
    pick_from_bin,
    press_over_wall,
    pull_plate,
    push_around_wall,
    reach,
    reach_over_wall,
    shelve,
    shut_door,
    shut_drawer,
    sweep,
    unlock_door,
    unplug,
    use_stick,
)
from pi05_lightning.sim.rendering import ModelPart, bodies


@dataclass(frozen=True)
class TaskLanguage:
    """The words for one task.

    sentence  the instruction
    objects   {name: part}, the first one is what the hand goes for
    phase     the expert's reading of the observation -> the subtask of the moment
    """

    sentence: str
    objects: Mapping[str, ModelPart]
    phase: Phase


def _of(material: str) -> ModelPart:
    return ModelPart(material=material)


_GOAL = ModelPart(sites=("goal",))
_OBJECT = ModelPart(geoms=("objGeom",))
_PUCK = {"red puck": _OBJECT}
_RED, _GREEN, _BLUE = {"red ball": _GOAL}, {"green ball": _GOAL}, {"blue ball": _GOAL}
_CUBE = {"cube": _OBJECT}
_WALL = {"wall": _of("wall_brick")}
_BUTTON = {"button": bodies("button"), "button box": bodies("buttonbox")}
_COFFEE = {"coffee machine": bodies("cm_link")}
_MUG = {"mug": bodies("mug"), **_COFFEE}
_DOOR = {"door handle": ModelPart(geoms=("handle",)), "door": bodies("door_link"), **_GREEN}
_LOCK = {"lock": bodies("lock_link"), "door": bodies("door_link")}
_DRAWER = {"drawer handle": _OBJECT, "drawer": bodies("drawer_link", "drawercase_link")}
_FAUCET = {"faucet handle": bodies("faucet_link2"), "faucet": bodies("faucet_link", "faucet_link2")}
_HANDLE = {"handle": bodies("handle_link"), "handle box": bodies("hdlprs")}
_NUT = {"nut": bodies("asmbly_peg"), "nut handle": ModelPart(geoms=("WrenchHandle",)), "peg": bodies("peg")}
_PLATE = {"plate": _of("puck_black"), "cabinet": _of("puck_white")}
_STICK = {"stick": _of("stick_blue"), "thermos": _of("therm_metal_green"), **_GREEN}
_WINDOW = {
    "window handle": ModelPart(bodies=("windowb_a",), material="window_white"),
    "window": bodies("windowb_a", "windowb_b"),
}


LANGUAGE: dict[str, TaskLanguage] = {
    "assembly-v3": TaskLanguage("assembly", _NUT, assemble),
    "basketball-v3": TaskLanguage(
        "basketball",
        {"basketball": bodies("basketball"), "basket": bodies("hooplink"), "backboard": bodies("backboardlink")},
        approach("ball_pos", (0.0, 0.0, 0.01), 0.04, 0.025, ONTO, "basketball", dunk),
    ),
    "bin-picking-v3": TaskLanguage(
        "bin picking",
        {"cube": bodies("objA"), "red bin": bodies("binA"), "blue bin": bodies("binB")},
        pick_from_bin,
    ),
    "box-close-v3": TaskLanguage(
        "box close",
        {"lid handle": ModelPart(geoms=("BoxHandleGeom",)), "lid": bodies("top_link"), "box": bodies("box")},
        approach(
            "lid_pos",
            (0.0, 0.0, 0.02),
            0.01,
            0.05,
            ONTO,
            "lid",
            lift(lambda parsed: 0.15, 0.04, "lift the lid", "put the lid onto the box"),
        ),
    ),
    "button-press-topdown-v3": TaskLanguage(
        "press the button from above",
        _BUTTON,
        above("button_pos", (0.0, 0.0, 0.0), 0.04, "button", "press the button down"),
    ),
    "button-press-topdown-wall-v3": TaskLanguage(
        "button press topdown wall",
        {**_BUTTON, **_WALL},
        above("button_pos", (0.0, -0.06, 0.0), 0.04, "button", "press the button down"),
    ),
    "button-press-v3": TaskLanguage(
        "press the button", _BUTTON, in_line("button_pos", (0.0, 0.0, -0.07), 0.02, "push the button in")
    ),
    "button-press-wall-v3": TaskLanguage("button press wall", {**_BUTTON, **_WALL}, press_over_wall),
    "coffee-button-v3": TaskLanguage(
        "coffee button",
        {"button": bodies("cmbutton"), **_COFFEE},
        in_line("button_pos", (0.0, 0.0, -0.07), 0.02, "push the button in"),
    ),
    "coffee-pull-v3": TaskLanguage(
        "coffee pull",
        {**_MUG, "green ball": ModelPart(sites=("mug_goal",))},
        approach("mug_pos", (-0.005, 0.0, 0.05), 0.06, 0.02, ONTO, "mug", "pull the mug to the green ball"),
    ),
    "coffee-push-v3": TaskLanguage(
        "push the mug under the coffee machine",
        _MUG,
        approach("mug_pos", (0.01, 0.0, 0.05), 0.06, 0.02, ONTO, "mug", "push the mug under the coffee machine"),
    ),
    "dial-turn-v3": TaskLanguage(
        "turn the dial",
        {"dial": _of("dial_metal")},
        approach("dial_pos", (0.05, 0.02, 0.09), 0.02, 0.02, RIGHT_OF, "dial", "turn the dial"),
    ),
    "disassemble-v3": TaskLanguage(
        "disassemble",
        _NUT,
        approach("wrench_pos", (-0.02, 0.0, 0.01), 0.02, 0.03, ONTO, "nut", "lift the nut off the peg"),
    ),
    "door-close-v3": TaskLanguage("door close", _DOOR, shut_door),
    "door-lock-v3": TaskLanguage("door lock", _LOCK, lock_door),
    "door-open-v3": TaskLanguage(
        "door open",
        _DOOR,
        approach("door_pos", (-0.05, 0.0, 0.0), 0.12, 0.04, RIGHT_OF, "door handle", "pull the door open"),
    ),
    "door-unlock-v3": TaskLanguage("door unlock", _LOCK, unlock_door),
    "drawer-close-v3": TaskLanguage("drawer close", _DRAWER, shut_drawer),
    "drawer-open-v3": TaskLanguage(
        "open the drawer",
        _DRAWER,
        approach("drwr_pos", (0.0, 0.0, -0.02), 0.06, 0.04, BEHIND, "drawer handle", "pull the drawer open"),
    ),
    "faucet-close-v3": TaskLanguage(
        "close the faucet",
        _FAUCET,
        approach("faucet_pos", (0.04, 0.0, 0.03), 0.04, 0.04, RIGHT_OF, "faucet handle", "push the faucet handle shut"),
    ),
    "faucet-open-v3": TaskLanguage(
        "faucet open",
        _FAUCET,
        approach("faucet_pos", (-0.04, 0.0, 0.03), 0.04, 0.04, LEFT_OF, "faucet handle", "push the faucet handle open"),
    ),
    "hammer-v3": TaskLanguage(
        "hammer",
        {"hammer": bodies("hammer"), "nail": bodies("nail_link"), "block": bodies("hammerblock")},
        approach("hammer_pos", (-0.04, 0.0, -0.01), 0.04, 0.05, ONTO, "hammer", hammer, 0.03),
    ),
    "hand-insert-v3": TaskLanguage(
        "hand insert",
        _CUBE | _BLUE,
        approach("obj_pos", (0.0, 0.0, 0.0), 0.02, 0.05, ONTO, "cube", insert_hand),
    ),
    "handle-press-side-v3": TaskLanguage(
        "handle press side", _HANDLE, above("handle_pos", (0.0, 0.0, 0.0), 0.02, "handle", "press the handle down")
    ),
    "handle-press-v3": TaskLanguage(
        "handle press", _HANDLE, above("handle_pos", (0.0, -0.02, 0.0), 0.02, "handle", "press the handle down")
    ),
    "handle-pull-side-v3": TaskLanguage(
        "handle pull side",
        _HANDLE,
        approach("handle_pos", (0.0, 0.0, 0.0), 0.04, 0.03, ONTO, "handle", "pull the handle up"),
    ),
    "handle-pull-v3": TaskLanguage(
        "handle pull",
        _HANDLE,
        approach("handle_pos", (0.0, -0.04, 0.0), 0.02, 0.02, LEVEL, "handle", "pull the handle up"),
    ),
    "lever-pull-v3": TaskLanguage(
        "pull the lever up",
        {"lever": bodies("lever_link1"), **_RED},
        approach("lever_pos", (0.0, -0.055, 0.0), 0.02, 0.02, BELOW, "lever", "pull the lever up"),
    ),
    "peg-insert-side-v3": TaskLanguage(
        "peg insert side",
        {"peg": ModelPart(geoms=("peg",)), "board with the hole": _of("peg_block_red")},
        approach("peg_pos", (0.0, 0.0, 0.0), 0.04, 0.025, ONTO, "peg", insert_peg),
    ),
    "peg-unplug-side-v3": TaskLanguage(
        "peg unplug side", {"plug": bodies("plug"), "socket": bodies("plug_wall")}, unplug
    ),
    "pick-out-of-hole-v3": TaskLanguage(
        "pick out of hole",
        _PUCK | _BLUE,
        approach(
            "puck_pos",
            (0.0, 0.0, 0.02),
            0.02,
            0.01,
            ONTO,
            "puck",
            lift(goal_height, 0.04, "lift the puck out of the hole", "carry the puck to the blue ball"),
        ),
    ),
    "pick-place-v3": TaskLanguage(
        "pick up the puck and bring it to the blue ball",
        _PUCK | _BLUE,
        approach("puck_pos", (-0.005, 0.0, 0.0), 0.02, 0.05, ONTO, "puck", "carry the puck to the blue ball", 0.04),
    ),
    "pick-place-wall-v3": TaskLanguage(
        "pick place wall",
        _PUCK | _WALL | _BLUE,
        approach("puck_pos", (-0.005, 0.0, 0.0), 0.015, 0.04, ONTO, "puck", carry_over_wall, 0.03),
    ),
    "plate-slide-back-side-v3": TaskLanguage(
        "plate slide back side",
        _PLATE | _RED,
        approach("puck_pos", (0.023, 0.0, 0.025), 0.01, 0.04, ONTO, "plate", "pull the plate out to the right"),
    ),
    "plate-slide-back-v3": TaskLanguage(
        "plate slide back",
        _PLATE | _RED,
        approach("puck_pos", (0.0, -0.065, 0.025), 0.01, 0.04, ONTO, "plate", pull_plate),
    ),
    "plate-slide-side-v3": TaskLanguage(
        "plate slide side",
        _PLATE,
        approach(
            "puck_pos",
            (0.07, 0.0, -0.005),
            0.04,
            0.04,
            RIGHT_OF,
            "plate",
            "slide the plate to the left into the cabinet",
        ),
    ),
    "plate-slide-v3": TaskLanguage(
        "plate slide",
        _PLATE,
        approach("puck_pos", (0.0, -0.055, 0.03), 0.03, 0.04, IN_FRONT, "plate", "push the plate into the cabinet"),
    ),
    "push-back-v3": TaskLanguage(
        "push back",
        _CUBE | _GREEN,
        approach("puck_pos", (0.0, 0.0, 0.0), 0.04, 0.055, ONTO, "cube", "pull the cube back to the green ball"),
    ),
    "push-v3": TaskLanguage(
        "push the puck to the green ball",
        _PUCK | _GREEN,
        approach("puck_pos", (-0.005, 0.0, 0.0), 0.02, 0.04, ONTO, "puck", "push the puck to the green ball"),
    ),
    "push-wall-v3": TaskLanguage(
        "push wall",
        _PUCK | _WALL | _GREEN,
        approach("obj_pos", (-0.005, 0.0, 0.0), 0.02, 0.04, ONTO, "puck", push_around_wall),
    ),
    "reach-v3": TaskLanguage("reach the red ball", _RED | _PUCK, reach),
    "reach-wall-v3": TaskLanguage("reach wall", _RED | _WALL | _PUCK, reach_over_wall),
    "shelf-place-v3": TaskLanguage(
        "shelf place",
        {"block": _OBJECT, "shelf": _of("shelf_wood"), **_GREEN},
        approach("block_pos", (-0.005, 0.0, 0.015), 0.04, 0.04, ONTO, "block", shelve),
    ),
    "soccer-v3": TaskLanguage(
        "soccer", {"soccer ball": bodies("soccer_ball1"), "soccer goal": bodies("soccer_goal"), **_GREEN}, kick
    ),
    "stick-pull-v3": TaskLanguage(
        "stick pull",
        _STICK,
        use_stick(-0.015, (-0.015, 0.0, 0.03), "pull the thermos to the green ball with the stick"),
    ),
    "stick-push-v3": TaskLanguage(
        "stick push",
        _STICK,
        use_stick(0.015, (0.0, 0.0, 0.0), "push the thermos to the green ball with the stick"),
    ),
    "sweep-into-v3": TaskLanguage(
        "sweep the cube into the hole",
        _CUBE | _BLUE,
        approach("cube_pos", (-0.005, 0.0, 0.01), 0.04, 0.04, ONTO, "cube", "sweep the cube into the hole"),
    ),
    "sweep-v3": TaskLanguage("sweep", {"cube": _of("block_wood")}, sweep),
    "window-close-v3": TaskLanguage(
        "close the window",
        _WINDOW,
        approach("wndw_pos", (0.03, -0.03, -0.08), 0.04, 0.02, RIGHT_OF, "window handle", "slide the window shut"),
    ),
    "window-open-v3": TaskLanguage(
        "open the window",
        _WINDOW,
        approach("wndw_pos", (-0.03, -0.03, -0.08), 0.04, 0.02, LEFT_OF, "window handle", "slide the window open"),
    ),
}


def task_of_sentence(sentence: str) -> str:
    """The task of an instruction, as a dataset gives it back."""
    named = {language.sentence: task for task, language in LANGUAGE.items()}
    return named.get(sentence) or f"{sentence.replace(' ', '-')}-v3"
