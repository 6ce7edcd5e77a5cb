"""Rounds as commands: what is collected once, in what order, what is refused, and going on where it was stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from pi05_lightning.cli.experience import RoundsPlan, check_plan, experience, listed, parts, rounds_of
from pi05_lightning.cli.parts import Part, Progress
from pi05_lightning.experience.reading import CLASS_PATH, Reading
from pi05_lightning.experience.results import write_results
from pi05_lightning.experience.rounds import METHODS, AttemptSummary, Method
from pi05_lightning.files.local import read_json, write_json
from pi05_lightning.sim.metaworld.mt50 import SENTENCES
from tests.experience.attempts import SUCCESSES, TRAINING


@pytest.fixture
def plan(tmp_path: Path) -> RoundsPlan:
    return RoundsPlan(
        tmp_path / "out",
        tmp_path / "policy",
        ["demos"],
        rounds=2,
        acting={"execution_horizon": 4, "guidance": 1.5},
        attempts={"episodes": 3, "acting": {"noise_scale": 0.5}, "max_seconds": None},
        tests={"episodes": 9, "max_seconds": None},
        simulator={"env": "MetaWorld", "num_workers": None, "lanes": 8},
        training=TRAINING,
        value_steps=11,
        n_seconds=0.5,
        shares=(0.3, 0.4),
        corrections=None,
        seed=5,
    )


@pytest.fixture(autouse=True)
def all_kinds_of_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts are planned here, not made: as if there were corrected ones and others that succeeded."""
    monkeypatch.setattr(AttemptSummary, "read", partial(AttemptSummary, successes=SUCCESSES))


def written(plan: RoundsPlan, methods: Sequence[Method]) -> list[Part]:
    """The parts, once all that they write down is written."""
    todo = parts(plan, Reading(), methods)
    for part in todo:
        if part.before is not None:
            part.before()
    return todo


