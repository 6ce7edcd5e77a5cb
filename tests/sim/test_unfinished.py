"""A rollout whose simulating process is killed: the same command goes on with what was not over."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from pi05_lightning.cli.rollout import replace_result, rollout
from pi05_lightning.sim.rollout import Job
from pi05_lightning.sim.trials import Clock, Trial, run_policy
from pi05_lightning.sim.unfinished import Films, Unfinished
from tests.sim.walk import Stub, Walk, chunk

OPTIONS = {"episodes": 3, "modes": ("flat",), "lanes": 1, "videos": 3, "max_seconds": 2.0, "num_workers": 1}
FIRST = Path(".unfinished") / "job-0.json"


def kill_after(first: Path) -> None:
    """Kill the process that simulates once the first episode is over."""
    end = time.monotonic() + 120
    while not first.is_file():
        assert time.monotonic() < end
        time.sleep(0.002)
    for process in multiprocessing.active_children():
        process.kill()


@pytest.mark.slow
def test_killed_rollout_goes_on_with_the_episodes_that_were_not_over(untrained: Path, tmp_path: Path) -> None:
    killer = threading.Thread(target=kill_after, args=(tmp_path / FIRST,), daemon=True)
    killer.start()
    with pytest.raises(ChildProcessError):
        rollout(untrained, ["reach-v3"], out=tmp_path, **OPTIONS)
    killer.join()
    kept = json.loads((tmp_path / FIRST).read_text())
    assert not kept["trials"][0]["success"]
    kept["trials"][0]["success"] = True  # to see that it is read, and not run again
    (tmp_path / FIRST).write_text(json.dumps(kept))
    found = rollout(untrained, ["reach-v3"], out=tmp_path, **OPTIONS)
    assert found["success"]["flat"] == {"reach-v3": [1, 3]}
    films = {f"flat-reach-v3-{2000000 + episode}" for episode in range(3)}
    names = {f"{film}.{ending}" for film in films for ending in ("mp4", "png")}
    assert {file.name for file in tmp_path.iterdir()} == {"rollout.json", *names}


def interrupted(out: Path, seed: int, jobs: list[Job], *, keep: bool) -> dict[int, Films]:
    """What had been kept of a rollout that keeps its first job, or none, and is interrupted."""
    with Unfinished.within(out, {"seed": seed}) as unfinished:
        found = unfinished.complete(jobs)
        if keep:
            unfinished.keep(0, jobs[0], {})
        raise Interrupted(found)


class Interrupted(KeyboardInterrupt):
    """Says what had been kept."""


@pytest.mark.parametrize(("seed", "kept"), [(0, {0: {}}), (1, {})])
def test_only_what_was_kept_of_the_same_rollout_is_taken(seed: int, kept: dict[int, Films], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        interrupted(tmp_path, 0, [Job((Trial("policy", "reach-v3", 1, success=True),))], keep=True)
    job = Job((Trial("policy", "reach-v3", 1),))
    with pytest.raises(Interrupted) as ended:
        interrupted(tmp_path, seed, [job], keep=False)
    assert ended.value.args == (kept,)
    assert job.trials[0].success == bool(kept)


class SaysItAsNumPy(Walk):
    """A simulator whose success is NumPy's."""

    def step(self, action: np.ndarray) -> bool:
        return cast("bool", np.bool_(super().step(action)))


def test_success_as_numpy_says_it_is_kept(tmp_path: Path) -> None:
    trial = Trial("policy", "walk", 0)
    run_policy(Stub(lambda seed: chunk(0.5)), [(SaysItAsNumPy(), trial)], Clock())
    assert trial.success
    with Unfinished.within(tmp_path, {}) as unfinished:
        unfinished.keep(0, Job((trial,)), {})
        again = Job((Trial("policy", "walk", 0),))
        assert unfinished.complete([again]) == {0: {}}
    assert again.trials[0] == trial


def test_films_that_were_moved_before_an_interruption_are_not_missed(tmp_path: Path) -> None:
    result = {"films": {"one.mp4": {}, "two.mp4": {}}}
    unfinished = tmp_path / ".unfinished"
    unfinished.mkdir()
    for folder, name in ((tmp_path, "one"), (unfinished, "two")):
        (folder / f"{name}.mp4").touch()
        (folder / f"{name}.png").touch()
    replace_result(tmp_path, (), unfinished, result)
    assert {file.name for file in tmp_path.glob("*.*")} >= {"one.mp4", "one.png", "two.mp4", "two.png", "rollout.json"}


def test_two_rollouts_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with (
        Unfinished.within(tmp_path, {"seed": 0}),
        pytest.raises(ValueError, match=r"another rollout writes to .*give another --out"),
        Unfinished.within(tmp_path, {"seed": 0}),
    ):
        pass
