"""Whether a policy is given what it was trained on, what follows where it is not, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit  # Student's t; scipy.stats has it too, and takes long to import

from pi05_lightning.data.looks import Look
from pi05_lightning.data.prompt import clean_task
from pi05_lightning.data.robot import Robot
from pi05_lightning.data.transforms import Quantiles
from pi05_lightning.data.units import ENDS, NOT_FINITE, other_interval, unit_problems
from pi05_lightning.files.suggestion import suggestion
from pi05_lightning.weights.abilities import Abilities

Verdict = Literal["ok", "differs", "unknown"]

FOLLOWED = 0.3  # correlation of predicted and recorded actions from which on the policy does as was done
CHANCE = 0.01  # how often the frames of a policy that follows nothing may say that it moves the other way


@dataclass(frozen=True)
class Finding:
    """One thing that was compared.

    expected, given: in words.  then: what the policy would do, and mend: what to do about it, where it differs.
    """

    what: str
    verdict: Verdict
    expected: str = ""
    given: str = ""
    then: str = ""
    mend: str = ""

    def __str__(self) -> str:
        mend = f" Mend: {self.mend}." if self.mend else ""
        return f"{self.what}: {self.given}: {self.then}.{mend}"


@dataclass(frozen=True)
class Counterpart:
    """What a policy would be given: as a robot, as if it had been trained on that.

    bounds: its actions' quantiles are the least and the greatest that are taken, as of a simulator.
    """

    robot: Robot
    name: str
    bounds: bool = False
    resting: bool = False
    """Its states are those that episodes begin with, whose ranges tell nothing."""
    sets_rate: bool = False
    """How long an action lasts was said, whatever rate the policy's data have."""
    episode_seconds: float | None = None
    """Of the longest one."""
    features: Mapping[str, str] | None = None
    """A dataset's image features, each with its camera name."""


def agreement(policy: Robot, abilities: Abilities, horizon: int, counterpart: Counterpart) -> list[Finding]:
    """What there is to say of a policy and what it is given; horizon: actions of a chunk."""
    return [
        *_heads(abilities),
        *_cameras(policy, counterpart),
        *compare_looks(policy, counterpart.robot.looks),
        *_vector("state", policy.normalize.state, counterpart.robot.normalize.state, counterpart),
        *_actions(policy, counterpart),
        *_rate(policy, counterpart),
        *_horizon(policy, horizon, counterpart),
        *_instructions(policy, counterpart),
        _statistics(policy, counterpart),
    ]


def _heads(abilities: Abilities) -> Iterator[Finding]:
    able = [name for name in ("flow", "fast") if getattr(abilities, name)]
    trained = ", ".join(f"{name} ({steps} steps)" for name, steps in abilities.stages.items()) or "not recorded"
    subtasks = "subtasks are said first" if abilities.subtasks else "the task alone conditions them"
    if able:
        yield Finding("heads", "ok", f"actions by {' or '.join(able)}; {subtasks}", f"trained: {trained}")
    else:
        then = "it cannot act"
        yield Finding(
            "heads", "differs", "a head for actions", f"trained: {trained}", then, "train the posttrain stage"
        )


def _cameras(policy: Robot, counterpart: Counterpart) -> Iterator[Finding]:
    if policy.cameras is None:
        yield Finding("cameras", "unknown", "an older checkpoint does not say", _listed(counterpart.robot.cameras))
        return
    here = counterpart.robot.cameras or ()
    missing = [camera for camera in policy.cameras if camera not in here]
    if not missing:
        yield Finding("cameras", "ok", _listed(policy.cameras), _listed(here))
        return
    spare = [camera for camera in here if camera not in policy.cameras]
    if spare and counterpart.features is not None:
        renamed = dict(zip(spare, missing, strict=False))
        named = {key: renamed.get(camera, camera) for key, camera in counterpart.features.items()}
        listed = ", ".join(f"{key}: {camera}" for key, camera in named.items() if camera in policy.cameras)
        mend = f"name them as the policy does, if they see the same: --cameras '{{{listed}}}'"
    elif spare:
        mend = "name them as the policy does, in the simulator's options"
    else:
        mend = f"add them, or act without: --missing_cameras '[{', '.join(missing)}]'"
    then = f"every observation is refused: {', '.join(missing)} missing"
    yield Finding("cameras", "differs", _listed(policy.cameras), _listed(here), then, mend)