def named(todo: list[Part], name: str) -> tuple[str, ...]:
    (part,) = [part for part in todo if part.name == name]
    return part.command


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"corrections": 0}, "corrections is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"tests": {"episodes": 9, "max_seconds": 0.0}}, "max_seconds is 0"),
        ({"attempts": {"episodes": 3, "acting": {}, "max_seconds": -1.0}}, "attempt_seconds is -1"),
        ({"simulator": {"env": "MetaWorld", "num_workers": None, "lanes": 0}}, "lanes is 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_the_first_part(
    plan: RoundsPlan, wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check_plan(replace(plan, **wrong), ["recap"])


def option(command: tuple[str, ...], name: str) -> str | None:
    return command[command.index(name) + 1] if name in command else None


def begin(plan: RoundsPlan) -> None:
    """What RECAP's first training has written once it has saved something."""
    write_json(plan.out / "recap" / "round_1" / "fit" / "checkpoints" / "last.ckpt", {})


def trained(plan: RoundsPlan, method: str, number: int) -> dict:
    return yaml.safe_load((plan.out / method / f"round_{number}" / "experience.yaml").read_text())


def test_attempts_of_the_first_policy_are_made_once_for_all_methods_but_daggers(plan: RoundsPlan) -> None:
    names = [part.name for part in parts(plan, Reading(), METHODS)]
    assert len(names) == len(set(names))
    assert [name for name in names if "collect" in name] == [
        "collect-1",
        "recap-2-collect",
        "successes-2-collect",
        "dagger-1-collect",
        "dagger-2-collect",
    ]


def test_attempts_that_are_all_corrected_are_daggers_too(plan: RoundsPlan) -> None:
    corrected = replace(plan, corrections=8)
    todo = parts(corrected, Reading(), ["recap", "dagger"])
    names = [part.name for part in todo if "collect" in part.name]
    assert names == ["collect-1", "recap-2-collect", "dagger-2-collect"]
    assert {option(named(todo, name), "--corrections") for name in names} == {"8"}
    assert option(named(parts(plan, Reading(), ["recap"]), "collect-1"), "--corrections") is None


def test_tasks_of_all_parts_are_those_of_the_first_policy(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one may have been trained on fewer."""
    robots = {"arm": SimpleNamespace(tasks=(SENTENCES["drawer-open-v3"],))}
    processor = SimpleNamespace(robots=robots, acting_as=lambda name: "arm")
    weights = SimpleNamespace(processor=lambda: processor, content_hash=lambda: "of the policy")
    made = list[Part]()
    monkeypatch.setattr(Reading, "of", lambda policy: Reading())
    for name, instead in {
        "locate": lambda policy: weights,
        "check_datasets": lambda *what: None,
        "run_parts": lambda out, todo, after: made.extend(todo),
    }.items():
        monkeypatch.setattr(f"pi05_lightning.cli.experience.{name}", instead)
    experience(
        tmp_path / "out", policy=tmp_path, demonstrations=(str(videos),), methods=("recap", "dagger"), env="MT50"
    )
    simulated = [part.command for part in made if part.command[0] in ("rollout", "collect")]
    assert len(simulated) == 9
    assert {option(command, "--tasks") for command in simulated} == {'["drawer-open-v3"]'}


def test_words_with_commas_and_brackets_stay_whole() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rollouts", type=tuple[str, ...])
    words = ("tries, may/robot", "[old] tries", "büro/🤖", "plain")
    assert parser.parse_args(["--rollouts", listed(words)]).rollouts == words


def test_attempts_that_were_made_before_are_those_of_the_first_round_of_all_methods(plan: RoundsPlan) -> None:
    """As a robot's recordings, or the attempts of another method."""
    plan = replace(plan, made_before=["recorded/monday", "recorded/tuesday"], corrections=8)
    todo = written(plan, METHODS)
    names = [part.name for part in todo if "collect" in part.name]
    assert names == ["recap-2-collect", "successes-2-collect", "dagger-2-collect"]
    assert option(named(todo, "recap-1-value"), "--rollouts") == '["recorded/monday", "recorded/tuesday"]'
    read = {name: source["init_args"] for name, source in trained(plan, "recap", 1)["data"]["sources"].items()}
    assert read["positive_1"]["path"] == "recorded/tuesday"
    labels = plan.out / "recap" / "round_1" / "labels" / "recorded-tuesday.labels.parquet"
    assert read["positive_1"]["labels"] == str(labels)
    taken = [source["init_args"]["path"] for source in trained(plan, "dagger", 2)["data"]["sources"].values()]
    assert taken == ["demos", *plan.made_before, str(plan.out / "dagger" / "attempts_2" / "robot")]


def test_each_round_acts_with_the_policy_of_the_last_and_begins_with_the_weights_of_the_first(plan: RoundsPlan) -> None:
    todo = written(plan, ["recap"])
    last = plan.out / "recap" / "round_1" / "fit"
    assert option(named(todo, "collect-1"), "--policy") == str(plan.policy)
    assert option(named(todo, "recap-2-collect"), "--policy") == str(last)
    seeds = {option(named(todo, name), "--seed") for name in ("collect-1", "recap-2-collect")}
    assert seeds == {"5001", "5002"}
    for number in (1, 2):
        assert option(named(todo, f"recap-{number}-value"), "--policy") == str(plan.policy)
        assert trained(plan, "recap", number)["model"]["init_from"] == str(plan.policy)


def test_only_a_policy_of_advantages_is_led_towards_one(plan: RoundsPlan) -> None:
    todo = parts(plan, Reading(), ["recap", "successes"])
    led = {part.name for part in todo if "guidance" in " ".join(part.command)}
    assert led == {"recap-1-rollout", "recap-2-collect", "recap-2-rollout"}
    assert all("execution_horizon" in " ".join(named(todo, name)) for name in ("base-rollout", "collect-1"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"positive_share": 40}, "positive_share: 40 is no share"),
        ({"demonstrations_share": 1.0}, "demonstrations_share is 1, which leaves nothing"),
        ({"advantage_omission": 30}, "advantage_omission is 30"),
        ({"acting": {"dtype": "int8"}}, "there is no option 'dtype'"),
        ({"acting": {"guidance": 1.5}, "advantage_omission": 0}, "guidance needs samples without an advantage"),
        ({"acting": {"advantage": "postive"}}, "advantage is 'postive'"),
        ({"env": "Libero", "methods": ("recap", "dagger"), "episodes": 5, "test_episodes": 5}, "no scripted expert"),
        ({"env": "{class_path: Libero, init_args: {suites: [libero_goal]}}"}, "Libero has 50 initial states"),
        ({"env": "Nowhere"}, "env: (?s:.*)Nowhere"),
        ({"n_seconds": 0.01}, "0 frames are no time"),
        ({"n_seconds": float("inf")}, "n_seconds"),
        ({"steps": 0}, "steps is 0"),
        ({"value_steps": 0}, "value_steps is 0"),
        ({"lr": -1.0}, "lr is -1"),
        ({"noise_scale": -1.0}, "noise_scale is -1"),
    ],
)
def test_wrong_option_shows_before_anything_runs(
    tmp_path: Path, videos: Path, wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        experience(tmp_path / "out", policy=tmp_path / "none", demonstrations=(str(videos),), **wrong)


def test_attempts_that_do_not_say_how_they_ended_are_refused_before_anything_runs(
    plan: RoundsPlan, tmp_path: Path, videos: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    recorded, policy = (str(videos),), tmp_path / "none"
    with pytest.raises(ValueError, match="nothing says whether episode 0 succeeded"):
        parts(replace(plan, made_before=recorded), Reading(), ["recap"])
    same = (str(videos), str(videos.parent / "." / videos.name))
    with pytest.raises(ValueError, match="is named more than once"):
        experience(tmp_path / "out", policy=policy, demonstrations=(str(pictures),), attempts=same)


def test_later_rounds_are_judged_by_bootstrap_on_all_attempts_so_far(plan: RoundsPlan) -> None:
    todo = written(plan, ["recap"])
    first, second = (named(todo, f"recap-{number}-label") for number in (1, 2))
    both = [str(plan.out / "attempts_1" / "robot"), str(plan.out / "recap" / "attempts_2" / "robot")]
    assert (option(first, "--n_seconds"), option(second, "--n_seconds")) == (None, "0.5")
    assert (option(first, "--positive_share"), option(second, "--positive_share")) == ("0.3", "0.4")
    assert option(second, "--positive_shares") is None
    of_tasks = replace(plan, shares_of_tasks={"open the drawer": 0.2})
    command = named(parts(of_tasks, Reading(), ["recap"]), "recap-1-label")
    assert option(command, "--positive_shares") == '{"open the drawer": 0.2}'
    assert option(second, "--rollouts") == json.dumps(both)
    sources = trained(plan, "recap", 2)["data"]["sources"]
    assert sources["demonstrations_0"]["init_args"]["labels"] == "positive"
    for number, name in enumerate(("attempts_1", "attempts_2")):
        labels = plan.out / "recap" / "round_2" / "labels" / f"{name}-robot.labels.parquet"
        for sign in ("positive", "negative"):
            options = sources[f"{sign}_{number}"]["init_args"]
            taken = options["path"], options["labels"], options["frames"], options["val_fraction"]
            assert taken == (both[number], str(labels), sign, 0)


def test_methods_differ_in_what_they_take_of_the_attempts_and_in_nothing_else(plan: RoundsPlan) -> None:
    written(plan, METHODS)
    found = {method: trained(plan, method, rounds_of(method, 2)) for method in METHODS}
    sources = {method: run["data"]["sources"] for method, run in found.items()}
    assert list(sources["demonstrations"]) == ["demonstrations_0"]
    assert sources["successes"]["successes_0"]["init_args"]["episodes"] == SUCCESSES
    assert sources["dagger"]["corrections_0"]["init_args"]["frames"] == "corrections"
    others = [source["init_args"] for method in METHODS if method != "recap" for source in sources[method].values()]
    assert not any("labels" in options for options in others)
    for run in found.values():
        (stage,) = run["stages"]["then"]
        assert stage["steps"] == TRAINING.steps
        assert sum(stage["mixture"].values()) == pytest.approx(1)
    assert found["recap"]["stages"]["then"][0]["mixture"]["demonstrations_0/continuous_robot_actions"] == 0.4


def test_demonstrations_are_trained_on_once_as_no_round_adds_to_them(plan: RoundsPlan) -> None:
    names = [part.name for part in parts(plan, Reading(), ["demonstrations"])]
    assert names == ["base-rollout", "demonstrations-1-fit", "demonstrations-1-rollout"]


def test_rounds_with_other_options_are_refused_in_the_same_directory(plan: RoundsPlan) -> None:
    written(plan, ["recap"])
    written(plan, ["recap"])
    file = plan.out / "recap" / "round_1" / "experience.yaml"
    begin(plan)
    file.write_text(file.read_text().replace("steps: 7", "steps: 8"))
    with pytest.raises(ValueError, match="with other options"):
        parts(plan, Reading(), ["recap"])


def test_data_that_is_not_there_where_a_round_goes_on_is_named(plan: RoundsPlan, tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    words = {"class_path": "VisionTextConfig", "init_args": {"path": str(tmp_path / "web")}}
    stage = {"losses": {"text": 1.0, "flow": 1.0}, "mixture": {"arm/continuous_robot_actions": 0.8, "web/qa": 0.2}}
    reading = Reading(stage=stage, sources={"web": words})
    for part in parts(plan, reading, ["demonstrations"]):
        if part.before is not None:
            part.before()
    write_json(plan.out / "demonstrations" / "round_1" / "fit" / "checkpoints" / "last.ckpt", {})
    parts(plan, reading, ["demonstrations"])
    (tmp_path / "web").rmdir()
    with pytest.raises(ValueError, match=r"begun with the source web, and .*web is not there now"):
        parts(plan, reading, ["demonstrations"])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"training": replace(TRAINING, steps=8)}, r"plan\.yaml was written with other options"),
        ({"demonstrations": ["others"]}, r"plan\.yaml was written with other options"),
        ({"sha256": "of others"}, "policy has other weights than those that the rounds in .*out began with"),
    ],
)
def test_methods_of_one_page_have_the_same_options_and_begin_with_the_same_weights(
    plan: RoundsPlan, other: dict[str, Any], said: str
) -> None:
    written(plan, ["recap"])
    begin(plan)
    written(replace(plan, rounds=3, device="cuda"), ["successes"])
    with pytest.raises(ValueError, match=said):
        parts(replace(plan, **other), Reading(), ["successes"])


