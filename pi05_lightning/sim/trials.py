"""Episodes in lanes: environments of one task are stepped together, so that the policy sees a batch.

An episode depends on its task, its seed and the policy alone, not on the lane, the batch or the process it ran in. A
policy that raises, or whose actions cannot be executed, ends the episode; the reason is the episode's result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from PIL import Image

from pi05_lightning.data.observation import NotFinite
from pi05_lightning.files.ranges import check_range
from pi05_lightning.sim.environment import (
    Chained,
    Demonstrator,
    Environment,
    ExpertEnvironment,
    SharedScene,
    act_as_expert,
)
from pi05_lightning.sim.instructions import Instruction
from pi05_lightning.sim.modes import Mode
from pi05_lightning.types import Frame

if TYPE_CHECKING:
    from pi05_lightning.acting.inference import Inference

MOST_DECISIONS = 96
"""Frames of a film decision by decision; a longer one leaves out every second."""
OUT_OF_TIME = "out of time"
SOLVED_OTHER = "it solved the task that it was told"
ENDED = "the environment ended the episode"
NOT_FINITE = "the policy's action is not finite"
_REASON_LENGTH = 160  # of the message of whatever a policy raised


@dataclass(frozen=True)
class FilmFrame:
    """What a film shows of one action: u8[h w 3], all cameras side by side; the chunk f32[T A] that it is from."""

    image: np.ndarray
    caption: str
    chunk: np.ndarray | None = None
    place: int = 0
    """Of the action in the chunk."""


@dataclass(frozen=True)
class Step:
    """What was seen before an action, and what was done: f32[A] in the robot's units.

    subtask: what the policy said, or the expert is doing.  is_correction: whether the expert did it.
    """

    frame: Frame
    action: np.ndarray
    subtask: str | None
    is_correction: bool = False


@dataclass
class Trial:
    """One episode: what decides how it goes beside the policy, and how it went and ended."""

    mode: Mode
    task: str
    seed: int
    """Of the initial state."""
    record: bool = False
    """Whether it is filmed, action by action."""
    max_seconds: float | None = None
    """Simulated time after which it has failed; None: what the environment says."""
    noise_seed: int = 0
    """Of the policy's noise, of delays and of random actions."""
    delays: tuple[int, ...] = ()
    """Actions that are executed while a chunk is computed: one is drawn for each chunk. Empty: `inference_delay`."""
    success: bool = False
    reason: str = ""
    """Why it ended without success; empty while it runs, and after success."""
    lacked_memory: bool = False
    """Whether it ended as the machine, or its accelerator, has no memory left or failed."""
    decisions: int = 0
    """Actions taken."""
    subtask: str | None = None
    fps: float = 0.0
    """Actions per second."""
    number: int = 0
    """Of the episode among those of its task and mode."""
    instruction: Instruction = "right"
    other: str | None = None
    """Of `swapped`: the task whose instruction is given."""
    sentence: str | None = None
    """What the policy is told; None: the environment's instruction."""
    solved_other: bool | None = None
    """Of `swapped`: whether the other task was solved; None where the scene does not allow that."""
    done: int | None = None
    """Of a chain: instructions that were done in a row."""
    length: int = 1
    """Instructions of the episode."""
    record_failure: bool = False
    """Whether it is filmed if it fails, decision by decision: what the policy sees anyhow, which takes no time."""
    film: list[FilmFrame] = field(default_factory=list)
    film_every: int = 1
    """Actions from one frame of the film to the next."""
    seams: list[float] = field(default_factory=list)
    """Jumps from an action to the next one where that is of another chunk, see `jumps`."""
    inside: list[float] = field(default_factory=list)
    """The same within what a chunk adds to the one before, executed or not."""
    keeps: bool = False
    """Whether `steps` are kept."""
    steps: list[Step] = field(default_factory=list)
    patience: int | None = None
    """Actions without progress after which the expert takes over, until the end; None: it never does.

    Progress is that the expert would now do something else, in words: see `Demonstrator.subtask`."""
    corrected: bool = False
    """Whether the expert has taken over."""
    phase: tuple[str, int] | None = None
    """What the expert would be doing, and since which action; of a trial with patience."""

    @property
    def crashed(self) -> bool:
        """Whether it ended by the policy's fault, of which `reason` tells."""
        return self.reason not in ("", OUT_OF_TIME, ENDED, SOLVED_OTHER)

    def __post_init__(self) -> None:
        check_range("max_seconds", self.max_seconds, 0, above=True)

    @property
    def over(self) -> bool:
        return self.success or bool(self.reason)

    @property
    def column(self) -> str:
        """Of the tables: the mode, and the kind of instruction where that is not the right one."""
        return self.mode if self.instruction == "right" else f"{self.mode}, {self.instruction}"

    @property
    def title(self) -> str:
        return f"{self.column} · {self.task}"

    @property
    def outcome(self) -> str:
        return "success" if self.success else self.reason


