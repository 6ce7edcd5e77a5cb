"""`pi05 stats` and `pi05 tokenizer` as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pi05_lightning.cli.main import main
from pi05_lightning.cli.stats import feature_table
from pi05_lightning.data.fast import FastTokenizer
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.statistics import FeatureStats
from tests.data.recorded import data_file, edit_info, open_source, rewrite

# five episodes, so one is held out; their states move more like actions than their actions, which count frames
SMALL = ("--horizon", "4", "--val_fraction", "0.2", "--action_keys", "[observation.state]")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("stats", "tokenizer"):
        monkeypatch.setattr(f"pi05_lightning.cli.{command}.console.width", 200)


def test_stats_shows_every_dim_by_name(pictures_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["stats", str(pictures_copy)])
    trained_on = ["0 x", "1 y", "2 z", "0 dx", "1 dy"]
    assert list(shown(capsys)) == trained_on
    main(["stats", str(pictures_copy), "--keys", "[observation.state,observation.gripper,action]"])
    assert set(shown(capsys)) == {*trained_on, "0 width"}


def test_stats_are_of_the_episodes_that_a_source_names(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["stats", str(pictures), "--episodes", "[0,1]", "--val_fraction", "0"])
    assert f"{len(open_source(pictures, episodes=[0, 1], val_fraction=0))} frames of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--frames", "corrections"), "10 frames of 1 "),
        (("--frames", "positive", "--labels", "positive"), "54 frames of 5 "),
    ],
)
def test_stats_are_of_the_frames_that_a_source_names(
    pictures_copy: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], expected: str
) -> None:
    rewrite(data_file(pictures_copy), intervention=[row < 10 for row in range(54)])
    main(["stats", str(pictures_copy), "--val_fraction", "0", *options])
    assert expected in capsys.readouterr().out


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, list[float]]:
    """The numbers of each dim in the printed tables."""
    lines = (line.split() for line in capsys.readouterr().out.splitlines())
    return {
        " ".join(words[:2]): [float(word) for word in words[2:8]]
        for words in lines
        if len(words) > 8 and words[0].isdigit()
    }


def test_stats_are_those_that_a_policy_is_trained_with(pictures_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = pq.read_table(data_file(pictures_copy))["action"].to_pylist()
    values[20] = [float("nan"), 1e6]
    rewrite(data_file(pictures_copy), action=values)
    main(["stats", str(pictures_copy), "--val_fraction", "0.4", "--horizon", "8", "--on_bad_sample", "skip"])
    robot = open_source(pictures_copy, val_fraction=0.4, on_bad_sample="skip").robot()
    assert robot is not None
    found = shown(capsys)
    for dims, quantiles in (("0 x,1 y,2 z", robot.normalize.state), ("0 dx,1 dy", robot.normalize.action)):
        for dim, low, high in zip(dims.split(","), quantiles.q01, quantiles.q99, strict=True):
            assert found[dim][3:5] == pytest.approx([low, high], rel=1e-3)


def test_stats_refuses_bad_data_by_its_address(pictures_copy: Path) -> None:
    values = pq.read_table(data_file(pictures_copy))["action"].to_pylist()
    values[2] = [float("nan"), 0.0]
    rewrite(data_file(pictures_copy), action=values)
    with pytest.raises(SystemExit, match="episode 0, frame 2, action: value 0 is nan"):
        main(["stats", str(pictures_copy)])


def test_stats_takes_actions_relative_to_the_state(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["stats", str(pictures), "--keys", "[action]", "--relative_dims", "[0]", "--horizon", "3"])
    source = open_source(pictures, val_fraction=0.1, relative_dims=[0], horizon_steps=3)
    _, action = source.statistics()
    found = shown(capsys)
    assert list(found) == ["0 dx", "1 dy"]
    assert found["0 dx"][3:5] == pytest.approx([action.q01[0], action.q99[0]], rel=1e-3)


def test_stats_takes_actions_relative_to_the_state_that_is_named(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["observation.gripper", "action"]
    main(["stats", str(pictures), "--keys", f"[{','.join(keys)}]", "--relative_dims", "[0]", "--horizon", "3"])
    chosen = {"state_keys": keys[:1], "relative_dims": [0], "horizon_steps": 3}
    _, action = open_source(pictures, val_fraction=0.1, **chosen).statistics()
    assert shown(capsys)["0 dx"][3:5] == pytest.approx([action.q01[0], action.q99[0]], rel=1e-3)


def with_other_keys(root: Path) -> Path:
    """The same dataset, whose state and action have names of their own."""
    names = {"observation.state": "observation.joint_positions", "action": "action.joints"}
    files = LeRobotFiles.open(root)
    edit_info(root, features={names.get(key, key): feature for key, feature in files.features.items()})
    table = pq.read_table(data_file(root))
    pq.write_table(table.rename_columns([names.get(name, name) for name in table.column_names]), data_file(root))
    return root


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["tokenizer"], r"no vector 'action' \(did you mean action.joints\?\); it has .*: correct `action_keys`, .*"),
        (["stats", "--keys", "[action]"], r"keys: .* has no 'action' \(did you mean action.joints\?\); it has .*"),
        (
            ["stats", "--keys", "[action.joints]", "--relative_dims", "[0]"],
            r"relative_dims are relative to a state, .* no observation.state: .*'\[observation.*, action.joints\]'",
        ),
    ],
)
def test_a_key_that_a_dataset_does_not_have_is_told_with_the_option_and_the_nearest(
    command: list[str], told: str, pictures_copy: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command[0], str(with_other_keys(pictures_copy)), *command[1:]])
    assert re.search(told, str(ended.value.code))
    assert "timestamp" not in str(ended.value.code)


def test_stats_takes_actions_relative_to_a_state_of_another_name(
    pictures_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = "[observation.joint_positions, action.joints]"
    main(["stats", str(with_other_keys(pictures_copy)), "--keys", keys, "--relative_dims", "[0]", "--horizon", "3"])
    assert {"0 x", "0 dx"} <= shown(capsys).keys()


def test_stats_takes_keys_in_the_order_of_training(pictures_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two actions dim 0 is the first one's, whatever it is called."""
    files = LeRobotFiles.open(pictures_copy)
    feature = {"dtype": "float32", "shape": [1], "names": ["open"]}
    edit_info(pictures_copy, features=files.features | {"action.gripper": feature})
    gripper = pq.read_table(data_file(pictures_copy))["observation.gripper"]
    rewrite(data_file(pictures_copy), **{"action.gripper": gripper})
    states, actions = ["observation.gripper", "observation.state"], ["action.gripper", "action"]
    keys = f"[{','.join([*states, *actions])}]"
    main(["stats", str(pictures_copy), "--keys", keys, "--relative_dims", "[0,1]", "--horizon", "3"])
    chosen = {"state_keys": states, "action_keys": actions, "relative_dims": [0, 1], "horizon_steps": 3}
    _, action = open_source(pictures_copy, val_fraction=0.1, **chosen).statistics()
    found = shown(capsys)
    for place, dim in enumerate(["0 open", "0 dx", "1 dy"]):
        assert found[dim][3:5] == pytest.approx([action.q01[place], action.q99[place]], rel=1e-3)


