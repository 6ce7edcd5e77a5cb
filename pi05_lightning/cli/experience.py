"""`pi05 experience`: rounds of attempts, labels, training and evaluation, as the commands that a user would type."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from pi05_lightning.acting.options import Acting
from pi05_lightning.cli.parts import Part, console, run_parts
from pi05_lightning.cli.value_label import frames_ahead
from pi05_lightning.data.find_dataset import find_dataset
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.experience.labelling import check_shares, labels_path, labels_paths
from pi05_lightning.experience.reading import Reading
from pi05_lightning.experience.results import write_results
from pi05_lightning.experience.rounds import (
    AttemptSummary,
    Method,
    Training,
    check_datasets,
    configuration,
)
from pi05_lightning.experience.value import datasets_of
from pi05_lightning.files.local import check_writable, write_once, write_text
from pi05_lightning.files.ranges import check_range
from pi05_lightning.sim.environment import EnvironmentConfig, tasks_to_run
from pi05_lightning.sim.simulators import MetaWorld  # noqa: F401 - what --env knows by name
from pi05_lightning.training.run_directory import has_checkpoints
from pi05_lightning.weights.locate import locate

ROUND_CONFIG = "experience.yaml"  # of a round: what its policy was trained on
HASH = "policy.sha256"  # of the weights that every round begins with
PLAN = "plan.yaml"  # of all rounds: the options that methods which are compared have in common
_OF_ADVANTAGES = {"advantage", "guidance"}  # options of acting
PATIENCE = 15  # actions without progress after which DAgger's expert takes over, where nothing else is said


def experience(
    out: Path,
    *,
    policy: Path,
    demonstrations: tuple[str, ...],
    methods: tuple[Method, ...] = ("recap",),
    rounds: int = 2,
    env: str = "MetaWorld",
    tasks: tuple[str, ...] | None = None,
    episodes: int = 25,
    test_episodes: int = 50,
    noise_scale: float = 0.5,
    acting: dict[str, Any] | None = None,
    corrections: int | None = None,
    attempts: tuple[str, ...] = (),
    steps: int = 800,
    batch_size: int = 32,
    lr: float | None = None,
    demonstrations_share: float = 0.5,
    value_steps: int = 400,
    n_seconds: float = 1.0,
    first_positive_share: float = 0.3,
    positive_share: float = 0.4,
    positive_shares: dict[str, float] | None = None,
    advantage_omission: float = 0.3,
    attempt_seconds: float | None = None,
    max_seconds: float | None = None,
    num_workers: int | None = None,
    lanes: int = 8,
    robot: str | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Let a policy learn from its own attempts, in rounds, each from the weights it began with, on all data so far.

    A round of `recap`: the policy tries (collect), a value is fitted (value fit), the attempts are labelled (value
    label), a policy is trained on them (fit) and tried on other initial states (rollout). Interrupted and started again
    it goes on with the first part that is not done.

    Args:
        out: the directory of everything that is made.
        policy: checkpoint that every round begins with.
        demonstrations: LeRobot datasets that it was trained on.
        methods: recap, and what to compare it with: successes (of its attempts alone), dagger (the expert's
            corrections alone), demonstrations (more steps on these).
        rounds: how often; demonstrations once, as no round adds to them.
        env: the simulator, as `pi05 collect` takes it.
        tasks: its tasks; by default those that the policy was trained on.
        episodes: attempts per task and round.
        test_episodes: initial states per task that each round's policy is tried on; no attempt begins there.
        noise_scale: of the noise with which attempts are made, see `Acting`; 0 makes the same attempt each time, and 1,
            as trained, may fail much oftener than the policy does.
        acting: how policies act in attempts and where they are tried, as `{execution_horizon: 8}`: options of
            `Acting`. Those about advantages are for recap's policies alone.
        corrections: actions without progress after which the expert takes over in attempts; in dagger's always.
        attempts: LeRobot datasets of attempts that were made before: the first round of all methods learns from them,
            and makes none.
        steps: optimizer steps of a round's policy.
        batch_size: frames of a step on each device.
        lr: learning rate; by default that which the policy was trained with, and at most 1e-3.
        demonstrations_share: of the draws; attempts share the rest.
        value_steps: optimizer steps of a round's value.
        n_seconds: from the second round on, time after which the value stands for the rest of an episode.
        first_positive_share: of the frames in the first round.
        positive_share: of the frames in later rounds.
        positive_shares: others in all rounds, by the task's instruction, as `{open the drawer: 0.2}`.
        advantage_omission: share of the samples that leave out the advantage.
        attempt_seconds: simulated time after which an attempt has failed; by default max_seconds. A policy that has
            missed seldom recovers, so the double of what demonstrations take saves time.
        max_seconds: simulated time after which a tried policy has failed; by default what the simulator says.
        num_workers: processes that simulate; by default one per core, and with another `device` than the CPU one.
        lanes: episodes that a process steps together; fewer need less memory.
        robot: data source whose robot it acts as; needed where it was trained on several.
        device: where policies and values act; training takes what the policy's took.
        seed: of attempts and training; every seed is tried on the same initial states.

    Writes `out`/index.html and results.json: success over the rounds of every method.
    Raises ValueError when `out` holds rounds with other arguments, where attempts and tests would begin in the same
    states of LIBERO's, and where a method finds nothing to learn from; SystemExit with a part's status when one fails.
    """
    check_writable(out, "out")
    simulator = {"env": env, "device": device, "num_workers": num_workers, "lanes": lanes}
    collecting = {
        "episodes": episodes,
        "val_episodes": 0,
        "acting": {"noise_scale": noise_scale},
        "max_seconds": max_seconds if attempt_seconds is None else attempt_seconds,
    }
    plan = RoundsPlan(
        out,
        policy,
        demonstrations,
        rounds,
        acting={**(acting or {}), **({"robot": robot} if robot else {})},
        attempts=collecting | simulator,
        tests={"modes": "[policy]", "videos": 0, "episodes": test_episodes, "max_seconds": max_seconds},
        simulator=simulator,
        training=Training(steps, batch_size, lr, demonstrations_share, advantage_omission),
        value_steps=value_steps,
        n_seconds=n_seconds,
        shares=(first_positive_share, positive_share),
        shares_of_tasks=positive_shares or {},
        corrections=corrections,
        made_before=[str(find_dataset(path).absolute()) for path in attempts],
        seed=seed,
        robot=robot,
        device=device,
    )
    check_plan(plan, methods)
    weights, reading = locate(policy), Reading.of(policy)
    processor = weights.processor()
    check_datasets(policy, reading, processor, demonstrations, plan.made_before, robot)
    # policies of the rounds may have been trained on fewer, in another order
    ran = tasks_to_run(simulator_of(env), tasks, processor.robots[processor.acting_as(robot)])
    told = {"tasks": listed(ran)}
    plan = replace(
        plan, sha256=weights.content_hash(), attempts={**plan.attempts, **told}, simulator={**plan.simulator, **told}
    )
    run_parts(out, parts(plan, reading, methods), lambda: write_results(out))
    console.print(f"page {out / 'index.html'}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class RoundsPlan:
    """What `parts` are made of, beside the methods; see `experience`.

    acting: how policies act.  attempts, tests: options of `pi05 collect` and of `pi05 rollout`, which also takes
    `simulator`.  made_before: attempts of the first round, where it makes none.  shares: of positive frames in the
    first round, and in later ones.  sha256: of the policy's weights.
    """

    out: Path
    policy: Path
    demonstrations: Sequence[str]
    rounds: int
    acting: Mapping[str, Any]
    attempts: Mapping[str, Any]
    tests: Mapping[str, Any]
    simulator: Mapping[str, Any]
    training: Training
    value_steps: int
    n_seconds: float
    shares: tuple[float, float]
    corrections: int | None
    seed: int
    made_before: Sequence[str] = ()
    robot: str | None = None
    device: str = "cpu"
    shares_of_tasks: Mapping[str, float] = field(default_factory=dict)
    sha256: str = ""

    @property
    def common(self) -> str:
        """YAML of what every method has, and every start of the same rounds."""
        options = asdict(self)
        for name in ("out", "rounds", "device", "sha256"):
            del options[name]
        options["policy"] = str(self.policy)
        for name in ("attempts", "simulator"):
            options[name] = {k: v for k, v in options[name].items() if k not in ("num_workers", "lanes", "device")}
        return yaml.safe_dump(json.loads(json.dumps(options)))

    @property
    def is_begun(self) -> bool:
        """Whether some method's training has saved anything."""
        return any(map(has_checkpoints, self.out.glob("*/round_*/fit")))

    def acting_of(self, knows_advantage: bool) -> dict[str, Any]:
        """How a policy acts, without what only one is told that was trained on advantages."""
        return {name: value for name, value in self.acting.items() if knows_advantage or name not in _OF_ADVANTAGES}

    def collect(
        self, name: str, acting: Path, to: Path, number: int, patience: int | None, knows_advantage: bool
    ) -> Part:
        """Attempts of a round's policy."""
        how = json.dumps(self.attempts["acting"] | self.acting_of(knows_advantage))
        corrected = () if patience is None else ("--corrections", str(patience))
        own = ("--seed", str(1000 * self.seed + number), *corrected, "--overwrite", "true")
        return Part(name, ("collect", str(to), "--policy", str(acting), *flags({**self.attempts, "acting": how}), *own))

    def test(self, name: str, acting: Path, to: Path, knows_advantage: bool) -> Part:
        """Success of a policy."""
        how = {option: "null" if value is None else value for option, value in self.acting_of(knows_advantage).items()}
        options = flags({**self.tests, **how, **self.simulator})
        return Part(name, ("rollout", str(acting), *options, "--out", str(to)))

    def judge(
        self, name: str, folder: Path, demonstrations: Sequence[str], attempts: Sequence[str], number: int
    ) -> list[Part]:
        """A value of all attempts so far, and their labels by it."""
        value, tried = folder / "value", ("--rollouts", listed(attempts))
        known = ("--demonstrations", listed(demonstrations), "--steps", str(self.value_steps))
        begun = ("--policy", str(self.policy), "--seed", str(self.seed))
        ahead = () if number == 1 else ("--n_seconds", str(self.n_seconds))
        device = ("--device", self.device)
        marks = ("--positive_share", str(self.shares[min(number, 2) - 1]), *ahead, "--out", str(folder / "labels"))
        of_tasks = (
            ("--positive_shares", json.dumps(dict(self.shares_of_tasks), ensure_ascii=False))
            if self.shares_of_tasks
            else ()
        )
        return [
            Part(f"{name}-value", ("value", "fit", str(value), *begun, *tried, *known, *device)),
            Part(f"{name}-label", ("value", "label", str(value), *tried, *marks, *of_tasks, *device)),
        ]

    def fit(self, name: str, folder: Path, write: Callable[[], None]) -> Part:
        """A round's policy.  write: its experience.yaml, once its attempts are there."""
        run, config = folder / "fit", folder / ROUND_CONFIG
        begin = ("fit", "-c", str(config), "--run", str(run), "--seed_everything", str(self.seed))
        return Part(f"{name}-fit", begin, ("fit", "--ckpt_path", str(run)), run / "checkpoints" / "last.ckpt", write)


def check_plan(plan: RoundsPlan, methods: Sequence[Method]) -> None:
    """ValueError for options that would show as wrong when hours have been spent."""
    counts: dict[str, int | None] = {
        "rounds": plan.rounds,
        "steps": plan.training.steps,
        "batch_size": plan.training.batch_size,
        "value_steps": plan.value_steps,
        "episodes": plan.attempts["episodes"],
        "test_episodes": plan.tests["episodes"],
        "corrections": plan.corrections,
        "num_workers": plan.simulator["num_workers"],
        "lanes": plan.simulator["lanes"],
    }
    for name, number in counts.items():
        check_range(name, number, 1)
    times = {"attempt_seconds": plan.attempts["max_seconds"], "max_seconds": plan.tests["max_seconds"]}
    for name, value in ({"lr": plan.training.lr} | times).items():
        check_range(name, value, 0, above=True)
    check_range("seed", plan.seed, 0)
    if not methods:
        raise ValueError("methods: name at least one")
    if not plan.demonstrations:
        raise ValueError("demonstrations: name at least one dataset")
    check_range("demonstrations_share", plan.training.demonstrations_share, 0, 1)
    if plan.training.demonstrations_share == 1:
        raise ValueError("demonstrations_share is 1, which leaves nothing to the attempts: give less")
    check_range("advantage_omission", plan.training.omission, 0, 1)
    if (
        Acting.of(plan.attempts["acting"] | plan.acting).guidance != 1
        and "recap" in methods
        and not plan.training.omission
    ):
        raise ValueError("acting: guidance needs samples without an advantage: give an advantage_omission above 0")
    for share in plan.shares:
        check_shares(share, plan.shares_of_tasks)
    simulated = simulator_of(plan.simulator["env"])
    if plan.rounds > 1 or not plan.made_before:
        if (plan.corrections or "dagger" in methods) and not simulated.has_expert:
            raise ValueError(
                f"env: {type(simulated).__name__} has no scripted expert for `corrections`, and for dagger"
            )
        states = plan.attempts["episodes"], plan.tests["episodes"]
        if simulated.num_states is not None and sum(states) > simulated.num_states:
            raise ValueError(
                f"{type(simulated).__name__} has {simulated.num_states} initial states of a task: {states[0]} episodes"
                f" and {states[1]} test_episodes would meet, so give fewer"
            )
    check_range("n_seconds", plan.n_seconds, 0, above=True)
    frames_ahead(None, plan.n_seconds, LeRobotFiles.open(find_dataset(plan.demonstrations[0])).fps)
    if plan.made_before:
        datasets_of(plan.made_before, plan.demonstrations[:1])
        later = [plan.out / "recap" / f"attempts_{number}" / "robot" for number in range(2, plan.rounds + 1)]
        labels_paths([*map(Path, plan.made_before), *later], plan.out)


def simulator_of(env: str) -> EnvironmentConfig:
    """The simulator that `pi05 collect` and `pi05 rollout` will have. ValueError where there is none of that name."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--env", type=EnvironmentConfig)
    try:
        found: EnvironmentConfig = parser.instantiate(parser.parse_args([f"--env={env}"])).env
    except ArgumentError as error:
        raise ValueError(f"env: {error}") from error
    return found


def listed(words: Sequence[str]) -> str:
    return json.dumps(list(words), ensure_ascii=False)


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options as they are typed; what is None is left to its default."""
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


def parts(plan: RoundsPlan, reading: Reading, methods: Sequence[Method]) -> list[Part]:
    """All commands, in order.

    ValueError where a training was begun with other options than these give it, or with other weights.
    """
    out = plan.out
    check_weights(plan)
    if plan.is_begun and (out / PLAN).is_file():
        write_once(out / PLAN, plan.common)
    todo = [plan.test("base-rollout", plan.policy, out / "base", knows_advantage=False)]
    # what holds corrections alone is no demonstration to the value, which sees all frames
    of_the_robot = [d for d in reading.of_one_robot(plan.demonstrations, plan.robot) if not reading.frames_of(d)]
    known = {path: AttemptSummary.read(path) for path in plan.made_before}
    for method in methods:
        acting, attempts, is_told = plan.policy, list(plan.made_before), method == "recap"
        for number in range(1, rounds_of(method, plan.rounds) + 1):
            name, folder = f"{method}-{number}", out / method / f"round_{number}"
            if method != "demonstrations" and not (number == 1 and plan.made_before):
                patience = (plan.corrections or PATIENCE) if method == "dagger" else plan.corrections
                shared = number == 1 and patience == plan.corrections  # of the policy that all begin with
                data = out / "attempts_1" if shared else out / method / f"attempts_{number}"
                called = "collect-1" if shared else f"{name}-collect"
                part = plan.collect(called, acting, data, number, patience, is_told and number > 1)
                todo += [] if part in todo else [part]
                attempts.append(str(data / "robot"))
            if method == "recap":
                todo += plan.judge(name, folder, of_the_robot, attempts, number)
            # what is wrong with the options shows before hours are spent
            planned(plan, reading, method, [known.get(path, AttemptSummary(path)) for path in attempts])
            write = partial(write_configuration, plan, reading, method, folder, tuple(attempts))
            if has_checkpoints(folder / "fit"):
                write()
            test = plan.test(f"{name}-rollout", folder / "fit", folder / "rollout", is_told)
            todo += [plan.fit(name, folder, write), test]
            acting = folder / "fit"
    return todo


def check_weights(plan: RoundsPlan) -> None:
    """Note the policy's weights, with which the rounds begin. ValueError where they began with others."""
    file = plan.out / HASH
    if file.is_file() and file.read_text(encoding="utf-8").strip() != plan.sha256:
        raise ValueError(
            f"{plan.policy} has other weights than those that the rounds in {plan.out} began with ({file}): give these,"
            " or another directory"
        )
    write_text(file, f"{plan.sha256}\n")


def write_configuration(
    plan: RoundsPlan, reading: Reading, method: Method, folder: Path, attempts: Sequence[str]
) -> None:
    """What a round's training takes of the attempts that were made.

    ValueError where it takes other things than when it was begun, or what it took is not there, or there is nothing for
    the method to learn from.
    """
    labels = {path: labels_path(Path(path), folder / "labels") for path in attempts}
    summaries = [AttemptSummary.read(path, labels[path] if method == "recap" else None) for path in attempts]
    (write_once if plan.is_begun else write_text)(plan.out / PLAN, plan.common)
    config, file = planned(plan, reading, method, summaries), folder / ROUND_CONFIG
    begun = has_checkpoints(folder / "fit")
    if begun and file.is_file():
        sources = yaml.safe_load(file.read_text(encoding="utf-8"))["data"]["sources"]
        for name in sources.keys() - config["data"]["sources"].keys():
            path = sources[name].get("init_args", {}).get("path", ".")
            if not Path(path).expanduser().exists():
                raise ValueError(f"{file} was begun with the source {name}, and {path} is not there now: bring it back")
    (write_once if begun else write_text)(file, yaml.safe_dump(config, sort_keys=False))


def planned(plan: RoundsPlan, reading: Reading, method: Method, summaries: Sequence[AttemptSummary]) -> dict[str, Any]:
    return configuration(method, plan.policy, reading, plan.demonstrations, summaries, plan.training, plan.robot)


def rounds_of(method: Method, rounds: int) -> int:
    """How many differ: demonstrations stay the same."""
    return 1 if method == "demonstrations" else rounds