def test_a_part_that_is_done_is_the_same_on_another_device(tmp_path: Path) -> None:
    def part(*flags: str) -> Part:
        return Part("base-rollout", ("rollout", "policy", "--episodes", "5", *flags, "--out", "base"))

    with Progress(tmp_path / "part.json", part("--num_workers", "2", "--lanes", "8", "--device", "cpu")).timed():
        pass
    assert Progress(tmp_path / "part.json", part("--device", "cuda")).finished
    with pytest.raises(ValueError, match=r"give another --out(.*)it is enough to delete this file"):
        Progress(tmp_path / "part.json", part("--videos", "0"))


def test_what_failed_may_be_tried_with_other_options(plan: RoundsPlan) -> None:
    """As where memory is too small for the first step, before which a run writes its configuration."""
    written(plan, ["recap"])
    write_json(plan.out / "recap" / "round_1" / "fit" / "config.yaml", {})
    written(replace(plan, training=replace(TRAINING, batch_size=2)), ["recap"])
    assert trained(plan, "recap", 1)["data"]["batch_size"] == 2


def test_value_is_fitted_on_the_robot_that_acts(plan: RoundsPlan, tmp_path: Path) -> None:
    sources = {
        name: {"class_path": CLASS_PATH, "init_args": {"path": str(tmp_path / name), "same_robot_as": same}}
        for name, same in (("arm", None), ("more", "arm"), ("hand", None))
    }
    paths = {name: str(tmp_path / name) for name in (*sources, "unknown")}
    named_all = replace(plan, demonstrations=list(paths.values()))
    for robot, own in ((None, ["arm", "more", "unknown"]), ("more", ["arm", "more", "unknown"]), ("hand", ["hand"])):
        todo = parts(replace(named_all, robot=robot), Reading(sources=sources), ["recap"])
        assert option(named(todo, "recap-1-value"), "--demonstrations") == json.dumps([paths[name] for name in own])
    with pytest.raises(ValueError, match="robot 'leg'"):
        parts(replace(named_all, robot="leg"), Reading(sources=sources), ["recap"])


