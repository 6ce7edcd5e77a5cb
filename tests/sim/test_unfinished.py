"""A rollout whose simulating process is killed: the same command goes on with what was not over."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from pi05_lightning.acting import Acting
from pi05_lightning.cli.rollout import rollout
from pi05_lightning.sim.environment import View
from pi05_lightning.sim.measured_rollout import deciding, replace_result
from pi05_lightning.sim.modes import Mode
from pi05_lightning.sim.rollout import Done, Worker
from pi05_lightning.sim.simulators import MetaWorld
from pi05_lightning.sim.trials import Clock, Result, Trial
from pi05_lightning.sim.unfinished import Results, Unfinished, key_of, versions
from tests.sim.walk import Stub, Walk, chunk, result_of

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
    (result,) = kept["results"].values()
    assert not result["success"]
    result["success"] = True  # to see that it is read, and not run again
    (tmp_path / FIRST).write_text(json.dumps(kept))
    found = rollout(untrained, ["reach-v3"], out=tmp_path, **OPTIONS | {"lanes": 2})  # as is advised for want of memory
    assert found["success"]["flat"] == {"reach-v3": [1, 3]}
    films = {f"flat-reach-v3-{2000000 + episode}" for episode in range(3)}
    names = {f"{film}.{ending}" for film in films for ending in ("mp4", "png")}
    assert {file.name for file in tmp_path.iterdir()} == {"rollout.json", *names}


def what_is_kept(out: Path, what: dict[str, int], jobs: Sequence[Done] = ()) -> Results:
    """Of a rollout that was interrupted before, and is now once more after these jobs."""
    found = Results()
    with suppress(KeyboardInterrupt), Unfinished.within(out, what, {}) as unfinished:
        for results, _, _ in unfinished.jobs():
            found |= results
        for done in jobs:
            unfinished.keep(done, {})
        raise KeyboardInterrupt
    return found


@pytest.mark.parametrize(("seed", "kept"), [(0, True), (1, False)])
def test_only_what_was_kept_of_the_same_rollout_is_taken(seed: int, kept: bool, tmp_path: Path) -> None:
    over = Done([Result(Trial("policy", "reach-v3", 1), success=True)], Clock())
    assert not what_is_kept(tmp_path, {"seed": 0}, [over])
    found = what_is_kept(tmp_path, {"seed": seed})
    assert [values["success"] for values in found.values()] == [True] * kept
    assert (key_of(Trial("policy", "reach-v3", 1)) in found) == kept
    assert key_of(Trial("policy", "reach-v3", 1, max_seconds=3.0)) not in found


@pytest.mark.parametrize(
    ("modes", "steps", "kept"), [(["policy"], 10, True), (["policy", "flat"], 10, True), (["policy"], 5, False)]
)
def test_episodes_of_a_mode_are_kept_whatever_other_modes_there_are(
    modes: list[Mode], steps: int, kept: bool, tmp_path: Path
) -> None:
    spelled = iter(["policy.ckpt", f"{Path.cwd()}/policy.ckpt", "./policy.ckpt", "policy.ckpt"])

    def begun(modes: list[Mode], steps: int) -> AbstractContextManager[Unfinished]:
        actings = {mode: Acting(num_steps=steps, hierarchical=mode == "policy") for mode in modes}
        return Unfinished.within(tmp_path, *deciding(Worker(MetaWorld(), View((), 64, 10.0), next(spelled), actings)))

    with suppress(KeyboardInterrupt), begun(["policy", "rtc"], 10) as unfinished:
        unfinished.keep(Done([Result(Trial("policy", "reach-v3", 1), success=True)], Clock()), {})
        raise KeyboardInterrupt
    for _ in range(2):  # what a start in between said is not forgotten
        with suppress(KeyboardInterrupt), begun(modes, steps) as unfinished:
            assert len(list(unfinished.jobs())) == kept
            raise KeyboardInterrupt
    with begun(["rtc"], 20) as unfinished:
        assert not list(unfinished.jobs())


class SaysItAsNumPy(Walk):
    """A simulator whose success is NumPy's."""

    def step(self, action: np.ndarray) -> bool:
        return cast("bool", np.bool_(super().step(action)))


def test_success_as_numpy_says_it_is_kept(tmp_path: Path) -> None:
    trial = Trial("policy", "walk", 0)
    result = result_of(Stub(lambda seed: chunk(0.5)), SaysItAsNumPy(), trial)
    assert result.success
    with Unfinished.within(tmp_path, {}, {}) as unfinished:
        unfinished.keep(Done([result], Clock()), {})
        ((kept, _, _),) = unfinished.jobs()
    assert Result(trial, **kept[key_of(trial)]) == result


def test_a_simulator_of_ones_own_is_another_one_once_a_file_beside_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("base", "own"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "world.py").write_text("LIMIT = 1\n")
    begin = "from pi05_lightning.sim.simulators import MetaWorld\nclass Base(MetaWorld): ...\n"
    (tmp_path / "base" / "config.py").write_text(begin)
    (tmp_path / "own" / "config.py").write_text("from base.config import Base\nclass My(Base): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    env = importlib.import_module("own.config").My()
    found = [versions(env)]
    for folder in ("base", "own"):
        (tmp_path / folder / "world.py").write_text("LIMIT = 2\n")
        found.append(versions(env))
    assert len({each["code"] for each in found}) == 3
    assert versions(env) == found[-1]


def test_another_version_of_a_simulator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = versions(MetaWorld())
    assert "mujoco " in before["simulators"]
    monkeypatch.setattr(
        "pi05_lightning.sim.unfinished.version", lambda name: "other" if name == "mujoco" else version(name)
    )
    now = versions(MetaWorld())
    assert {name for name in now if now[name] != before[name]} == {"simulators"}


def test_films_that_were_moved_before_an_interruption_are_not_missed(tmp_path: Path) -> None:
    result = {"films": {"one.mp4": {}, "two.mp4": {}}}
    unfinished = tmp_path / ".unfinished"
    unfinished.mkdir()
    for folder, name in ((tmp_path, "one"), (unfinished, "two")):
        (folder / f"{name}.mp4").touch()
        (folder / f"{name}.png").touch()
    replace_result(tmp_path, (), unfinished, result)
    assert {file.name for file in tmp_path.glob("*.*")} >= {"one.mp4", "one.png", "two.mp4", "two.png", "rollout.json"}


def test_films_stay_when_the_result_was_written_before_an_interruption(tmp_path: Path) -> None:
    result = {"films": {"one.mp4": {}}}
    unfinished = tmp_path / ".unfinished"
    unfinished.mkdir()
    for name in ("one.mp4", "one.png"):
        (unfinished / name).write_text("new")
        (tmp_path / name).write_text("of the rollout before")
    for _ in range(2):  # the second time as after a kill between the result and the emptying of the folder
        replace_result(tmp_path, [tmp_path / "one.mp4"], unfinished, result)
        assert [(tmp_path / name).read_text() for name in ("one.mp4", "one.png")] == ["new", "new"]


def test_two_rollouts_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with (
        Unfinished.within(tmp_path, {"seed": 0}, {}),
        pytest.raises(ValueError, match=r"another rollout writes to .*give another --out"),
        Unfinished.within(tmp_path, {"seed": 0}, {}),
    ):
        pass
