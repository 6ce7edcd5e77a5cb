"""Rounds as commands: what is collected once, what each method trains on, and that it goes on where it was stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pi05_lightning.cli.experience import Rounds, parts, rounds_of, write_results
from pi05_lightning.cli.parts import Part
from pi05_lightning.experience.reading import CLASS_PATH, Reading
from pi05_lightning.experience.rounds import METHODS, Training, configuration
from pi05_lightning.files.local import read_json, write_json

TRAINING = Training(steps=7, batch_size=4, lr=1e-3, demonstrations_share=0.4, omission=0.2)


@pytest.fixture(scope="module")
def policy(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that carries no configuration."""
    from pi05_lightning import Pi05DataModule
    from pi05_lightning.data.sources.lerobot import LeRobotConfig
    from pi05_lightning.models.config import ModelConfig
    from pi05_lightning.models.pi05 import Pi05
    from pi05_lightning.weights.folder import save

    sizes = ModelConfig.preset("debug")
    data = Pi05DataModule({"robot": LeRobotConfig(str(videos))}, shapes=sizes.shapes)
    model = Pi05(sizes)
    model.reset_parameters()
    folder = tmp_path_factory.mktemp("policy")
    save(folder, model, data.processor)
    return folder


@pytest.fixture
def plan(policy: Path, tmp_path: Path) -> Rounds:
    return Rounds(
        tmp_path / "out",
        policy,
        ["demos"],
        2,
        ["--episodes", "3"],
        ["--episodes", "9"],
        TRAINING,
        11,
        0.5,
        (0.3, 0.4),
        None,
        5,
    )


def named(todo: list[Part], name: str) -> tuple[str, ...]:
    (part,) = [part for part in todo if part.name == name]
    return part.command


def option(command: tuple[str, ...], name: str) -> str | None:
    return command[command.index(name) + 1] if name in command else None


def trained(plan: Rounds, method: str, number: int) -> dict:
    return yaml.safe_load((plan.out / method / f"round_{number}" / "experience.yaml").read_text())


def test_attempts_of_the_first_policy_are_made_once_for_all_methods_but_daggers(plan: Rounds) -> None:
    names = [part.name for part in parts(plan, METHODS)]
    assert len(names) == len(set(names))
    assert [name for name in names if "collect" in name] == [
        "collect-1",
        "recap-2-collect",
        "successes-2-collect",
        "dagger-1-collect",
        "dagger-2-collect",
    ]


def test_each_round_acts_with_the_policy_of_the_last_and_begins_with_the_weights_of_the_first(plan: Rounds) -> None:
    todo = parts(plan, ["recap"])
    last = plan.out / "recap" / "round_1" / "fit"
    assert option(named(todo, "collect-1"), "--policy") == str(plan.policy)
    assert option(named(todo, "recap-2-collect"), "--policy") == str(last)
    seeds = {option(named(todo, name), "--seed") for name in ("collect-1", "recap-2-collect")}
    assert seeds == {"5001", "5002"}
    for number in (1, 2):
        assert option(named(todo, f"recap-{number}-value"), "--policy") == str(plan.policy)
        assert trained(plan, "recap", number)["model"]["init_from"] == str(plan.policy)


def test_later_rounds_are_judged_by_bootstrap_on_all_attempts_so_far(plan: Rounds) -> None:
    todo = parts(plan, ["recap"])
    first, second = (named(todo, f"recap-{number}-label") for number in (1, 2))
    both = [str(plan.out / "attempts_1" / "robot"), str(plan.out / "recap" / "attempts_2" / "robot")]
    assert (option(first, "--n_seconds"), option(second, "--n_seconds")) == (None, "0.5")
    assert (option(first, "--positive_share"), option(second, "--positive_share")) == ("0.3", "0.4")
    assert option(second, "--rollouts") == f"[{','.join(both)}]"
    sources = trained(plan, "recap", 2)["data"]["sources"]
    assert sources["demonstrations_0"]["init_args"]["labels"] == "positive"
    for number, name in enumerate(("attempts_1", "attempts_2")):
        labels = plan.out / "recap" / "round_2" / "labels" / f"{name}-robot.labels.parquet"
        for sign in ("positive", "negative"):
            options = sources[f"{sign}_{number}"]["init_args"]
            taken = options["path"], options["labels"], options["frames"], options["val_fraction"]
            assert taken == (both[number], str(labels), sign, 0)


def test_frames_of_either_sign_are_drawn_as_often(plan: Rounds) -> None:
    parts(plan, ["recap"])
    (stage,) = trained(plan, "recap", 2)["stages"]["then"]
    drawn = {name.partition("/")[0]: share for name, share in stage["mixture"].items()}
    signs = dict.fromkeys(["positive_0", "negative_0", "positive_1", "negative_1"], pytest.approx(0.15))
    assert drawn == {"demonstrations_0": 0.4, **signs}