@dataclass
class Clock:
    """Seconds that each call of the policy, each step of an environment, and all in all took."""

    decisions: list[float] = field(default_factory=list)
    lanes: list[int] = field(default_factory=list)
    """Episodes that a call of the policy served."""
    steps: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Clock) -> None:
        self.decisions += other.decisions
        self.lanes += other.lanes
        self.steps += other.steps
        self.seconds += other.seconds


Lane = tuple[Environment, Trial]


class Motion:
    """The actions of an episode, from chunk to chunk: the next one is due every `execution_horizon` actions.

    A chunk is computed from the observation at its first step. Meanwhile the last one goes on, for as many actions as
    the delay says; then the new one is joined at the step that is due. The first chunk is waited for. At another
    instruction, as in a chain, all begins anew, as with `Pi05Policy.predict`.
    """

    def __init__(self, policy: Inference, trial: Trial) -> None:
        self.executed, self.given = policy.execution_horizon, policy.acting.given
        self.delays = trial.delays or (policy.acting.inference_delay,)
        self.trial = trial
        self.chunk: np.ndarray | None = None
        self.told, self.begun = "", 0
        """The instruction, and the number of its first chunk."""
        self._last: np.ndarray | None = None  # action
        self._origin = 0  # of the last action: the chunk that was computed for it

    @property
    def prefix(self) -> np.ndarray | None:
        """What the next chunk is given, f32[d A]; None of the first."""
        return None if self.chunk is None else self.chunk[self.executed : self.executed + self.given]

    def hear(self, instruction: str, number: int) -> None:
        """What the policy is told before chunk `number`."""
        if instruction != self.told:
            self.told, self.begun, self.chunk = instruction, number, None

    def follow(self, env: Environment, frame: Frame, chunk: np.ndarray, number: int, clock: Clock) -> None:
        """Execute what is `due` until the episode is over, the instruction another one, or the expert takes over.

        frame: what the chunk was computed from.
        """
        for executed, (source, at) in enumerate(self.due(env, chunk, number)):
            if self.trial.keeps:
                now = seen(env, self.trial) if executed else frame
                self.trial.steps.append(Step(now, np.array(source[at], np.float32), self.trial.subtask))
            take(env, self.trial, partial(env.step, source[at]), clock, source, at)
            if self.trial.over or _is_stuck(env, self.trial) or told(env, self.trial) != self.told:
                break

    def due(self, env: Environment, chunk: np.ndarray, number: int) -> Iterator[tuple[np.ndarray, int]]:
        """What is due from chunk `number` f32[T A], and from the one before until it has come: chunks, places in them.

        An action is taken to be executed when the next one is asked for.
        """
        before, self.chunk, delay, begin = self.chunk, chunk, 0, 0
        if before is not None:
            seed = [self.trial.noise_seed, self.trial.seed, number]
            delay = int(np.random.default_rng(seed).choice(self.delays))
            begin = max(delay, self.given)
        self.trial.inside += jumps(chunk[0 if before is None else self.given :], env)
        for place in range(min(self.executed, len(chunk))):
            source, at = (before, self.executed + place) if before is not None and place < delay else (chunk, place)
            action = source[at]
            origin = number if place >= begin else number - 1
            if self._last is not None and origin != self._origin:
                self.trial.seams += jumps(np.stack([self._last, action]), env)
            self._last, self._origin = action, origin
            yield source, at


def jumps(actions: np.ndarray, env: Environment) -> list[float]:
    """|a_{t+1} - a_t| of consecutive actions f32[N A], as a share of the range of each dim, mean over the dims.

    Dims without a range count in the robot's units.
    """
    width = env.action_high - env.action_low
    scale = np.where(np.isfinite(width) & (width > 0), width, 1.0)
    return np.abs(np.diff(actions, axis=0) / scale).mean(1).tolist()


def run_policy(policy: Inference, lanes: Sequence[Lane], clock: Clock) -> None:
    """Reset the environments and step them together until each succeeds, fails or runs out of time."""
    for env, trial in lanes:
        begin(env, trial)
    running, number = [(env, trial, Motion(policy, trial)) for env, trial in lanes], 0
    while running:
        frames = [seen(env, trial) for env, trial, _ in running]
        for env, trial, motion in running:
            motion.hear(told(env, trial), number)
        start = perf_counter()
        chunks = decide(policy, running, frames, number)
        clock.decisions.append(perf_counter() - start)
        clock.lanes.append(len(running))
        for (env, trial, motion), frame, chunk in zip(running, frames, chunks, strict=True):
            if isinstance(chunk, str):
                trial.reason = chunk
            else:
                _film_decision(trial, frame, chunk, number, motion.executed)
                motion.follow(env, frame, chunk, number, clock)
            if trial.over and trial.record_failure and not trial.record:
                _end_film(env, trial)
        running = [lane for lane in running if not lane[1].over and not lane[1].corrected]
        number += 1
    for env, trial in lanes:
        if trial.corrected:
            _correct(cast("Demonstrator", env), trial, clock)


