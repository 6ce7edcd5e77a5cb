"""Where data are not those that a checkpoint was trained on, or that another rank sees; nothing is read twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi05_lightning.data.looks import Look
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.robot import Robot
from pi05_lightning.data.sources.base import Source
from pi05_lightning.data.split import Split
from pi05_lightning.types import Modality, Subset

ROUNDING = 1e-6  # of a value and its dim's range: statistics are deterministic, but for a machine's last bit
SHOWN = 3  # dims of which the values are told
ANOTHER_LOOK = 8.0  # grey levels between the means of two cameras' images
_TOLD_OTHERWISE = {
    "fps_is_known",
    "quantiles",
    "state_range",
    "tasks",
    "dataset",
    "is_on_hub",
    "looks",
    "horizon",
    "state_keys",
    "action_keys",
}
_UNKNOWN = ("cameras", None)  # to an older checkpoint


@dataclass(frozen=True)
class Difference:
    """place: the key in the configuration.  what: both values, in words.

    harmless: what the weights have learned holds as before.
    """

    place: str
    what: str
    harmless: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


def differences(saved: Mapping[str, Any], today: Processor) -> list[Difference]:
    """Of a checkpoint's processor (`Processor.to_dict`, whatever an older one lacks left out) and that of the data."""
    now = today.to_dict()
    found = [
        Difference(f"data.language.{key}", _values(value, then))
        for key, then, value in (
            *((f"prompts.{k}", v, now["language"]["prompts"].get(k)) for k, v in saved["language"]["prompts"].items()),
            ("condition_on", saved["language"]["condition_on"], now["language"]["condition_on"]),
        )
        if then != value
    ]
    if saved["tokenizer"] != now["tokenizer"]:
        found.append(
            Difference("data.tokenizer", "is another tokenizer than the checkpoint's: the same text has other ids")
        )
    if saved["fast"] != now["fast"]:
        what, harmless = "is another FAST tokenizer than the checkpoint's: its tokens stand for other actions", False
        if now["fast"] is None:
            what = "is null, and the checkpoint has a FAST tokenizer"
        if saved["fast"] is None:
            what, harmless = "is a FAST tokenizer, and the checkpoint has none", True
        found.append(Difference("data.fast", what, harmless))
    for name in saved["robots"].keys() - now["robots"].keys():
        found.append(
            Difference(
                f"data.sources.{name}",
                "is gone, and a policy could not act as this robot any more. To train on others alone, keep it and name"
                " them in the stages' `mixture`",
            )
        )
    for name, robot in now["robots"].items():
        if name in saved["robots"]:
            found += _of_robot(f"data.sources.{name}", saved["robots"][name], robot)
        else:
            found.append(
                Difference(f"data.sources.{name}", "is a robot that the checkpoint does not know", harmless=True)
            )
    cameras, known = now["cameras"], saved["cameras"]
    if cameras[: len(known)] != known:
        found.append(Difference("data.cameras", _values(cameras, known) + ", in the order of their tokens"))
    elif cameras != known:
        found.append(Difference("data.cameras", _values(cameras, known), harmless=True))
    return found


def sizes_of(sources: Mapping[str, Source]) -> dict[str, int]:
    """Samples by `source/modality`."""
    return {
        str(Subset(name, modality)): len(source.indices(modality))
        for name, source in sources.items()
        for modality in Modality
    }


def size_differences(saved: Mapping[str, int], today: Mapping[str, int]) -> list[Difference]:
    """Of `sizes_of` of a checkpoint's training data and of today's, where both have the source."""
    return [
        Difference(f"data.sources: {name}", f"has {today[name]} samples, and had {size}", harmless=True)
        for name, size in saved.items()
        if size != today.get(name, size)
    ]


@dataclass(frozen=True)
class Seen:
    """What a rank of a run sees of its data.

    sizes: samples by `source/modality` and part.  quantiles: by robot, all of them, f64[N].
    """

    sizes: dict[str, int]
    quantiles: dict[str, np.ndarray]

    @classmethod
    def of(cls, robots: Mapping[str, Robot], parts: Mapping[Split, Mapping[str, Source]]) -> Seen:
        """parts: the sources of each part that the run reads, by name."""
        sizes = {f"{name} ({split})": n for split, part in parts.items() for name, n in sizes_of(part).items()}
        known = {name: (robot.normalize.state, robot.normalize.action) for name, robot in robots.items()}
        return cls(sizes, {name: np.concatenate([v for q in of for v in (q.q01, q.q99)]) for name, of in known.items()})

    def differences(self, first: Seen) -> list[str]:
        """From what the first rank sees, in words."""
        found = [
            f"data.sources: {name} has {self.sizes.get(name, 0)} samples, and there {first.sizes.get(name, 0)}"
            for name in {**first.sizes, **self.sizes}
            if self.sizes.get(name) != first.sizes.get(name)
        ]
        for name, values in self.quantiles.items():
            other = first.quantiles.get(name, values[:0])
            if values.shape != other.shape or not np.allclose(values, other, rtol=ROUNDING, atol=ROUNDING):
                found.append(f"data.sources.{name}: its states and actions have other quantiles")
        return found