def test_methods_differ_in_what_they_take_of_the_attempts_and_in_nothing_else(plan: Rounds) -> None:
    parts(plan, METHODS)
    found = {method: trained(plan, method, rounds_of(method, 2)) for method in METHODS}
    sources = {method: run["data"]["sources"] for method, run in found.items()}
    assert list(sources["demonstrations"]) == ["demonstrations_0"]
    assert sources["successes"]["successes_0"]["init_args"]["episodes"] == "success"
    assert sources["dagger"]["corrections_0"]["init_args"]["frames"] == "corrections"
    others = [source["init_args"] for method in METHODS if method != "recap" for source in sources[method].values()]
    assert not any("labels" in options for options in others)
    for run in found.values():
        (stage,) = run["stages"]["then"]
        assert stage["steps"] == TRAINING.steps
        assert sum(stage["mixture"].values()) == pytest.approx(1)
    assert found["recap"]["stages"]["then"][0]["mixture"]["demonstrations_0/continuous_robot_actions"] == 0.4


def test_demonstrations_are_trained_on_once_as_no_round_adds_to_them(plan: Rounds) -> None:
    names = [part.name for part in parts(plan, ["demonstrations"])]
    assert names == ["base-rollout", "demonstrations-1-fit", "demonstrations-1-rollout"]


def test_stage_goes_on_with_what_the_policy_was_last_trained_on(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    words = {"class_path": "VisionTextConfig", "init_args": {"path": str(tmp_path / "web")}}
    gone = {"class_path": "VisionTextConfig", "init_args": {"path": str(tmp_path / "gone")}}
    mixture = {"arm/continuous_robot_actions": 0.8, "arm/qa": 0.1, "web/qa": 0.04, "gone/qa": 0.04, "other/qa": 0.02}
    stage = {"losses": {"text": 1.0, "flow": 1.0}, "mixture": mixture, "flow_alpha": 3.0}
    reading = Reading(fast="fast", stage=stage, sources={"web": words, "gone": gone})
    reading.sources["arm"] = reading.source("runs/demo/data/robot", "")
    found = configuration(
        "recap", tmp_path, reading, ["runs/demo/data/../data/robot"], ["tries"], [tmp_path / "labels"], TRAINING
    )
    (made,) = found["stages"]["then"]
    assert (made["losses"], made["flow_alpha"], made["steps"]) == (stage["losses"], 3.0, 7)
    assert made["mixture"] == pytest.approx(
        {
            "arm/continuous_robot_actions": 0.32,
            "positive_0/continuous_robot_actions": 0.24,
            "negative_0/continuous_robot_actions": 0.24,
            "arm/qa": 0.1,
            "web/qa": 0.04,
        }
    )
    assert list(found["data"]["sources"]) == ["arm", "positive_0", "negative_0", "web"]
    assert (found["data"]["sources"]["web"], found["data"]["fast"]) == (words, "fast")


def test_each_dataset_is_read_as_the_policy_read_it_and_attempts_as_the_first(tmp_path: Path) -> None:
    read = {"arm": {"cameras": {"observation.image": "front"}}, "other": {"cameras": {"observation.rgb": "front"}}}
    sources = {
        name: {
            "class_path": CLASS_PATH,
            "init_args": {**options, "path": str(tmp_path / name), "episodes": "length > 9"},
        }
        for name, options in read.items()
    }
    demonstrations = [str(tmp_path / "other"), str(tmp_path / "arm"), str(tmp_path / "new")]
    found = configuration("successes", tmp_path, Reading(sources=sources), demonstrations, ["tries"], [], TRAINING)
    cameras = {name: source["init_args"]["cameras"] for name, source in found["data"]["sources"].items()}
    as_other = read["other"]["cameras"]
    arm = read["arm"]["cameras"]
    assert cameras == {"other": as_other, "arm": arm, "demonstrations_2": as_other, "successes_0": as_other}


def test_rounds_with_other_options_are_refused_in_the_same_directory(plan: Rounds) -> None:
    parts(plan, ["recap"])
    parts(plan, ["recap"])
    file = plan.out / "recap" / "round_1" / "experience.yaml"
    file.write_text(file.read_text().replace("steps: 7", "steps: 8"))
    with pytest.raises(ValueError, match="with other options"):
        parts(plan, ["recap"])


def test_page_shows_what_there_is_so_far(tmp_path: Path) -> None:
    write_results(tmp_path, ["recap"], 2)
    assert not (tmp_path / "index.html").exists()
    for folder, success in (("base", [4, 10]), ("recap/round_1/rollout", [7, 10])):
        write_json(tmp_path / folder / "rollout.json", {"success": {"policy": {"a": success, "b": success}}})
    write_results(tmp_path, ["recap"], 2)
    found = read_json(tmp_path / "results.json")["recap"]
    assert [(rate["successes"], rate["trials"]) for rate in found] == [(8, 20), (14, 20)]
    assert "14/20" in (tmp_path / "index.html").read_text()


@pytest.mark.slow
def test_a_round_from_attempts_to_the_page_and_nothing_is_done_twice(tmp_path: Path) -> None:
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
    subprocess.run(command, check=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.ckpt")}
    assert before
    again = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "done before" in again
    assert "$ pi05" not in again
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {*read_json(tmp_path / "out" / "results.json")} == {"recap", "dagger", "demonstrations"}
