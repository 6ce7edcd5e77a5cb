"""Whether a source can be of the robot that it names as `same_robot_as`."""

from __future__ import annotations

import logging
from typing import Literal

from pi05_lightning.data.robot import Robot
from pi05_lightning.data.sources.base import Source
from pi05_lightning.data.sources.lerobot import LeRobotSource
from pi05_lightning.data.units import unit_problems

log = logging.getLogger(__name__)


def check_same_robot(source: Source, other: Source, robot: Robot) -> None:
    """ValueError where it cannot, and one warning where its own quantiles look like other units.

    other: the source whose robot it is, before either left out what its statistics do not explain.
    """
    _check_names(source, other)
    if isinstance(source, LeRobotSource):
        _check_sizes(source, robot)
        _check_options(source, robot)
        _compare_units(source, robot)


def _check_names(source: Source, other: Source) -> None:
    parts: tuple[Literal["state", "action"], ...] = ("state", "action")
    for part in parts:
        mine, theirs = _dim_names(source, part), _dim_names(other, part)
        if mine and theirs and len(mine) == len(theirs) and mine != theirs:
            dim = next(dim for dim, (own, its) in enumerate(zip(mine, theirs, strict=True)) if own != its)
            raise ValueError(
                f"dataset {source.name!r}: dim {dim} of its {part} is {mine[dim]!r}, and {theirs[dim]!r} in"
                f" same_robot_as {source.same_robot_as!r}: name the {part}_keys in the same order, or leave"
                " same_robot_as out. If they are the same, correct the feature's `names` in meta/info.json"
            )


def _dim_names(source: Source, part: Literal["state", "action"]) -> list[str] | None:
    """In the order of the vector; None where some are unknown, or only numbered, as `pi05 collect` writes them."""
    found: list[str] = []
    for names in source.names(part).values():
        if names is None or names == [f"{part}_{dim}" for dim in range(len(names))]:
            return None
        found += names
    return found


def _check_sizes(source: LeRobotSource, robot: Robot) -> None:
    dims = source.columns.state.shape[1], source.columns.action.shape[1]
    own = {"state dims": dims[0], "action dims": dims[1], "frames per second": source.files.fps}
    theirs = {"state dims": robot.state_dim, "action dims": robot.action_dim, "frames per second": robot.fps}
    for what, number in own.items():
        if number != theirs[what]:
            raise ValueError(
                f"dataset {source.name!r}: same_robot_as {source.same_robot_as!r} has {theirs[what]:g} {what}, and"
                f" {source.config.path} {number:g}: leave same_robot_as out, or name a dataset like it"
            )


def _check_options(source: LeRobotSource, robot: Robot) -> None:
    told = {"relative_dims": (source.relative, robot.relative)}
    told |= {name: (getattr(source.config, name), getattr(robot, name)) for name in ("embodiment", "control_mode")}
    for name, (mine, theirs) in told.items():
        if mine and mine != theirs:
            raise ValueError(
                f"dataset {source.name!r}: its {name} are not those of same_robot_as {source.same_robot_as!r}, which"
                " would be taken: leave one of the two out"
            )


def _compare_units(source: LeRobotSource, robot: Robot) -> None:
    if not len(source):
        return
    state, action = source.statistics()
    pairs = {"state": (robot.normalize.state, state.quantiles)}
    if source.relative == robot.relative:  # else its own actions are not yet relative
        pairs["action"] = robot.normalize.action, action.quantiles
    found = [
        f"{part}[{', '.join(map(str, dims))}] {problem}"
        for part, (shared, own) in pairs.items()
        for problem, dims in unit_problems(shared, own).items()
    ]
    if found:
        log.warning(
            "dataset %r: its values are not like those of same_robot_as %r, by whose statistics they are normalised:"
            " %s. Convert them, or leave same_robot_as out if it is another robot",
            source.name,
            source.same_robot_as,
            "; ".join(found),
        )
