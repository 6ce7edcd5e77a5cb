"""`pi05 rollout`: closed-loop success, beside baselines in the same initial states."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from pi05_lightning.acting import ROLLOUT, Acting
from pi05_lightning.acting.device import Dtype, check_device, check_dtype
from pi05_lightning.evaluation.report.run import films_of
from pi05_lightning.files.ranges import check_range
from pi05_lightning.policy import Pi05Policy
from pi05_lightning.sim.available_modes import demonstrations_of, modes_of
from pi05_lightning.sim.environment import EnvironmentConfig, check_tasks, tasks_to_run
from pi05_lightning.sim.glimpse import differences
from pi05_lightning.sim.instructions import PARAPHRASES, Instruction, paraphrases_of, swapped_of
from pi05_lightning.sim.measured_rollout import deciding, replace_result, run_all, summary_of
from pi05_lightning.sim.modes import POLICY_MODES, Mode, acting_in
from pi05_lightning.sim.rollout import Plan, Worker, view_of
from pi05_lightning.sim.simulators import MetaWorld
from pi05_lightning.sim.summary import tables
from pi05_lightning.sim.unfinished import Unfinished, versions
from pi05_lightning.weights.locate import home_of, locate, pinned

log = logging.getLogger(__name__)


def rollout(
    checkpoint: Path,
    tasks: list[str] | None = None,
    env: EnvironmentConfig = MetaWorld(),  # noqa: B008 - frozen
    episodes: int = 25,
    modes: tuple[Mode, ...] | None = None,
    out: Path | None = None,
    dataset: str | None = None,
    max_seconds: float | None = None,
    videos: int = 1,
    lanes: int = 8,
    num_workers: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: Dtype | None = None,
    base: str | None = None,
    tokenizer: str | None = None,
    delays: tuple[int, ...] = (),
    instructions: tuple[Instruction, ...] = ("right",),
    swaps: dict[str, str] | None = None,
    paraphrases: Path | None = None,
    **acting: Any,
) -> dict[str, Any]:
    """Run a checkpoint in a simulator, and baselines from the same initial states, and compare.

    Interrupted or killed, the same command goes on with the episodes that were not over.

    Args:
        checkpoint: a .ckpt, a run's directory, an exported folder, LeRobot's or openpi's.
        tasks: the simulator's names of tasks; by default those that it was trained on (MetaWorld, MT50, Desk),
            all of `--env.suites` (Libero), the default of the environment (LeRobotEnv).
        env: the simulator: MetaWorld, MT50, Desk, Libero, LeRobotEnv, or an EnvironmentConfig of your own by its
            import path.
        episodes: initial states per task, the same for every mode.
        modes: policy (as `acting` says), flat (the task alone conditions the actions), fast (actions from
            FAST tokens), rtc and async (with `delays`: real-time chunking, and without it), and the baselines
            mean_replay (mean training trajectory), random (uniform actions), expert (scripted; it sees the goal); by
            default all that policy, simulator and data allow.
        out: folder for results, in place of earlier ones; by default `rollout` in its run, of a Hub id in
            runs/USER--NAME.
        dataset: folder or Hub id of demonstrations, for mean_replay; by default those named in the checkpoint.
        max_seconds: simulated time after which an episode has failed; by default 6 per step of a task, 5 in MT50,
            LeRobot's in others.
        videos: episodes per task and policy mode that are filmed, and beside them one that fails, if any does.
        lanes: episodes that a process steps together.
        num_workers: processes; one per core, or on a GPU one.
        seed: of the initial states and the noise.
        device: where the policy runs; the simulator is on the CPU, but for what it renders.
        dtype: what the weights are cast to; by default they stay as they are. With int8, layers compute in 8 bits on a
            CPU, as far as actions stay what they are.
        base: of a checkpoint of adapters: a path or Hub id of the weights that they stand beside, if they moved.
        tokenizer: of a LeRobot or openpi folder: the local folder of PaliGemma's tokenizer.
        delays: for rtc and async: actions that are executed while a chunk is computed, of [1, 1, 2] one for each chunk;
            by default always `inference_delay`.
        instructions: what the policy is told in each mode: right, swapped (another task's instruction),
            paraphrased (the right one in other words), empty (nothing).
        swaps: by task, the one whose instruction is given as swapped; by default of its scene, among
            `tasks`, or the next.
        paraphrases: a YAML file with a list of other words for each instruction; by default MetaWorld's and the desk's.
        acting: how the policy acts in the mode `policy`, see `Acting`.

    Returns and writes {"success": {mode: {task: [successes, trials]}}, …}, see `sim.summary.summarise`.
    Raises ValueError for tasks, cameras and modes that the simulator does not have.
    """
    check_range("num_workers", num_workers, 1)
    check_told("swaps", swaps, "swapped", instructions)
    check_told("paraphrases", paraphrases, "paraphrased", instructions)
    check_device(device)
    check_dtype(dtype, device)
    env.warm_up()  # what is missing shows before the weights are read
    out = out or home_of(checkpoint) / ROLLOUT.parent
    given, checkpoint = checkpoint, pinned(checkpoint)
    how = Acting(**acting)
    policy = Pi05Policy.from_pretrained(checkpoint, base=base, tokenizer=tokenizer, dtype=dtype, **asdict(how))
    robot = policy.processor.robots[policy.robot]
    tasks = tasks_to_run(env, tasks, robot)
    check_tasks(env, (task for task in tasks if not env.is_chain(task)))
    demonstrations = demonstrations_of(robot, dataset)
    modes = modes_of(policy, env, tasks, modes, delays, demonstrations)
    others = swapped_of(env, tasks, swaps or {}) if "swapped" in instructions else {}
    plan = Plan(env, tasks, modes, episodes, "rollout", videos, lanes, max_seconds, seed, delays, instructions, others)
    heard = [task for known in policy.processor.robots.values() for task in known.tasks]
    words = paraphrases_of(env, tasks, paraphrases or PARAPHRASES, heard) if "paraphrased" in instructions else {}
    actings: dict[Mode, Acting] = {
        mode: policy.acting_as(acting_in(mode, how, delays)).resolved for mode in modes if mode in POLICY_MODES
    }
    for finding in differences(policy, env, tasks):
        log.warning("%s (`pi05 check` tells more)", finding)
    replayed = demonstrations if "mean_replay" in modes else None
    worker = Worker(env, view_of(policy), str(checkpoint), actings, device, replayed, base, words, tokenizer, dtype)
    del policy  # maybe gigabytes: every process loads its own
    if dtype == "int8":
        for way in {(way.actions, way.hierarchical): way for way in actings.values()}.values():
            # which layers compute in 8 bits is measured once for each way of acting, not in every process
            Pi05Policy.from_pretrained(checkpoint, base=base, tokenizer=tokenizer, dtype=dtype, **asdict(way))
    policy_hash = locate(checkpoint).content_hash()
    what, parts = deciding(worker)
    with Unfinished.within(out, {**what, "weights": policy_hash, **versions(env)}, parts) as unfinished:
        results, clocks, filmed = run_all(plan, worker, num_workers, unfinished)
        result = summary_of(results, clocks, plan, worker)
        result |= {"checkpoint": str(given), "sha256": policy_hash, "films": filmed}
        replace_result(out, films_of(out), unfinished.folder, result)
    Console().print(*tables(result))
    return result


def check_told(name: str, given: object, kind: Instruction, instructions: Sequence[Instruction]) -> None:
    """ValueError for an option that is given, and is for a kind of instruction that is not."""
    if given is not None and kind not in instructions:
        raise ValueError(f"{name}: of the instruction {kind} alone: add it to --instructions, or leave {name} out")