def run_baseline(
    env: Environment, trial: Trial, clock: Clock, replay: Callable[[str], np.ndarray] | None = None
) -> None:
    """One episode of the scripted expert, of uniformly random actions, or of a trajectory.

    replay: instruction -> the trajectory f32[N A].
    """
    begin(env, trial)
    rng = np.random.default_rng([trial.noise_seed, trial.seed])
    sentence, since = env.sentence, 0
    while not trial.over:
        if env.sentence != sentence:
            sentence, since = env.sentence, trial.decisions
        if trial.mode == "expert":
            take(env, trial, cast("ExpertEnvironment", env).expert_step, clock)
        else:
            if replay is None:
                action = _random_action(env, trial, rng)
            else:
                trajectory = replay(sentence)
                action = trajectory[min(trial.decisions - since, len(trajectory) - 1)]
            take(env, trial, partial(env.step, action), clock)


def _is_stuck(env: Environment, trial: Trial) -> bool:
    """Whether the expert takes over, as the policy has made no progress for too long."""
    if trial.patience is None:
        return False
    now = cast("Demonstrator", env).subtask()
    assert trial.phase is not None
    if trial.phase[0] != now:
        trial.phase = now, trial.decisions
    trial.corrected = trial.decisions - trial.phase[1] >= trial.patience
    return trial.corrected


def _correct(env: Demonstrator, trial: Trial, clock: Clock) -> None:
    """The expert from where the policy is, until the end."""
    while not trial.over:
        taken = list[np.ndarray]()
        frame, subtask = (seen(env, trial), env.subtask()) if trial.keeps else (None, None)
        take(env, trial, partial(act_as_expert, env, taken), clock)
        if frame is not None:
            action = np.asarray(np.mean(taken, 0, dtype=np.float32))
            trial.steps.append(Step(frame, action, subtask, is_correction=True))


def told(env: Environment, trial: Trial) -> str:
    """The instruction that the policy gets."""
    return env.sentence if trial.sentence is None else trial.sentence


def seen(env: Environment, trial: Trial) -> Frame:
    """An observation as the policy gets it, with the instruction that it is told."""
    frame = env.observation()
    return frame if trial.sentence is None else replace(frame, task=trial.sentence)


def begin(env: Environment, trial: Trial) -> None:
    """Begin an episode at its initial state."""
    env.reset(trial.seed)
    begin_here(env, trial)
    if trial.other is not None and isinstance(env, SharedScene) and env.watch(trial.other):
        trial.solved_other = False


def begin_here(env: Environment, trial: Trial) -> None:
    """Begin an episode in the environment as it is."""
    trial.fps = env.fps
    seconds = env.max_seconds if trial.max_seconds is None else trial.max_seconds
    trial.max_seconds = max(1, round(seconds * env.fps)) / env.fps  # whole actions
    if isinstance(env, Chained):
        trial.done, trial.length = 0, env.length
    if trial.patience is not None:
        trial.phase = cast("Demonstrator", env).subtask(), 0


def take(
    env: Environment,
    trial: Trial,
    step: Callable[[], bool],
    clock: Clock,
    chunk: np.ndarray | None = None,
    place: int = 0,
) -> None:
    """One action of an episode, in `place` of its chunk, and how the episode goes then."""
    assert trial.max_seconds is not None
    start = perf_counter()
    trial.success = bool(step())  # a simulator may say it as NumPy does
    clock.steps.append(perf_counter() - start)
    trial.decisions += 1
    if trial.solved_other is not None:
        trial.solved_other = bool(cast("SharedScene", env).solved_other)
    if trial.done is not None:
        trial.done = cast("Chained", env).done
    if not trial.success:
        if trial.solved_other:
            trial.reason = SOLVED_OTHER
        elif env.ended:
            trial.reason = ENDED
        elif trial.decisions >= round(trial.max_seconds * env.fps):
            trial.reason = OUT_OF_TIME
    if trial.record:
        image, caption = _side_by_side(env.observation()), trial.subtask or told(env, trial)
        trial.film.append(FilmFrame(image, caption, chunk, place))


def _side_by_side(frame: Frame) -> np.ndarray:
    """The cameras' images, as high as the highest, u8[H W 3]; black where a policy sees none."""
    images = [Image.fromarray(image.transpose(1, 2, 0)) for image in frame.images.values()]
    images = images or [Image.new("RGB", (64, 64))]
    height = max(image.height for image in images)
    same = [image.resize((round(image.width * height / image.height), height)) for image in images]
    return np.concatenate([np.asarray(image) for image in same], axis=1)