def test_value_is_not_told_that_recordings_of_which_corrections_alone_count_succeeded(plan: RoundsPlan) -> None:
    paths = {"demos": {"path": "demos"}, "driven": {"path": "driven", "frames": "corrections"}}
    reading = Reading(sources={name: {"class_path": CLASS_PATH, "init_args": read} for name, read in paths.items()})
    todo = parts(replace(plan, demonstrations=["demos", "driven"]), reading, ["recap"])
    assert option(named(todo, "recap-1-value"), "--demonstrations") == '["demos"]'


def test_states_of_libero_that_would_be_tried_and_tested_are_refused(tmp_path: Path) -> None:
    options = {"policy": tmp_path, "demonstrations": ("demos",), "env": "Libero", "episodes": 25}
    with pytest.raises(ValueError, match="25 episodes and 26 test_episodes would meet"):
        experience(tmp_path / "out", test_episodes=26, **options)


def test_page_shows_what_there_is_so_far(tmp_path: Path) -> None:
    write_results(tmp_path)
    assert not (tmp_path / "index.html").exists()
    for folder, success, speed in (("base", [4, 10], {}), ("recap/round_1/rollout", [7, 10], {"policy": 23.5})):
        content = {"success": {"policy": {"a": success, "b": success}}, "per_minute": speed}
        write_json(tmp_path / folder / "rollout.json", content)
    write_results(tmp_path)
    results = read_json(tmp_path / "results.json")
    assert list(results) == ["recap"]
    found = results["recap"]
    assert [(rate["successes"], rate["trials"]) for rate in found] == [(8, 20), (14, 20)]
    assert [rate["per_minute"] for rate in found] == [None, 23.5]
    page = (tmp_path / "index.html").read_text()
    assert "14/20" in page
    assert "23.5" in page