def compare_looks(policy: Robot, looks: Mapping[str, Look]) -> Iterator[Finding]:
    """What there is to say of the images that it is given, by camera."""
    for camera in policy.cameras or ():
        ours, theirs = policy.looks.get(camera), looks.get(camera)
        what = f"image {camera}"
        if theirs is None:
            continue  # the cameras' names differ, and that was said
        size = f"{theirs.size[1]} × {theirs.size[0]}"
        if ours is None:
            yield Finding(what, "unknown", "the checkpoint does not say how its images look", size)
            continue
        expected = f"{ours.size[1]} × {ours.size[0]}"
        change = ours.shown_as(theirs)
        if change:
            then = "it sees a scene that it was never trained on"
            mend = f"turn the images back before they reach the policy, or train on images that are {change}"
            yield Finding(what, "differs", expected, f"{size}, {change}", then, mend)
        elif ours.size[0] * theirs.size[1] != ours.size[1] * theirs.size[0]:
            then = "the picture fills another part of what the model sees"
            yield Finding(what, "differs", expected, size, then, f"crop or render it in the proportions of {expected}")
        elif change is None:
            yield Finding(what, "unknown", expected, f"{size}; another scene, or too plain to tell how it is turned")
        else:
            yield Finding(what, "ok", expected, size)


def _vector(what: str, ours: Quantiles, theirs: Quantiles, counterpart: Counterpart) -> Iterator[Finding]:
    """Dims, units, signs and ranges of a state or an action, by both quantiles."""
    if what == "state" and not len(ours):
        yield Finding(
            what, "ok", "none", f"{len(theirs)} dims, which it refuses: leave them out" if len(theirs) else "none"
        )
        return
    if len(ours) != len(theirs):
        then = "every observation is refused" if what == "state" else "its actions cannot be executed"
        mend = f"choose the features that it was trained on, with {what}_keys"
        yield Finding(what, "differs", f"{len(ours)} dims", f"{len(theirs)} dims", then, mend)
        return
    problems = unit_problems(ours, theirs, counterpart.resting)
    if not problems:
        yield Finding(what, "ok", f"{len(ours)} dims", f"{len(theirs)} dims, in the same range")
    for problem, dims in problems.items():
        then = "it takes them for others" if what == "state" else "its actions do other things here than there"
        if problem == NOT_FINITE and what == "state":
            then = "every observation is refused"
        shown = f"{problem}: {_quantiles(theirs, dims)}"
        mend = f"convert {what}[{', '.join(map(str, dims))}] of {counterpart.name} before the policy sees it"
        yield Finding(f"{what}, dims {_span(dims)}", "differs", _quantiles(ours, dims), shown, then, mend)


def _actions(policy: Robot, counterpart: Counterpart) -> Iterator[Finding]:
    ours, theirs = policy.normalize.action, counterpart.robot.normalize.action
    if counterpart.bounds:
        yield from _bounds(policy, theirs, counterpart.name)
        return
    yield from _vector("action", ours, theirs, counterpart)
    then = policy.relative
    kind = "none: trained on as recorded" if then is None else f"dims {_span(then.dims)}, from the state"
    now = counterpart.robot.relative
    if then == now:
        yield Finding("relative actions", "ok", kind, "read in the same way")
    else:
        mend = "give relative_dims as in training"
        yield Finding("relative actions", "differs", kind, "otherwise", "its actions end elsewhere", mend)


