"""A simulated robot at 50 Hz, in real time, whose policy is behind a slow network: what waiting for it costs.

    python -m examples.drive_a_robot runs/mine

A server process serves the policy; 300 ms of latency are added between it and the robot. The robot is MetaWorld's, and
its world does not wait: while there is no command, it stands still, and time goes on. The same held-out episodes are
driven in each mode of the controller (docs/drive-a-robot.md).
"""

from __future__ import annotations

import argparse
import json
import logging
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, get_args

import numpy as np

from examples.slow_network import SlowNetwork
from pi05_lightning.serving.client import Controller, Mode
from pi05_lightning.sim.environment import Environment, View
from pi05_lightning.sim.metaworld.environment import MetaWorld
from pi05_lightning.sim.motion import jumps
from pi05_lightning.sim.sawyer import CONTROL_HZ
from pi05_lightning.weights.locate import locate

RATE = 50  # commands per second
CONNECTING = 180.0  # seconds that a server may take to read a policy


def stand_still(observation: Any, last: np.ndarray | None) -> np.ndarray:
    """The safe action of this robot: the hand moves nowhere, the gripper goes on holding what it holds."""
    return np.array([0.0, 0.0, 0.0, 0.0 if last is None else last[3]], np.float32)


class Robot:
    """An arm that takes `RATE` commands per second, in a world that takes `CONTROL_HZ` steps meanwhile."""

    def __init__(self, env: Environment) -> None:
        self.env = env

    def begin(self, seed: int) -> None:
        self.env.reset(seed)
        self.commands = self.steps = 0
        self.success = False

    @property
    def seconds(self) -> float:
        """Of the world's time."""
        return self.commands / RATE

    def command(self, action: np.ndarray) -> None:
        """Follow an action until the next command is due."""
        self.commands += 1
        while self.steps < self.commands * CONTROL_HZ // RATE and not self.success:
            self.steps += 1
            self.success = self.env.step(action)

    def see(self) -> dict[str, Any]:
        """An observation as openpi's clients send it."""
        frame = self.env.observation()
        images = {f"observation/{name}": image.transpose(1, 2, 0) for name, image in frame.images.items()}
        return {**images, "observation/state": frame.state, "prompt": frame.task}


@dataclass
class Driven:
    """What the episodes of a mode came to. Jumps are those of `pi05 rollout`, between actions that were executed."""

    success: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    """By task."""
    seconds: list[float] = field(default_factory=list)
    """Of the world's time, of those that succeeded."""
    seams: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    commands: int = 0
    still: int = 0
    """Commands at which it stood still for want of an action, once an episode had begun to move."""
    missed: int = 0
    """Commands that came too late, because this machine was too slow."""


def drive(
    robot: Robot, controller: Controller, seed: int, max_seconds: float, driven: Driven, slower: float = 1.0
) -> None:
    """One episode, in real time or so many times slower."""
    robot.begin(seed)
    controller.reset()
    before, last, looking = None, None, 0.0

    def see() -> dict[str, Any]:
        nonlocal looking
        start = perf_counter()
        observation = robot.see()
        looking += perf_counter() - start
        return observation

    due = perf_counter()
    while not robot.success and robot.seconds < max_seconds:
        start, looking = perf_counter(), 0.0
        action = controller.step(see)
        waited = perf_counter() - start - looking  # rendering costs a simulator's time, not a robot's
        without = min(int(waited * RATE / slower), round((max_seconds - robot.seconds) * RATE) - 1)
        for _ in range(without):
            robot.command(stand_still(None, last))
        robot.command(action)
        now = controller.executed
        driven.still += (last is not None) * (without + (now is None))
        if now is not None and now is not before:
            if before is not None:
                jump = jumps(np.stack([before.action, now.action]), robot.env)
                (driven.inside if now.chunk == before.chunk else driven.seams).extend(jump)
            before, last = now, now.action
        due += (1 + without) * slower / RATE
        if (left := due - perf_counter()) > 0:
            sleep(left)
        elif left < -0.5 * slower / RATE:
            driven.missed += 1
            due = perf_counter()
    driven.success[robot.env.sentence].append(robot.success)
    driven.commands += robot.commands
    if robot.success:
        driven.seconds.append(robot.seconds)