@pytest.mark.parametrize(("base", "later", "known"), [(True, True, True), (True, False, False), (None, True, False)])
def test_states_are_said_to_be_new_where_all_rollouts_say_so(
    base: bool | None, later: bool, known: bool, tmp_path: Path
) -> None:
    for folder, held_out in (("base", base), ("recap/round_1/rollout", later)):
        said = {} if held_out is None else {"held_out": held_out}
        write_json(tmp_path / folder / "rollout.json", {"success": {"policy": {"a": [4, 10]}}, **said})
    write_results(tmp_path)
    assert ("that nobody was trained on" in (tmp_path / "index.html").read_text()) is known


@pytest.mark.slow
def test_a_round_that_is_stopped_goes_on_to_the_page_and_nothing_is_done_twice(tmp_path: Path) -> None:
    demo = [sys.executable, "-m", "pi05_lightning"]
    base = tmp_path / "demo"
    subprocess.run([*demo, "demo", "--out", str(base), "--quick", "true"], check=True)
    small = ["--rounds", "1", "--tasks", "[drawer-open-v3]", "--episodes", "3", "--test_episodes", "1", "--steps", "2"]
    small += ["--value_steps", "3", "--batch_size", "4", "--max_seconds", "2", "--corrections", "3"]
    command = [*demo, "experience", str(tmp_path / "out"), "--policy", str(base / "fit")]
    command += [
        "--demonstrations",
        f"[{base / 'data' / 'robot'}]",
        "--methods",
        "[recap,dagger,demonstrations]",
        *small,
    ]
    with subprocess.Popen(command) as stopped:
        while not (tmp_path / "out" / "parts" / "collect-1.json").exists():
            assert stopped.poll() is None
            sleep(0.2)
        stopped.send_signal(signal.SIGTERM)
    assert stopped.returncode
    assert not (tmp_path / "out" / "recap" / "round_1" / "rollout").exists()
    subprocess.run(command, check=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.ckpt")}
    assert before
    again = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "done before" in again
    assert "$ pi05" not in again
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {*read_json(tmp_path / "out" / "results.json")} == {"recap", "dagger", "demonstrations"}
