"""Simulated episodes: the scripted expert from one initial state, its pushes, its words; made in blocks by any process.

A block is a pure function of the configuration, the task, the split and its place in it, so the number of
processes decides nothing but the time. Only MuJoCo and the video encoder are imported here: workers start quickly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pi05_lightning.sim.demonstrations import questions
from pi05_lightning.sim.demonstrations.beginning import begin
from pi05_lightning.sim.demonstrations.config import FINGERS, CollectConfig, Piece
from pi05_lightning.sim.encoding import SETTINGS, encode_video
from pi05_lightning.sim.environment import Demonstrator, act_as_expert
from pi05_lightning.sim.splits import SLIPS, WORDS, rng_of, split_seeds
from pi05_lightning.types import Answer, Frame

ATTEMPTS = 4  # initial states at hand for each episode that is wanted; the experts solve nearly all
TAIL_FRAMES = 2  # kept after success
PUSH_STEPS = 5  # control steps that a push lasts at most (6 cm): a policy that saw the way back finds it
PUSH_CHANCE = 0.3  # of a push after a frame
SLIP_STEPS = (6, 12)  # control steps that the fingers open for: enough to let go of a thing
SLIP_CHANCE = 0.15  # of a slip after a frame in which the expert closes them
STATS_STRIDE = 4  # every fourth pixel is plenty for the statistics of an image


@dataclass(frozen=True)
class Episode:
    """What happened, one entry per frame.

    state f32[N S], where there is one;  action f32[N A];  images: {camera: uint8[N h w 3]};  subtasks: the expert's
    phase, or what the policy said;  answers: on the frame.  Of a policy's episodes, intervention bool[N]: whether the
    expert acted;  outcome: how it went and ended, columns of meta/episodes.
    """

    task: str
    state: np.ndarray | None
    action: np.ndarray
    images: dict[str, np.ndarray]
    subtasks: Sequence[str | None]
    answers: Sequence[tuple[Answer, ...]]
    intervention: np.ndarray | None = None
    outcome: Mapping[str, Any] = field(default_factory=dict)

    @property
    def thin(self) -> Episode:
        """The same with images of every `STATS_STRIDE`-th pixel only."""
        every = slice(None, None, STATS_STRIDE)
        return replace(self, images={camera: film[:, every, every] for camera, film in self.images.items()})


@dataclass(frozen=True)
class Block(Piece):
    """Episodes that are filmed together; `videos` says where each camera's film goes."""

    videos: Mapping[str, Path]


def record_block(spec: Block) -> tuple[list[Episode], int]:
    """Make a block, encode its films, and return the thin episodes, and how many the expert failed meanwhile.

    Raises ValueError when the expert solves too few of the initial states.
    """
    config = spec.config
    seeds = split_seeds(spec.split, spec.count * ATTEMPTS, config.seed, start=spec.first * ATTEMPTS)
    episodes: list[Episode] = []
    failed = 0
    with closing(config.expert_env.open(spec.task, config.view)) as env:
        for seed in seeds:
            episode = record_episode(env, seed, config)
            if episode is None:
                failed += 1
            else:
                episodes.append(episode)
            if len(episodes) == spec.count:
                break
        else:
            raise ValueError(
                f"the expert of {spec.task} solved {len(episodes)} of {len(seeds)} initial states and {spec.count} "
                "episodes are wanted: leave the task out, give it more max_frames, or lower noise_share"
            )
    return filmed(episodes, spec.videos, config.fps), failed


def filmed(episodes: Sequence[Episode], videos: Mapping[str, Path], fps: int) -> list[Episode]:
    """Encode the episodes' images, one film per camera, and return the thin episodes."""
    for camera, path in videos.items():
        images = np.concatenate([episode.images[camera] for episode in episodes])
        encode_video(path, images, fps, **SETTINGS, threads=1)
    return [episode.thin for episode in episodes]


def record_episode(env: Demonstrator, seed: int, config: CollectConfig) -> Episode | None:
    """The expert from initial state `seed` until `TAIL_FRAMES` after success, or None where it does not succeed.

    A frame's action is the mean of what the expert does until the next one, see `act_as_expert`. Pushes happen between
    frames and are not recorded, so every action is a clean label.
    """
    rng = rng_of(env.task, seed)
    push_chance = PUSH_CHANCE if rng.random() < config.noise_share else 0.0
    slips = rng_of(env.task, seed, SLIPS)
    slip_chance = SLIP_CHANCE if slips.random() < config.slip_share else 0.0
    begin(env, seed, config.continued_share)
    said = _said(env, config.rephrased_share, seed)
    _check_names(env, "state_names", config.expert_env.state_names, len(env.state))
    frames: list[Frame] = []
    actions, subtasks, answers = [], [], []
    solved, end = False, config.most_frames
    while len(frames) < end:
        asked = len(frames) % config.answers_every == 0
        answers.append(questions.answers(env, env.boxes(), said) if asked else ())
        subtasks.append(env.subtask())
        frames.append(env.observation())
        taken = list[np.ndarray]()
        succeeded = act_as_expert(env, taken)
        actions.append(np.mean(taken, 0, dtype=np.float32))
        _check_names(env, "action_names", config.expert_env.action_names, len(taken[0]))
        if succeeded and not solved:
            solved, end = True, len(frames) + TAIL_FRAMES
        if not solved and rng.random() < push_chance:
            push = np.append(rng.uniform(-1.0, 1.0, 3), taken[-1][3:])
            for _ in range(rng.integers(1, PUSH_STEPS + 1)):
                env.control_step(push)
        if not solved and slip_chance and taken[-1][FINGERS] > 0 and slips.random() < slip_chance:
            for _ in range(slips.integers(*SLIP_STEPS, endpoint=True)):
                slip = env.expert_action().copy()
                slip[FINGERS] = -1.0
                env.control_step(slip)
    if not solved:
        return None
    state, images = stacked(frames, env.cameras)
    return Episode(said, state, np.stack(actions), images, subtasks, answers)


def stacked(frames: Sequence[Frame], cameras: Sequence[str]) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
    """State and images of an episode's frames, as `Episode` has them."""
    states = [frame.state for frame in frames if frame.state is not None]
    images = {name: np.stack([frame.images[name].transpose(1, 2, 0) for frame in frames]) for name in cameras}
    return np.stack(states) if states else None, images


def _check_names(env: Demonstrator, what: str, names: Sequence[str], dims: int) -> None:
    if len(names) != dims:
        raise ValueError(
            f"{type(env).__name__}: {what} names {len(names)} dims ({', '.join(names)}), and there are {dims}: set it"
            " in the simulator's configuration"
        )


def _said(env: Demonstrator, rephrased_share: float, seed: int) -> str:
    """The instruction, or the same in other words."""
    rng = rng_of(env.task, seed, WORDS)
    if rephrased_share and not env.other_sentences:
        raise ValueError(f"rephrased_share: {env.task} has no other words: leave it 0, or leave the task out")
    return str(rng.choice(env.other_sentences)) if rng.random() < rephrased_share else env.sentence