def test_stats_need_no_boxes_that_fit_the_image(videos_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training takes them with `box_range: 1000`."""
    path = data_file(videos_copy)
    table = pq.read_table(path)
    events = table["language_events"].to_pylist()
    for event in (event for row in events for event in row if event["content"].startswith("<loc")):
        event["content"] = json.dumps({"detections": [{"label": "handle", "bbox": [10, 20, 900, 980]}]})
    at, column = table.column_names.index("language_events"), pa.array(events, table["language_events"].type)
    pq.write_table(table.set_column(at, "language_events", column), path)
    with pytest.raises(ValueError, match="900"):
        open_source(videos_copy, cameras=None)
    main(["stats", str(videos_copy)])
    assert "2 z" in shown(capsys)


def test_tokenizer_leaves_out_what_its_message_says_that_it_can(pictures_copy: Path, tmp_path: Path) -> None:
    values = pq.read_table(data_file(pictures_copy))["observation.state"].to_pylist()
    values[2] = [float("nan"), 0.0, 0.0]
    rewrite(data_file(pictures_copy), **{"observation.state": values})
    command = ["tokenizer", str(pictures_copy), "--out", str(tmp_path), *SMALL]
    with pytest.raises(SystemExit, match="leave such data out with on_bad_sample: skip"):
        main(command)
    main([*command, "--on_bad_sample", "skip"])
    assert FastTokenizer.load(tmp_path).horizon == 4


def test_tokenizer_is_one_that_the_public_format_describes(pictures: Path, tmp_path: Path) -> None:
    main(["tokenizer", str(pictures), "--out", str(tmp_path / "fast"), *SMALL, "--vocab_size", "300"])
    config = json.loads((tmp_path / "fast" / "processor_config.json").read_text())
    assert (config["time_horizon"], config["action_dim"], config["vocab_size"]) == (4, 3, 300)
    fast = FastTokenizer.load(tmp_path / "fast")
    assert fast.decode(fast.encode(np.zeros((1, 4, 3), dtype=np.float32))[0]).shape == (4, 3)


def test_tokenizer_reports_error_and_length_of_held_out_chunks(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["tokenizer", str(pictures), "--out", str(tmp_path), *SMALL])
    (report,) = json.loads((tmp_path / "report.json").read_text())["datasets"]
    val = np.unique(open_source(pictures, "val", val_fraction=0.2).episode)
    assert report["chunks"] == sum(LeRobotFiles.open(pictures).column("length")[val])
    assert report["naive_tokens"] == 12
    assert 0 < report["mean_tokens"] <= report["p99_tokens"] <= 12
    assert 0 < max(report["rmse"]) <= 0.05  # half a step of 1/10
    assert report["coverage"] == 1
    assert "held-out" in capsys.readouterr().out


def test_tokenizer_draws_the_reconstruction(pictures: Path, tmp_path: Path) -> None:
    main(["tokenizer", str(pictures), "--out", str(tmp_path), *SMALL])
    colours = np.unique(np.asarray(Image.open(tmp_path / "reconstruction.png").convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colours) > 10


def test_tokenizer_fits_on_several_datasets(pictures: Path, videos: Path, tmp_path: Path) -> None:
    main(["tokenizer", f"[{pictures}, {videos}]", "--out", str(tmp_path), *SMALL])
    reports = json.loads((tmp_path / "report.json").read_text())["datasets"]
    assert [report["dataset"] for report in reports] == [str(pictures), str(videos)]


def test_tokenizer_takes_the_robots_of_a_runs_yaml(pictures: Path, tmp_path: Path) -> None:
    robot = {"path": str(pictures), "action_keys": ["observation.state"], "val_fraction": 0.2}
    sources = {
        "arm": {"class_path": "pi05_lightning.data.sources.lerobot.LeRobotConfig", "init_args": robot},
        "web": {"class_path": "pi05_lightning.data.sources.vision_text.VisionTextConfig", "init_args": {"path": "web"}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": {"sources": sources}, "trainer": {"devices": 1}}))
    main(["tokenizer", str(tmp_path / "run.yaml"), "--out", str(tmp_path), "--horizon", "4"])
    (report,) = json.loads((tmp_path / "report.json").read_text())["datasets"]
    assert (report["dataset"], report["naive_tokens"]) == ("arm", 12)
    robot["val_fraction"] = 0.3
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"data": {"sources": sources}}))
    with pytest.raises(SystemExit, match=r"data.sources.arm is read otherwise in another file"):
        main(["tokenizer", f"[{tmp_path}/run.yaml, {tmp_path}/other.yaml]", "--out", str(tmp_path / "both")])


def test_tokenizer_takes_a_sources_options_as_its_yaml_says_them(videos: Path, tmp_path: Path) -> None:
    options = {
        "relative_dims": [0],
        "relative_state_dims": [2],
        "horizon_steps": 3,
        "val_fraction": 0.4,
        "episodes": "length >= 8",
        "subtask_key": "language_persistent",
    }
    robot = {
        "class_path": "pi05_lightning.data.sources.lerobot.LeRobotConfig",
        "init_args": options | {"path": str(videos)},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": {"sources": {"robot": robot}}}))
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    reports = []
    for number, command in enumerate(([str(tmp_path / "run.yaml")], [str(videos), *flags])):
        out = tmp_path / str(number)
        main(["tokenizer", *command, "--out", str(out), "--horizon", "4"])
        (report,) = json.loads((out / "report.json").read_text())["datasets"]
        reports.append({name: value for name, value in report.items() if name != "dataset"})
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("init_args", "named"), [({}, "data.sources.*path"), ({"path": "x", "actoin_keys": []}, "actoin_keys")]
)
def test_mistake_in_a_runs_source_is_named(init_args: dict, named: str, tmp_path: Path) -> None:
    source = {"class_path": "pi05_lightning.data.sources.lerobot.LeRobotConfig", "init_args": init_args}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": {"sources": {"robot": source}}}))
    with pytest.raises(SystemExit, match=rf"(?s)run\.yaml.*{named}"):
        main(["tokenizer", str(tmp_path / "run.yaml"), "--out", str(tmp_path)])


def sources_of_one_robot(path: Path, other: Path, shared: str) -> dict:
    keys = {"action_keys": ["observation.state"], "val_fraction": 0.2}
    configs = {"robot": {"path": str(path), **keys}, "more": {"path": str(other), **keys, "same_robot_as": shared}}
    path_of_class = "pi05_lightning.data.sources.lerobot.LeRobotConfig"
    return {name: {"class_path": path_of_class, "init_args": config} for name, config in configs.items()}


def test_tokenizer_normalises_by_the_robot_that_a_source_shares(
    pictures: Path, pictures_copy: Path, tmp_path: Path
) -> None:
    """As in training: half the movement is half of the normalised range, too."""
    values = pq.read_table(data_file(pictures_copy))["observation.state"].to_pylist()
    rewrite(data_file(pictures_copy), **{"observation.state": [[value / 2 for value in row] for row in values]})
    sources = sources_of_one_robot(pictures, pictures_copy, "robot")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": {"sources": sources}}))
    main(["tokenizer", str(tmp_path / "run.yaml"), "--out", str(tmp_path), "--horizon", "4"])
    own, shared = json.loads((tmp_path / "report.json").read_text())["datasets"]
    span = np.array(own["rmse_real"]) / own["rmse"]
    np.testing.assert_allclose(np.array(shared["rmse_real"]) / shared["rmse"], span, rtol=1e-6)


def test_tokenizer_refuses_a_source_that_shares_no_robot(pictures: Path, tmp_path: Path) -> None:
    sources = sources_of_one_robot(pictures, pictures, "arm")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": {"sources": sources}}))
    with pytest.raises(SystemExit, match=r"data\.sources\.more: same_robot_as 'arm' names no source"):
        main(["tokenizer", str(tmp_path / "run.yaml"), "--out", str(tmp_path)])


def test_tokenizer_reads_no_image(pictures_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("an image is read")

    source = {"class_path": "LeRobotConfig", "init_args": {"path": str(pictures_copy)}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": {"sources": {"robot": source}}}))
    monkeypatch.setattr("pi05_lightning.data.frames.ParquetFrames.read", read)
    main(["tokenizer", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "fast"), "--horizon", "4"])
    assert (tmp_path / "fast" / "report.json").exists()


def test_tokenizer_needs_no_instructions(pictures_copy: Path, tmp_path: Path) -> None:
    path = pictures_copy / "meta" / "tasks.parquet"
    tasks = pq.read_table(path)
    (name,) = tasks.schema.pandas_metadata["index_columns"]
    blank = tasks.set_column(tasks.column_names.index(name), name, [[""] * len(tasks)])
    pq.write_table(blank.replace_schema_metadata(tasks.schema.metadata), path)
    main(["tokenizer", str(pictures_copy), "--out", str(tmp_path), "--horizon", "4"])
    assert FastTokenizer.load(tmp_path).horizon == 4


def test_too_large_an_error_fails_and_writes_no_tokenizer(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"above max_rmse 0\.0001"):
        main(["tokenizer", str(pictures), "--out", str(tmp_path), *SMALL, "--max_rmse", "1e-4"])
    assert not (tmp_path / "tokenizer.json").exists()
    assert (tmp_path / "refused" / "report.json").exists()


def test_a_finer_scale_meets_the_bound(pictures: Path, tmp_path: Path) -> None:
    options = [*SMALL, "--max_rmse", "0.005", "--scale", "100", "--val_fraction", "0"]
    main(["tokenizer", str(pictures), "--out", str(tmp_path), *options])
    assert FastTokenizer.load(tmp_path).scale == 100


# --- a run's YAML beside options


def write_run(folder: Path, root: Path, **model: int) -> Path:
    robot = {"path": str(root), "val_fraction": 0.2}
    source = {"class_path": "pi05_lightning.data.sources.lerobot.LeRobotConfig", "init_args": robot}
    run = {"data": {"sources": {"arm": source}}, "model": {"config": model} if model else {}}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def test_tokenizer_takes_the_horizon_and_vocabulary_of_the_runs_model(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, pictures, horizon=8, fast_vocab_size=300)
    main(["tokenizer", str(run), "--out", str(tmp_path / "fast")])
    fast = FastTokenizer.load(tmp_path / "fast")
    assert (fast.horizon, fast.dim) == (8, 2)
    assert fast.vocab_size <= 300
    assert "chunks of 8 actions, the horizon of the model" in capsys.readouterr().out


def test_tokenizer_says_which_horizon_it_takes_where_nobody_does(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["tokenizer", str(pictures), "--out", str(tmp_path / "fast")])
    assert FastTokenizer.load(tmp_path / "fast").horizon == 50
    assert "chunks of 50 actions, as π0.5 has them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("action_keys", "[observation.state]"),
        ("state_keys", "[observation.gripper]"),
        ("relative_dims", "[0]"),
        ("min_range", "0.1"),
        ("val_fraction", "0.4"),
        ("on_bad_sample", "skip"),
    ],
)
def test_options_that_a_runs_yaml_decides_are_refused_beside_it(
    pictures: Path, tmp_path: Path, option: str, value: str
) -> None:
    run = write_run(tmp_path, pictures, horizon=4)
    with pytest.raises(SystemExit, match=rf"run.yaml says itself how its sources are read: leave out {option}"):
        main(["tokenizer", str(run), "--out", str(tmp_path / "fast"), f"--{option}", value])
    assert not (tmp_path / "fast").exists()


@pytest.mark.parametrize("option", ["horizon", "max_chunks"])
def test_a_count_of_nothing_is_refused(pictures: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(SystemExit, match=f"{option} is -5: it must be at least 1"):
        main(["tokenizer", str(pictures), "--out", str(tmp_path / "fast"), f"--{option}", "-5"])


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("scale", "0", "scale is 0.0: it must be above 0"),
        ("coverage", "99.9", "coverage is 99.9: it must be above 0 and at most 1"),
        ("coverage", "0", "coverage is 0.0"),
        ("max_rmse", ".nan", "max_rmse is nan"),
        ("vocab_size", "0", "vocab_size is 0"),
    ],
)
def test_a_number_with_which_no_tokenizer_is_of_use_is_refused(
    pictures: Path, tmp_path: Path, option: str, value: str, said: str
) -> None:
    with pytest.raises(SystemExit, match=said):
        main(["tokenizer", str(pictures), "--out", str(tmp_path / "fast"), f"--{option}", value])
    assert not (tmp_path / "fast").exists()


def test_a_file_in_the_place_of_a_tokenizer_is_left_alone(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"notes.txt is a file"):
        main(["tokenizer", str(pictures), "--out", str(tmp_path / "notes.txt")])


def test_coefficients_beyond_the_fit_are_told_once_with_their_share(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    main(["tokenizer", str(pictures), "--out", str(tmp_path), *SMALL, "--coverage", "0.9", "--vocab_size", "100"])
    (result,) = json.loads((tmp_path / "report.json").read_text())["datasets"]
    assert result["coverage"] < 1
    told = f"a share of {1 - result['coverage']:.2g} of its coefficients is beyond the range"
    assert capsys.readouterr().out.count(told) == 1
    assert "fit it on these actions" not in caplog.text


def test_a_tokenizer_is_not_overwritten_unasked(pictures: Path, tmp_path: Path) -> None:
    command = ["tokenizer", str(pictures), "--out", str(tmp_path / "fast"), *SMALL]
    main([*command, "--scale", "9"])
    with pytest.raises(SystemExit, match=r"out: .*fast holds a tokenizer: name another folder, or .* --overwrite"):
        main(command)
    assert FastTokenizer.load(tmp_path / "fast").scale == 9
    main([*command, "--overwrite"])
    assert FastTokenizer.load(tmp_path / "fast").scale == 10


def test_stats_are_of_no_rewards_which_no_policy_reads(pictures_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = LeRobotFiles.open(pictures_copy)
    edit_info(
        pictures_copy, features=files.features | {"next.reward": {"dtype": "float32", "shape": [1], "names": None}}
    )
    rows = pq.read_table(data_file(pictures_copy)).num_rows
    rewrite(data_file(pictures_copy), **{"next.reward": pa.array([float("nan")] * rows, pa.float32())})
    main(["stats", str(pictures_copy), "--cameras", "{}"])
    shown = capsys.readouterr().out
    assert "action" in shown
    assert "next.reward" not in shown


def test_stats_widens_small_ranges_as_training_does() -> None:
    rare = FeatureStats.of([np.eye(1, 1000)[0]])
    shown = {least: list(feature_table("state", rare, ["gripper"], least).columns[-1].cells) for least in (0.0, 1.0)}
    assert shown == {0.0: ["q01 = q99: its rare values explode when normalised"], 1.0: [""]}


def test_options_of_other_commands_are_refused(pictures: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, pictures, horizon=4)
    with pytest.raises(SystemExit) as stopped:
        main(["tokenizer", str(run), "--data.sources.arm.episodes", "[0]"])
    assert stopped.value.code == 2
