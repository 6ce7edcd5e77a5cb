"""`make experiment`: what is done is not done again, and the tables hold what the runs measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pi05_lightning.cli.main import main
from tools import experiment, experiment_recipes, experiment_results
from tools.experiment_recipes import DESK, METAWORLD, RECIPES, Recipe, recipe_of


def write_run(run: Path, policy: int, flat: int, error: float, seconds: float) -> None:
    """A run of one task with ten trials per mode."""
    success = {mode: {"reach-v3": [count, 10]} for mode, count in (("policy", policy), ("flat", flat))}
    files = {
        "rollout/rollout.json": {"success": success | {"mean_replay": {"reach-v3": [3, 10]}}},
        "metrics.json": {"robot/continuous_robot_actions": {"action_mae": error, "samples": 4}},
        "parts/fit.json": {"cpu_seconds": seconds, "done": True},
    }
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(json.dumps(content))


@pytest.fixture
def gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an experiment with two seeds that ran and one that is not done."""
    monkeypatch.setattr(experiment_recipes, "EXPERIMENTS", tmp_path / "experiments")
    folder = tmp_path / "experiments" / "002_other"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# 002\n\n<!-- TABLES -->\n\nold\n\n<!-- /TABLES -->\n\n## Verdict\n")
    write_run(tmp_path / "runs" / "002_other" / "seed0", policy=8, flat=6, error=0.1, seconds=100)
    write_run(tmp_path / "runs" / "002_other" / "seed1", policy=10, flat=6, error=0.3, seconds=104)
    (tmp_path / "runs" / "002_other" / "seed2").mkdir()
    experiment_results.gather("002_other", tmp_path / "runs")
    return folder


def test_results_hold_every_seed_that_was_rolled_out(gathered: Path) -> None:
    results = json.loads((gathered / "results.json").read_text())
    assert list(results) == ["0", "1"]
    assert results["1"]["rollout"]["success"]["policy"] == {"reach-v3": [10, 10]}
    assert results["1"]["validation"] == {"action_mae": 0.3}


def test_seeds_are_in_the_order_of_numbers_and_a_renamed_one_does_not_count(gathered: Path, tmp_path: Path) -> None:
    for name in ("seed10", "seed2", "seed0_old"):
        write_run(tmp_path / "runs" / "002_other" / name, policy=0, flat=6, error=0.1, seconds=100)
    experiment_results.gather("002_other", tmp_path / "runs")
    assert list(json.loads((gathered / "results.json").read_text())) == ["0", "1", "2", "10"]


def test_table_has_mean_and_standard_deviation_over_seeds(gathered: Path) -> None:
    arms = {"002_other": json.loads((gathered / "results.json").read_text())}
    mean = experiment_results.seed_table(arms, METAWORLD).splitlines()[-1]
    # 0.8 and 1.0: mean 0.9, deviation √(2 · 0.1²); 0.1 and 0.3 the same around 0.2; 100 and 104: 102, √8
    assert mean.split(" | ")[2:] == [
        "**0.900 ± 0.141**",
        "**0.600 ± 0.000**",
        "**0.200 ± 0.141**",
        "**–**",
        "**102 ± 3** |",
    ]


def test_table_of_tasks_adds_up_the_seeds(gathered: Path) -> None:
    arms = {"002_other": json.loads((gathered / "results.json").read_text())}
    assert experiment_results.task_table(arms, METAWORLD).splitlines()[-1] == "| reach-v3 | 18/20 | 12/20 | 6/20 |"


