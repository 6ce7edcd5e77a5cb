"""`pi05 demo`: what is done is not done again, what was interrupted goes on, the summary holds what was measured."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pi05_lightning.cli.demo import demo, parts, write_summary
from pi05_lightning.cli.parts import Part, Progress, run_command
from pi05_lightning.files.local import write_json

PART = Part("stats", ("stats", "data"))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "parts" / "stats.json"


def finish(marker: Path, part: Part = PART) -> None:
    with Progress(marker, part).timed():
        pass


def test_part_is_done_once_it_ended_well(marker: Path) -> None:
    finish(marker)
    assert Progress(marker, PART).finished


def test_part_that_failed_is_not_done_but_its_seconds_count(marker: Path) -> None:
    def fail_slowly() -> None:
        with Progress(marker, PART).timed():
            time.sleep(0.11)
            raise SystemExit(1)

    with pytest.raises(SystemExit):
        fail_slowly()
    again = Progress(marker, PART)
    assert not again.finished
    assert again.seconds >= 0.1


def test_part_of_a_demo_with_other_arguments_is_not_taken_for_this_one(marker: Path) -> None:
    finish(marker)
    with pytest.raises(ValueError, match="give another --out"):
        Progress(marker, Part("stats", ("stats", "other")))


def test_part_that_may_replace_what_it_made_is_the_same_one(marker: Path) -> None:
    finish(marker)
    assert Progress(marker, Part("stats", (*PART.command, "--overwrite", "true"))).finished


def test_training_that_was_interrupted_resumes(tmp_path: Path) -> None:
    fit = next(part for part in parts(tmp_path, seed=0, quick=False) if part.name == "fit")
    assert "--ckpt_path" not in fit.next_command
    fit.resume_from.parent.mkdir(parents=True)
    fit.resume_from.touch()
    assert fit.next_command == ("fit", "--ckpt_path", str(tmp_path / "fit"))


def test_seed_changes_the_training_and_not_the_data(tmp_path: Path) -> None:
    commands = [{part.name: part.command for part in parts(tmp_path, seed, quick=False)} for seed in (0, 1)]
    assert {name for name in commands[0] if commands[0][name] != commands[1][name]} == {"fit"}


def test_desk_is_collected_trained_and_rolled_out_under_every_kind_of_instruction(tmp_path: Path) -> None:
    commands = {part.name: part.command for part in parts(tmp_path, 0, quick=False, scene="desk")}
    assert "--env Desk --rephrased_share 0.5 --continued_share 0.5" in " ".join(commands["collect"])
    assert commands["fit"][1:3] == ("-c", "configs/desk.yaml")
    assert "[right,swapped,paraphrased,empty]" in commands["rollout"]
    assert commands.keys() == {part.name for part in parts(tmp_path, 0, quick=False)}


def test_command_that_fails_ends_the_demo_with_its_status() -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(("stats", "--no-such-option"))
    assert stopped.value.code == 2


def test_a_signal_reaches_the_command_and_ends_the_demo_with_its_status() -> None:
    asked = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
    asked.start()
    with pytest.raises(SystemExit) as stopped:
        run_command(("profile", "debug"))
    assert stopped.value.code == 128 + signal.SIGUSR1


def test_what_nohup_ignores_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        lost = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGHUP))
        lost.start()
        run_command(("stats", "--help"))
        lost.join()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_finished_demo_shows_its_result_without_running_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    todo = parts(tmp_path, seed=0, quick=False)
    write_json(tmp_path / "fit" / "metrics.json", {"web/qa": {"exact_match": 0.875}})
    write_json(tmp_path / "fit" / "rollout" / "rollout.json", {"success": {"policy": {"reach-v3": [24, 25]}}})
    for part in todo:
        finish(tmp_path / "parts" / f"{part.name}.json", part)
    write_summary(tmp_path, todo, seed=0)
    demo(tmp_path)
    last = capsys.readouterr().out
    assert all(shown in last for shown in ("0.875", "24/25", str(tmp_path / "index.html"), "tensorboard --logdir"))


def test_summary_holds_seconds_metrics_and_success(tmp_path: Path) -> None:
    todo = parts(tmp_path, seed=0, quick=False)
    measured = {
        "robot/qa": {"samples": 8, "exact_match": 0.5, "box_iou": None},
        "web/qa": {"samples": 24, "exact_match": 1.0},
        "qa": {"samples": 32, "exact_match": 0.875, "box_iou": None},
        "robot/fast_robot_actions": {"samples": 5, "action_mae": 0.25, "action_mae/dim_00": 0.25},
    }
    success = {"policy": {"reach-v3": [24, 25]}}
    write_json(tmp_path / "fit" / "metrics.json", measured)
    write_json(tmp_path / "fit" / "rollout" / "rollout.json", {"success": success})
    finish(tmp_path / "parts" / "collect.json", todo[0])
    write_summary(tmp_path, todo, seed=0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["metrics"] == {
        "qa": {"samples": 32, "exact_match": 0.875},
        "fast_robot_actions": {"samples": 5, "action_mae": 0.25},
    }
    assert summary["success"] == success
    assert list(summary["seconds"]) == ["collect"]


def test_interrupt_reaches_the_command_that_runs(tmp_path: Path) -> None:
    script = (
        f"from pi05_lightning.cli.demo import demo; from pathlib import Path; demo(Path({str(tmp_path)!r}), quick=True)"
    )
    process = subprocess.Popen([sys.executable, "-u", "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "$ pi05 collect" not in process.stdout.readline():
        pass
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=180)
    assert process.returncode != 0
    assert not json.loads((tmp_path / "parts" / "collect.json").read_text())["done"]