def _bounds(policy: Robot, bounds: Quantiles, where: str) -> Iterator[Finding]:
    ours = policy.normalize.action
    if len(ours) != len(bounds):
        mend = "name the simulator and the options that its data came from"
        yield Finding(
            "action", "differs", f"{len(ours)} dims", f"{len(bounds)} dims", "its actions cannot be executed", mend
        )
        return
    absolute = [dim for dim in range(len(ours)) if policy.relative is None or dim not in policy.relative.dims]
    clipped, other = [], []
    for dim in absolute:
        low, high = float(bounds.q01[dim]), float(bounds.q99[dim])
        least, most = float(ours.q01[dim]), float(ours.q99[dim])
        margin = ENDS * (high - low)
        if least < low - margin or most > high + margin:
            clipped.append(dim)
        elif other_interval((low, high), (least, most)):
            other.append(dim)
    for dims, given, then, mend in (
        (clipped, "beyond what is taken", "what is beyond is clipped or refused", "convert the actions' units"),
        (
            other,
            "another interval than is taken",
            "a part of the range is never reached, as a gripper that cannot close",
            "map the action to the simulator's interval, or train on data that use it",
        ),
    ):
        if dims:
            yield Finding(
                f"action, dims {_span(dims)}",
                "differs",
                _quantiles(ours, dims),
                f"{given}: {_quantiles(bounds, dims)}",
                then,
                f"{mend} ({where})",
            )
    if not clipped and not other:
        yield Finding("action", "ok", f"{len(ours)} dims", "within the bounds")


def _rate(policy: Robot, counterpart: Counterpart) -> Iterator[Finding]:
    expected, rate = f"{policy.fps:g} Hz", f"{counterpart.robot.fps:g} Hz"
    if not policy.fps_is_known:
        yield Finding("rate", "unknown", "not said: pi05 convert --fps", rate)
    elif abs(policy.fps - counterpart.robot.fps) <= 1e-6 * policy.fps:
        yield Finding("rate", "ok", expected, rate)
    elif counterpart.sets_rate:
        yield Finding("rate", "unknown", expected, f"{rate}, as action_repeat says")
    else:
        times = counterpart.robot.fps / policy.fps
        then = f"a chunk is executed {times:.3g} times as fast as it was shown"
        yield Finding("rate", "differs", expected, rate, then, f"ask it, and act, {policy.fps:g} times a second")


def _horizon(policy: Robot, horizon: int, counterpart: Counterpart) -> Iterator[Finding]:
    if not policy.fps_is_known:
        yield Finding("horizon", "unknown", f"chunks of {horizon} actions, of a rate that is not said")
        return
    seconds = horizon / policy.fps
    expected = f"chunks of {horizon} actions, {seconds:.3g} s"
    if counterpart.episode_seconds is None:
        yield Finding("horizon", "ok", expected)
    elif counterpart.episode_seconds < seconds:
        then = "the end of every chunk is beyond what was ever shown"
        shown = f"the longest episode is {counterpart.episode_seconds:.3g} s"
        yield Finding(
            "horizon", "differs", expected, shown, then, "execute fewer actions of a chunk, or train on others"
        )
    else:
        yield Finding("horizon", "ok", expected, f"episodes of up to {counterpart.episode_seconds:.3g} s")


def _instructions(policy: Robot, counterpart: Counterpart) -> Iterator[Finding]:
    known = {clean_task(task) for task in policy.tasks}
    if not known:
        yield Finding("instructions", "unknown", "the checkpoint does not say", _listed(counterpart.robot.tasks))
        return
    foreign = [task for task in counterpart.robot.tasks if clean_task(task) not in known]
    if not foreign:
        yield Finding("instructions", "ok", f"{len(known)}", f"{len(counterpart.robot.tasks)}, all of them known")
        return
    meant = suggestion(clean_task(foreign[0]), known)
    yield Finding(
        "instructions",
        "differs",
        _listed(policy.tasks[:1]) + (", …" if len(known) > 1 else ""),
        f"{len(foreign)} of {len(counterpart.robot.tasks)} that it was never trained on, as {foreign[0]!r}{meant}",
        "it follows them as far as it generalises",
        "word them as in training" if meant else "",
    )


