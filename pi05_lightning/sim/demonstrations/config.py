"""What `pi05 collect` makes: demonstrations of experts, or episodes of a policy."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pi05_lightning.files.ranges import check_range, check_unique
from pi05_lightning.sim.environment import DemonstratorConfig, EnvironmentConfig, View
from pi05_lightning.sim.simulators import Desk, MetaWorld

OF_POLICIES = {"acting", "corrections", "max_seconds", "lanes", "device"}
OF_EXPERTS = {
    *(
        "scenes",
        "noise_share",
        "slip_share",
        "rephrased_share",
        "continued_share",
        "action_repeat",
        "cameras",
        "image_size",
    ),
    *("answers_every", "max_frames"),
}
FINGERS = 3
"""The dim of an action that closes them, see `DemonstratorConfig`."""


@dataclass(frozen=True)
class CollectConfig:
    """Demonstrations of a simulator's scripted experts, or a policy's own episodes, as a LeRobot v3 dataset."""

    out: Path
    """New directory for the demonstrations (`robot`, LeRobot v3) and the single frames (`web`)."""
    tasks: tuple[str, ...] | None = None
    """The simulator's tasks by name; by default four of MetaWorld's, or all of MT50 or the desk; of a policy those
    that it was trained on."""
    env: EnvironmentConfig = MetaWorld()  # noqa: RUF009 - frozen
    """The simulator: MetaWorld, MT50, Desk, or a DemonstratorConfig of your own by its import path; for a policy
    any."""
    policy: Path | None = None
    """A checkpoint whose policy acts instead of the expert, as far as it gets, with what it was trained to see: its
    failures are recorded as well as its successes. It begins where no demonstration does."""
    acting: dict[str, Any] = field(default_factory=dict)
    """How the policy acts, as `{noise_scale: 1.0}`: options of `pi05 rollout`."""
    corrections: int | None = None
    """Actions of the policy without progress, which is that the expert would do something else, after which the expert
    takes over until the end. What it does is marked in the column `intervention`."""
    max_seconds: float | None = None
    """Simulated time after which a policy's episode has failed; by default what the simulator says."""
    lanes: int = 8
    """Episodes of a policy that a process steps together."""
    device: str = "cpu"
    """Where a policy runs."""
    episodes: int = 300
    """Training episodes per task, each from an initial state of its own."""
    val_episodes: int = 10
    """Validation episodes per task; the last episodes of the dataset."""
    scenes: int = 250
    """Initial states per task for the single frames, four of each, and a tenth more for validation; 0 for none."""
    seed: int = 0
    """Decides every initial state, push and scene; other seeds share none of them."""
    noise_share: float = 0.5
    """Share of the episodes in which the arm is pushed off its way; the actions stay the expert's."""
    slip_share: float = 0.0
    """Share of the episodes in which the fingers at times open while the expert closes them, so that what they hold
    falls. Most experts take it again; the actions stay the expert's."""
    rephrased_share: float = 0.0
    """Share of the episodes whose instruction is in other words, which the desk has; those of `pi05 rollout` are not
    among them."""
    continued_share: float = 0.0
    """Share of the episodes and scenes that begin where the experts of other tasks have just ended, which the desk
    allows."""
    action_repeat: int = 8
    """Control steps (of MetaWorld 1/80 s) that an action lasts: frames per second are their rate / action_repeat."""
    cameras: tuple[str, ...] | None = None
    """The simulator's cameras to film with; by default one of the scene and one on the wrist."""
    image_size: int = 64
    """Height and width of the images in pixels."""
    answers_every: int = 2
    """Frames from one with questions and boxes to the next."""
    max_frames: int | None = None
    """Frames after which an unsolved episode is given up and replaced by the next initial state; by default those of
    six seconds."""
    num_workers: int | None = None
    """Processes; by default one per core, and where a policy is on another `device` one, as each has a policy there.
    Changes nothing but the time."""
    overwrite: bool = False
    """Replace `out` when it exists."""

    def __post_init__(self) -> None:
        given = {option.name for option in fields(self) if getattr(self, option.name) != default_of(option)}
        if self.policy is None:
            if of_policies := sorted(given & OF_POLICIES):
                raise ValueError(f"{', '.join(of_policies)}: of a policy's own episodes alone: give --policy")
            self._check_demonstrations()
        else:
            if of_experts := sorted(given & OF_EXPERTS):
                raise ValueError(
                    f"{', '.join(of_experts)}: of experts' demonstrations alone: leave out with --policy, which sees"
                    " what it was trained on"
                )
            check_range("lanes", self.lanes, 1)
            check_range("max_seconds", self.max_seconds, 0, above=True)
        if self.corrections is not None:
            check_range("corrections", self.corrections, 1)
            if not self.env.has_expert:
                raise ValueError(f"corrections: {type(self.env).__name__} has no scripted expert who could take over")
        check_range("episodes", self.episodes, 1)
        check_range("val_episodes", self.val_episodes, 0)
        check_range("scenes", self.scenes, 0)
        check_range("seed", self.seed, 0)
        check_unique("tasks", self.tasks or ())
        check_range("num_workers", self.num_workers, 1)

    def _check_demonstrations(self) -> None:
        rate = self.expert_env.control_hz
        if self.action_repeat < 1 or rate % self.action_repeat:
            divisors = ", ".join(str(steps) for steps in range(1, rate + 1) if rate % steps == 0)
            raise ValueError(f"action_repeat: {self.action_repeat} does not divide {rate} Hz; use one of {divisors}")
        check_range("answers_every", self.answers_every, 1)
        for name in ("noise_share", "slip_share", "rephrased_share", "continued_share"):
            check_range(name, getattr(self, name), 0, 1)
        if self.slip_share and len(names := self.expert_env.action_names) <= FINGERS:
            raise ValueError(
                f"slip_share: the {len(names)} dims of an action ({', '.join(names)}) close no fingers, as a fourth"
                " does: leave it 0"
            )
        if self.continued_share and isinstance(self.env, Desk) and self.env.same_states:
            raise ValueError(
                "continued_share: where others have ended differs between tasks: leave it 0 with --env.same_states true"
            )
        if self.image_size % 2:
            raise ValueError(f"image_size: {self.image_size} is odd, and video needs an even number of pixels")

    @property
    def expert_env(self) -> DemonstratorConfig:
        """The simulator, whose experts are recorded. Raises ValueError where it has none."""
        if not isinstance(self.env, DemonstratorConfig):
            raise ValueError(f"env: {type(self.env).__name__} has no experts to record: give a --policy")
        return self.env

    @property
    def fps(self) -> int:
        """Frames, and actions, per second."""
        return self.expert_env.control_hz // self.action_repeat

    @property
    def most_frames(self) -> int:
        """Of an episode that is not solved."""
        return 6 * self.fps if self.max_frames is None else self.max_frames

    @property
    def recorded(self) -> tuple[str, ...]:
        """The tasks."""
        return self.expert_env.demonstrated if self.tasks is None else self.tasks

    @property
    def spelled_out(self) -> CollectConfig:
        """The same demonstrations, with what the defaults come to."""
        return replace(self, tasks=self.recorded, cameras=self.view.cameras, max_frames=self.most_frames)

    @property
    def view(self) -> View:
        """What is seen of them."""
        return View(self.expert_env.cameras if self.cameras is None else self.cameras, self.image_size, self.fps)


@dataclass(frozen=True)
class Piece:
    """Work for one process: `count` episodes or scenes of a split of a task, from the `first` on."""

    config: CollectConfig
    task: str
    split: str
    first: int
    count: int


def default_of(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()