def _film_decision(trial: Trial, frame: Frame, chunk: np.ndarray, number: int, executed: int) -> None:
    """What chunk `number` f32[T A] was decided from."""
    if not trial.record_failure or trial.record:
        return
    if len(trial.film) == MOST_DECISIONS:
        del trial.film[1::2]
        trial.film_every *= 2
    if number == 0:
        trial.film_every = executed
    if number * executed % trial.film_every == 0:
        trial.film.append(FilmFrame(_side_by_side(frame), trial.subtask or frame.task, chunk))


def _end_film(env: Environment, trial: Trial) -> None:
    """Keep the film of a failure, with how it ended, and no other."""
    if trial.success:
        trial.film.clear()
    else:
        trial.film.append(FilmFrame(_side_by_side(env.observation()), trial.subtask or told(env, trial)))


def decide(
    policy: Inference, lanes: Sequence[tuple[Environment, Trial, Motion]], frames: Sequence[Frame], number: int
) -> list[np.ndarray | str]:
    """For every lane chunk `number` f32[T A], or why there is none; frames: what is `seen` in it.

    When a batch fails, each lane is asked for by itself: the others' episodes go on.
    """
    trials = [trial for _, trial, _ in lanes]
    try:
        if due := [place for place, (*_, motion) in enumerate(lanes) if policy.replans(number - motion.begun)]:
            said = policy.predict_subtasks([frames[n] for n in due], _drawn([trials[n] for n in due], number))
            for place, subtask in zip(due, said, strict=True):
                trials[place].subtask = subtask
        noise, subtasks = _noise(trials, number, policy), [trial.subtask for trial in trials]
        chunks = policy.predict_chunks(frames, subtasks, noise, _given(policy, lanes), _drawn(trials, number))
        if len(chunks) != len(lanes):
            raise ValueError(f"{len(chunks)} chunks for {len(lanes)} observations")
    except Exception as error:  # whatever a policy raises is the episode's result, and the run goes on
        if len(lanes) > 1:
            return [decide(policy, [lane], [frame], number)[0] for lane, frame in zip(lanes, frames, strict=True)]
        trials[0].lacked_memory = isinstance(error, MemoryError | torch.OutOfMemoryError | torch.AcceleratorError)
        if isinstance(error, NotFinite):
            return [NOT_FINITE]
        return [f"the policy raised {type(error).__name__}: {error}".split("\n")[0][:_REASON_LENGTH]]
    return [_checked(np.asarray(chunk), env) for chunk, (env, _, _) in zip(chunks, lanes, strict=True)]


def _given(policy: Inference, lanes: Sequence[tuple[Environment, Trial, Motion]]) -> list[np.ndarray] | None:
    """What the next chunks are given, f32[d A] each; None where that is nothing."""
    prefixes = [motion.prefix for *_, motion in lanes]
    if not policy.acting.given or all(prefix is None for prefix in prefixes):
        return None
    nothing = np.zeros((0, policy.action_dim), np.float32)  # in a lane with a new instruction
    return [nothing if prefix is None else prefix for prefix in prefixes]


def _checked(chunk: np.ndarray, env: Environment) -> np.ndarray | str:
    dims = len(env.action_low)
    if chunk.ndim != 2 or not len(chunk) or chunk.shape[1] != dims:
        return f"the policy's chunk has the shape {chunk.shape}, not (steps, {dims})"
    return chunk if np.isfinite(chunk).all() else NOT_FINITE


def _noise(trials: Sequence[Trial], number: int, policy: Inference) -> torch.Tensor:
    """f32[B T D], of each trial's seeds and the chunk's number alone."""
    shape = policy.model.config.horizon, policy.model.config.action_dim
    keys = [[trial.noise_seed, (trial.seed << 12) + number] for trial in trials]
    draws = [np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32) for key in keys]
    return policy.acting.noise_scale * torch.from_numpy(np.stack(draws))


def _drawn(trials: Sequence[Trial], number: int) -> list[torch.Generator]:
    """What each trial's tokens are drawn with at a temperature, of its seeds and the chunk's number alone."""
    seeds = [np.random.SeedSequence([trial.noise_seed, trial.seed, number]) for trial in trials]
    return [torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1)) for seed in seeds]


def _random_action(env: Environment, trial: Trial, rng: np.random.Generator) -> np.ndarray:
    if not np.isfinite([env.action_low, env.action_high]).all():
        raise ValueError(f"the actions of {trial.task} have no bounds to draw from: leave out the mode random")
    return rng.uniform(env.action_low, env.action_high)