@contextmanager
def served(checkpoint: Path, options: list[str]) -> Iterator[int]:
    """The port of a server process."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pi05_lightning", "serve", str(checkpoint), "--port", str(port), *options]
    process = subprocess.Popen(command)
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    processor = locate(arguments.checkpoint).processor()
    trained_on = processor.robots[processor.acting_as(None)]
    simulator, view = MetaWorld(), View(processor.cameras, processor.shapes.image_size, CONTROL_HZ)
    tasks = arguments.tasks or simulator.tasks(trained_on)
    delay = arguments.inference_delay
    options = [
        "--inference_delay",
        str(delay),
        "--execution_horizon",
        str(arguments.execution_horizon or max(1, delay)),
    ]
    if "rtc" not in arguments.modes:
        options += ["--rtc", "false"]
    found: dict[str, Any] = {}
    latency = arguments.latency * arguments.slower
    with served(arguments.checkpoint, options) as port, SlowNetwork(port, latency) as network:
        for mode in arguments.modes:
            driven = Driven()
            with Controller(f"ws://127.0.0.1:{network.port}", stand_still, rate=RATE, mode=mode) as controller:
                controller.connect(CONNECTING)
                for task in tasks:
                    with closing(simulator.open(task, view)) as env:
                        for seed in simulator.seeds(arguments.episodes, arguments.seed):
                            drive(Robot(env), controller, seed, arguments.max_seconds, driven, arguments.slower)
                found[mode] = summary(driven) | {
                    "slower": arguments.slower,
                    "controller": controller.latencies.summary(),
                }
    return found


def summary(driven: Driven) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, float | None]:
        known = bool(values)
        return {
            "mean": float(np.mean(values)) if known else None,
            "p95": float(np.percentile(values, 95)) if known else None,
        }

    seams, inside = spread(driven.seams), spread(driven.inside)
    ratio = {name: seams[name] / inside[name] if seams[name] and inside[name] else None for name in seams}
    return {
        "success": {task: [sum(trials), len(trials)] for task, trials in driven.success.items()},
        "seconds": spread(driven.seconds)["mean"],
        "seams": seams,
        "inside": inside,
        "ratio": ratio,
        "still": driven.still / driven.commands,
        "missed": driven.missed / driven.commands,
    }


def table(found: dict[str, Any]) -> str:
    """In Markdown."""

    def shown(value: float | None, digits: int = 2) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    lines = [
        "| mode | success | seconds until then | stood still | ratio of jumps, mean | 95th percentile | latency, ms |"
        " missed deadlines |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for mode, row in found.items():
        good, trials = np.sum(list(row["success"].values()), axis=0)
        latency = {name: ms / row["slower"] for name, ms in row["controller"]["latency_ms"].items()}
        cells = [
            f"`{mode}`",
            f"{good}/{trials}",
            shown(row["seconds"], 1),
            f"{row['still']:.0%}",
            shown(row["ratio"]["mean"]),
            shown(row["ratio"]["p95"]),
            f"{latency['p50']:.0f}, p95 {latency['p95']:.0f}" if latency else "–",
            f"{row['missed']:.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    modes = get_args(Mode)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a policy for MetaWorld; `rtc` needs model.rtc_max_delay")
    parser.add_argument("--modes", nargs="+", choices=modes, default=list(modes))
    parser.add_argument("--tasks", nargs="+", help="by default those that the policy was trained on")
    parser.add_argument("--episodes", type=int, default=5, help="held-out initial states per task")
    parser.add_argument("--latency", type=float, default=0.3, help="seconds that the network adds to an answer")
    parser.add_argument("--inference_delay", type=int, default=4, help="actions that the server goes on from")
    parser.add_argument("--execution_horizon", type=int, help="actions of a chunk; by default inference_delay")
    parser.add_argument("--max_seconds", type=float, default=10.0, help="after which an episode has failed")
    parser.add_argument("--slower", type=float, default=1.0, help="than real time, network included: for busy machines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments = parse()
    start = perf_counter()
    found = measure(arguments)
    print(table(found))
    print(f"{perf_counter() - start:.0f} s")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