def test_a_recipe_shows_the_means_of_all_that_differ_from_it(gathered: Path, tmp_path: Path) -> None:
    for name in ("012_whole", "012a_without", "012b_not_run"):
        (gathered.parent / name).mkdir()
        (gathered.parent / name / "README.md").write_text("<!-- TABLES -->\n<!-- /TABLES -->\n")
    whole = replace(METAWORLD, name="012_whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment_recipes, "RECIPES", (METAWORLD, whole))
        for name, policy in {"012a_without": 5, "012_whole": 9}.items():
            write_run(tmp_path / "runs" / name / "seed0", policy=policy, flat=6, error=0.1, seconds=100)
            experiment_results.gather(name, tmp_path / "runs")
    rows = [line.split(" | ")[:3] for line in (gathered.parent / "012_whole" / "README.md").read_text().splitlines()]
    assert ["| 012 whole", "1", "0.900"] in rows
    assert ["| 012a without", "1", "0.500"] in rows
    assert "012b" not in (gathered.parent / "012_whole" / "README.md").read_text()


def test_a_mean_of_fewer_seeds_than_there_are_says_so(gathered: Path) -> None:
    results = json.loads((gathered / "results.json").read_text())
    results["1"]["validation"] = {}
    row = experiment_results.mean_table({"002_other": results}, METAWORLD).splitlines()[-1].split(" | ")
    assert row[:5] == ["| 002 other", "2", "0.900 ± 0.141", "0.600 ± 0.000", "0.100 (n = 1)"]


def test_tables_replace_those_in_the_readme(gathered: Path) -> None:
    text = (gathered / "README.md").read_text()
    assert "| reach-v3 | 18/20 |" in text
    assert "old" not in text
    assert text.startswith("# 002\n")
    assert text.endswith("<!-- /TABLES -->\n\n## Verdict\n")


def test_plot_is_a_picture(gathered: Path) -> None:
    assert (gathered / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_part_that_is_done_is_not_run_again(tmp_path: Path) -> None:
    script, marker = tmp_path / "append.py", tmp_path / "parts" / "fit.json"
    script.write_text(f"open({str(tmp_path / 'log')!r}, 'a').write('ran ')")
    for _ in range(2):
        experiment.run_part(marker, (str(script),), {"made_by": "a"})
    assert (tmp_path / "log").read_text() == "ran "


def test_cpu_seconds_of_a_part_are_those_of_its_process(tmp_path: Path) -> None:
    script, marker = tmp_path / "busy.py", tmp_path / "parts" / "fit.json"
    script.write_text("import time\ntime.sleep(1)\nwhile time.process_time() < 0.5: pass")
    experiment.run_part(marker, (str(script),), {"made_by": "a"})
    assert 0.5 <= json.loads(marker.read_text())["cpu_seconds"] < 0.9


def test_part_that_failed_is_run_again_and_its_cpu_seconds_count(tmp_path: Path) -> None:
    script, marker = tmp_path / "fail.py", tmp_path / "parts" / "fit.json"
    script.write_text("import time\nwhile time.process_time() < 0.2: pass\nraise SystemExit(1)")
    for _ in range(2):
        with pytest.raises(SystemExit):
            experiment.run_part(marker, (str(script),), {"made_by": "a"})
    state = json.loads(marker.read_text())
    assert not state["done"]
    assert state["cpu_seconds"] >= 0.4


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What ran an experiment whose parts say what they were given; a demo's data beside it, as empty folders."""
    monkeypatch.setattr(experiment, "EXPERIMENTS", tmp_path / "experiments")
    monkeypatch.setattr(experiment_recipes, "EXPERIMENTS", tmp_path / "experiments")
    folder = tmp_path / "experiments" / "002_other"
    folder.mkdir(parents=True)
    (folder / "README.md").touch()
    (folder / "config.yaml").write_text("a: 1\n")
    (tmp_path / "demo" / "data" / "robot").mkdir(parents=True)
    for base in METAWORLD.base:
        (tmp_path / base).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / base).touch()
    (tmp_path / "ran").touch()
    monkeypatch.setattr(experiment, "gather", lambda name, out: None)
    monkeypatch.setattr(experiment, "LeRobotFiles", SimpleNamespace(open=Path.iterdir))
    monkeypatch.setattr(experiment, "fingerprint", lambda files: str([file.name for file in files]))
    monkeypatch.setattr(experiment, "run_command", lambda command: (tmp_path / "ran").open("a").write(f"{command[0]} "))
    return tmp_path


def test_an_edited_experiment_does_not_keep_the_numbers_of_before(made: Path) -> None:
    options = ("002_other", (0,), made / "demo", made / "runs")
    for _ in range(2):
        experiment.experiment(*options)
    assert (made / "ran").read_text().count("fit") == 1
    (made / "experiments" / "002_other" / "config.yaml").write_text("a: 2\n")
    for seeds in ((0,), (1,)):  # tables are of all seeds that are there
        with pytest.raises(SystemExit, match=r"fit.json is of another command or configuration.*delete .*seed0"):
            experiment.experiment("002_other", seeds, *options[2:])
    assert (made / "ran").read_text().count("fit") == 1


@pytest.mark.parametrize("other", ["data/robot/frame", "fast/tokens"])
def test_seeds_of_other_data_are_not_mixed_and_those_that_do_not_say_go_on(made: Path, other: str) -> None:
    (made / "demo" / "fast").mkdir()
    options = ("002_other", made / "demo", made / "runs")
    experiment.experiment(options[0], (0,), *options[1:])
    (made / "demo" / other).touch()
    with pytest.raises(SystemExit, match=r"\.json is of other data or another tokenizer than today's"):
        experiment.experiment(options[0], (1,), *options[1:])
    for marker in (made / "runs" / "002_other" / "seed0" / "parts").iterdir():
        kept = json.loads(marker.read_text())
        del kept["data"]  # as it was written before
        marker.write_text(json.dumps(kept))
    experiment.experiment(options[0], (1,), *options[1:])
    assert (made / "ran").read_text().count("fit") == 2


def test_a_training_that_was_killed_does_not_go_on_with_what_it_was_before_an_edit(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("002_other", (0,), made / "demo", made / "runs")

    def killed(command: tuple[str, ...]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run_command", killed)
    with pytest.raises(KeyboardInterrupt):
        experiment.experiment(*options)
    marker = made / "runs" / "002_other" / "seed0" / "parts" / "fit.json"
    assert "made_by" in marker.read_text()
    (made / "experiments" / "002_other" / "config.yaml").write_text("a: 2\n")
    with pytest.raises(KeyboardInterrupt):  # nothing was left to go on with
        experiment.experiment(*options)
    (marker.parents[1] / "checkpoints").mkdir()
    (made / "experiments" / "002_other" / "config.yaml").write_text("a: 3\n")
    with pytest.raises(SystemExit, match="of another command or configuration"):
        experiment.experiment(*options)


def test_training_that_was_interrupted_goes_on(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = made / "runs" / "002_other" / "seed3" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "last.ckpt").touch()
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(experiment, "run_command", ran.append)
    experiment.experiment("002_other", (3,), made / "demo", made / "runs")
    assert ran[0] == ("fit", "--ckpt_path", str(checkpoints.parent))


def test_unknown_experiment_is_told_the_known_ones() -> None:
    with pytest.raises(SystemExit, match="001_metaworld"):
        experiment.experiment("000_nothing")


def test_number_says_which_recipe_an_experiment_differs_from() -> None:
    assert recipe_of("009_desk") is DESK
    assert recipe_of("012a_without_stage_1").name == "012_desk_ablations"
    assert recipe_of("002_without_stage_1") is METAWORLD
    assert experiment.configs("002_without_stage_1")[1:] == [
        "experiments/001_metaworld/config.yaml",
        "experiments/002_without_stage_1/config.yaml",
    ]
    assert experiment.configs("012a_without_stage_1") == [
        "configs/desk.yaml",
        "experiments/012_desk_ablations/config.yaml",
        "experiments/012a_without_stage_1/config.yaml",
    ]


def test_desk_is_judged_at_the_task_that_was_told_and_at_the_original_one() -> None:
    result = {
        "rollout": {
            "success": {"policy": {"a": [9, 10], "b": [7, 10]}, "policy, swapped": {"a": [1, 10]}},
            "swapped": {"policy, swapped": {"a": {"told": "b", "success": [6, 10]}}},
        },
        "chains": {"chains": {"policy": {"chain": {"episodes": 4, "in_a_row": [4, 2, 0, 0, 0], "mean": 1.5}}}},
        "validation": {},
        "cpu_seconds": 1300.0,
    }
    measured = {heading: measure(result) for heading, measure in DESK.shares.items()}
    assert measured["named"] == pytest.approx(0.8)
    assert measured["swapped: named"] == pytest.approx(0.6)
    assert measured["swapped: original"] == pytest.approx(0.1)
    assert measured["empty"] is None
    assert DESK.numbers["in a row"][0](result) == 1.5


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_parts_of_a_recipe_write_what_is_gathered(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "data" / "robot").mkdir(parents=True)
    parts = experiment.commands(recipe.name, 1, tmp_path, tmp_path / "run")
    written = {Path(word) for words in parts.values() for word in words}
    for file in recipe.rollouts.values():
        assert tmp_path / "run" / Path(file).parts[0] in written


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_commands_take_the_options_of_a_recipe(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "robot").mkdir(parents=True)
    parts = experiment.commands(recipe.name, 1, tmp_path, tmp_path / "run")
    for name, words in recipe.parts.items():
        if words[0].endswith(".py"):
            assert Path(words[0]).is_file()
            continue
        with pytest.raises(SystemExit) as ended:
            main([*parts[name], "--print_config"])
        assert ended.value.code == 0, capsys.readouterr().err