def _statistics(policy: Robot, counterpart: Counterpart) -> Finding:
    ours, theirs = policy.normalize.state, counterpart.robot.normalize.state
    expected = f"those in the checkpoint, of {policy.dataset or 'the training data'}"
    if not len(ours) or len(ours) != len(theirs):
        return Finding("statistics", "ok", expected, "its own are not needed")
    least, most = ours.normalize(theirs.q01).min(), ours.normalize(theirs.q99).max()
    shown = f"its own are not needed; by the checkpoint's, its states are {least:.2g} to {most:.2g}"
    return Finding("statistics", "ok", expected, f"{shown} (trained on: -1 to 1)")


def compare_predictions(predicted: Sequence[np.ndarray], recorded: Sequence[np.ndarray], robot: Robot) -> list[Finding]:
    """What the policy does at frames of a dataset, beside what was done there.

    predicted, recorded: f32[T A] each, in the robot's units, and relative dims as they are trained on, as what they are
    relative to would hide what the policy adds. T may differ from frame to frame.
    """
    ours, theirs = np.concatenate(list(predicted)), np.concatenate(list(recorded))
    span = robot.normalize.action.unit  # in which a held joint's noise is none
    error = np.abs(ours - theirs).mean(0) / span
    moving = (ours.std(0) > 0.01 * span) & (theirs.std(0) > 0.01 * span)
    follows = np.array(
        [np.corrcoef(ours[:, dim], theirs[:, dim])[0, 1] if moving[dim] else 0.0 for dim in range(ours.shape[1])]
    )
    shown = f"mean error {error.mean():.2g} of the range; correlation by dim {', '.join(f'{r:.2f}' for r in follows)}"
    by_chance = _correlation_by_chance(len(predicted), len(follows))
    opposite = np.flatnonzero(follows < -by_chance).tolist()
    if opposite:
        mend = f"turn the sign of action[{', '.join(map(str, opposite))}]"
        then = "it moves the other way"
        return [Finding(f"predictions, dims {_span(opposite)}", "differs", "the recorded actions", shown, then, mend)]
    verdict: Verdict = "ok" if moving.any() and follows[moving].mean() >= FOLLOWED else "unknown"
    if verdict == "unknown" and follows.min() < 0:
        shown += f" (by chance {len(predicted)} frames may have {-by_chance:.2f}: ask at more)"
    return [Finding("predictions", verdict, "the recorded actions", shown)]


def _correlation_by_chance(frames: int, dims: int) -> float:
    """The size of a correlation that the least of so many dims passes by chance with a probability of `CHANCE`.

    A chunk's actions are alike: of its steps, the frame alone counts. Two frames say nothing.
    """
    if frames < 3:
        return 1.0
    t = -stdtrit(frames - 2, CHANCE / dims)
    return float(t / np.sqrt(frames - 2 + t**2))


def _quantiles(quantiles: Quantiles, dims: Sequence[int]) -> str:
    shown = [f"{quantiles.q01[dim]:.3g}..{quantiles.q99[dim]:.3g}" for dim in dims[:3]]
    return ", ".join([*shown, "…"] if len(dims) > 3 else shown)


def _span(dims: Iterable[int]) -> str:
    return ", ".join(map(str, dims))


def _listed(names: Sequence[str] | None) -> str:
    return ", ".join(names) if names else "none"


def differs(findings: Iterable[Finding]) -> bool:
    """Whether anything is not as the policy expects it."""
    return any(finding.verdict == "differs" for finding in findings)