def _of_robot(place: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    told_otherwise = _TOLD_OTHERWISE | (set() if then.get("fps_is_known", True) else {"fps"})
    found = [
        Difference(place, f"{key} {_values(now[key], value)}", harmless=(key, value) == ("has_subtasks", False))
        for key, value in then.items()
        if key in now and key not in told_otherwise and (key, value) != _UNKNOWN and _plain(value) != _plain(now[key])
    ]
    for part in ("state", "action"):
        old, new = (np.array([q[part]["q01"], q[part]["q99"]]) for q in (then["quantiles"], now["quantiles"]))
        found += _of_statistics(place, part, "1 % and 99 % quantile", old, new)
    if then.get("state_range") is not None and now["state_range"] is not None:
        old, new = np.array(then["state_range"]), np.array(now["state_range"])
        # of other dims it was said already
        found += _of_statistics(place, "state", "least and greatest value", old, new) if old.shape == new.shape else []
    for camera in then.get("looks", {}).keys() & now["looks"].keys():
        distance = Look.from_dict(then["looks"][camera]).distance(Look.from_dict(now["looks"][camera]))
        if distance > ANOTHER_LOOK:
            found.append(
                Difference(place, f"the images of {camera} differ by {distance:.0f} grey levels from the checkpoint's")
            )
    if then.get("horizon") != now["horizon"]:
        found.append(Difference(place, f"horizon_steps {_values(now['horizon'], then.get('horizon'))}", harmless=True))
    if then["tasks"] != now["tasks"]:
        others = sorted(set(then["tasks"]) ^ set(now["tasks"]))
        found.append(
            Difference(place, f"has other tasks than the checkpoint: {', '.join(others[:SHOWN])}", harmless=True)
        )
    return found


def _of_statistics(place: str, part: str, of: str, then: np.ndarray, now: np.ndarray) -> list[Difference]:
    """then, now: f64[2 A], the lower and the upper statistic of each dim."""
    if then.shape != now.shape:
        return [Difference(place, f"{part} has {now.shape[1]} dims, and {then.shape[1]} in the checkpoint")]
    scale = np.maximum(np.abs(then), np.abs(now)) + np.maximum(np.ptp(then, axis=0), np.ptp(now, axis=0))
    dims = np.flatnonzero((np.abs(then - now) > ROUNDING * scale).any(0))
    if not len(dims):
        return []
    told = [
        f"dim {dim} {now[0, dim]:.7g} and {now[1, dim]:.7g} (checkpoint {then[0, dim]:.7g} and {then[1, dim]:.7g})"
        for dim in dims[:SHOWN]
    ]
    more = [f"and also of dims {', '.join(map(str, dims[SHOWN:]))}"] if len(dims) > SHOWN else []
    return [Difference(place, f"{of} of the {part}: {', '.join([*told, *more])}")]


def _values(now: Any, then: Any) -> str:
    return f"is {now!r}, and {then!r} in the checkpoint"


def _plain(value: Any) -> Any:
    """Lists that are sets, such as a robot's cameras, whatever their order."""
    return sorted(value) if isinstance(value, list) else value


def check_measurable(saved: Processor, today: Processor, robots: list[str]) -> None:
    """ValueError for data that weights of the saved processor cannot be measured on: other robots than they know."""
    for name in robots:
        known, here = saved.robots.get(name), today.robots[name]
        if known is None:
            raise ValueError(
                f"data.sources.{name}: the checkpoint knows no such robot, only {', '.join(saved.acting) or 'none'}:"
                " name the source as it was in training"
            )
        for what, then, now in (
            ("frames per second", known.fps if known.fps_is_known else here.fps, here.fps),
            ("action dims", known.action_dim, here.action_dim),
            ("state dims", known.state_dim, here.state_dim),
        ):
            if then != now:
                raise ValueError(
                    f"data.sources.{name} has {now:g} {what} and the checkpoint was trained with {then:g}: use data of"
                    " the same robot"
                )
    if unknown := set(today.cameras) - set(saved.cameras):
        raise ValueError(
            f"data.sources have the cameras {', '.join(sorted(unknown))}, which the checkpoint does not know: it has"
            f" {', '.join(saved.cameras) or 'none'}. Leave them out with the sources'"
            " `cameras`, or name them as in training"
        )


def measured_otherwise(saved: Processor, today: Processor, robots: list[str]) -> list[str]:
    """What is to be said where weights of the saved processor are measured on data that are not as theirs were.

    robots: the data sources' that they are measured on.  ValueError as of `check_measurable`.
    """
    check_measurable(saved, today, robots)
    if saved is today:
        return []
    found = differences(saved.to_dict(), today)
    return [f"{difference}; what the checkpoint has is used" for difference in found if not difference.harmless]
