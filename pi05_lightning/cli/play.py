"""`pi05 play`: a web page on which a policy is told what to do in the simulator, and watched."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pi05_lightning.acting import Acting
from pi05_lightning.acting.device import Dtype
from pi05_lightning.files.ranges import check_range
from pi05_lightning.policy import Pi05Policy
from pi05_lightning.serving.access import Access
from pi05_lightning.serving.address import check_address
from pi05_lightning.serving.play import PlayServer
from pi05_lightning.serving.until_signal import serve_until_signal
from pi05_lightning.sim.environment import EnvironmentConfig, check_tasks, tasks_to_run
from pi05_lightning.sim.glimpse import differences
from pi05_lightning.sim.player import Player, Start
from pi05_lightning.sim.session import Session
from pi05_lightning.sim.simulators import MetaWorld

HOST = "127.0.0.1"

log = logging.getLogger(__name__)


def play(
    checkpoint: Path,
    beside: Path | None = None,
    port: int = 8010,
    tasks: list[str] | None = None,
    env: EnvironmentConfig = MetaWorld(),  # noqa: B008 - frozen
    episodes: int = 25,
    max_seconds: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: Dtype | None = None,
    base: str | None = None,
    tokenizer: str | None = None,
    **acting: Any,
) -> None:
    """Open a page on which you tell a checkpoint what to do in a simulator and watch it, until it is interrupted.

    This machine alone can reach the page. Everybody who opens it sees the same robot.

    Args:
        checkpoint: a .ckpt, a run's directory, an exported folder, LeRobot's or openpi's.
        beside: another one, in the same scene side by side; its name may be left out, as in `pi05 play A B`.
        port: 0 takes a free one.
        tasks: the simulator's names of tasks; by default those that it was trained on (MetaWorld, MT50, Desk),
            all of `--env.suites` (Libero), the default of the environment (LeRobotEnv).
        env: the simulator: MetaWorld, MT50, Desk, Libero, LeRobotEnv, or an EnvironmentConfig of your own by its
            import path.
        episodes: initial states per task, numbered from 0: those of `pi05 rollout` with as many episodes.
        max_seconds: simulated time after which an instruction has failed; by default what the simulator says.
        seed: of the initial states and the noise.
        device: where the policies run; the simulator is on the CPU, but for what it renders.
        dtype: what the weights are cast to; by default none. With int8, layers compute in 8 bits where actions allow.
        base: of a checkpoint of adapters: a path or Hub id of the weights that they stand beside, if they moved.
        tokenizer: of a LeRobot or openpi folder: the local folder of PaliGemma's tokenizer.
        acting: how the policies act, see `Acting`.

    Raises ValueError for tasks and cameras that the simulator does not have, and OSError when the port is taken.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    asyncio.run(check_address(HOST, port))  # what is wrong shows before the weights are read
    check_range("episodes", episodes, 1)
    check_range("seed", seed, 0)
    check_range("max_seconds", max_seconds, 0, above=True)
    env.warm_up()
    how = Acting(**acting)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "base": base, "tokenizer": tokenizer}
    names = [str(path) for path in (checkpoint, beside) if path is not None]
    policies = [Pi05Policy.from_pretrained(name, **options, **asdict(how)) for name in names]
    tasks = tasks_to_run(env, tasks, policies[0].processor.robots[policies[0].robot])
    check_tasks(env, tasks)
    start = Start(env, dict.fromkeys(tasks, env.seeds(episodes, seed)), max_seconds, seed)
    for name, policy in zip(names, policies, strict=True):
        for finding in differences(policy, env, tasks):
            log.warning("%s: %s (`pi05 check` tells more)", name, finding)

    def players() -> Sequence[Player]:
        return [Player(name, policy, start) for name, policy in zip(names, policies, strict=True)]

    # no token: only this machine's own pages are let in
    server = PlayServer(lambda changed: Session(players, changed), Access())
    server.session.begin()
    asyncio.run(serve_until_signal(server, HOST, port, drain_timeout=1.0))
