"""`pi05 check`: a policy beside a dataset, as it was recorded and as another program would have recorded it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from pi05_lightning.cli.main import main
from tests.data.recorded import data_file, edit_info, rewrite
from tests.robot_run import trained_run


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("checked"), pictures)


def check(capsys: pytest.CaptureFixture[str], run: Path, *args: str) -> tuple[int, str]:
    """Exit status and what was printed, on one line."""
    capsys.readouterr()
    try:
        main(["check", str(run), *args])
        status = 0
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    return status, " ".join(capsys.readouterr().out.split())


def test_its_own_demonstrations_agree(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = check(capsys, run, "--frames", "4")
    assert status == 0, said
    assert said.startswith("opening")
    for row in ("heads ok", "cameras ok", "image top ok 64 × 48", "state ok", "action ok", "rate ok", "predictions"):
        assert row in said


def test_its_own_demonstrations_are_read_as_in_training(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed = trained_run(tmp_path, pictures, cameras={"observation.images.top": "front"})
    status, said = check(capsys, renamed, "--frames", "2")
    assert status == 0, said
    assert "image front ok" in said


def test_its_own_demonstrations_are_of_the_episodes_that_it_was_trained_on(
    pictures_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = trained_run(tmp_path, pictures_copy, episodes=[0, 1])
    values = pq.read_table(data_file(pictures_copy))["action"].to_pylist()
    values[-1] = [float("nan"), 0.0]  # of an episode that was left out for it
    rewrite(data_file(pictures_copy), action=values)
    status, said = check(capsys, chosen, "--frames", "2")
    assert status == 0, said


def turned(root: Path) -> None:
    """Images upside down, as LIBERO's demonstrations are."""
    column = "observation.images.top"
    rows = pq.read_table(data_file(root))[column].to_pylist()
    for row in rows:
        out = io.BytesIO()
        ImageOps.flip(Image.open(io.BytesIO(row["bytes"]))).save(out, "PNG")
        row["bytes"] = out.getvalue()
    rewrite(data_file(root), **{column: rows})


def in_degrees(root: Path) -> None:
    values = np.stack(pq.read_table(data_file(root))["observation.state"].to_numpy())
    rewrite(data_file(root), **{"observation.state": list(np.degrees(values).astype(np.float32))})


def at_80_hz(root: Path) -> None:
    edit_info(root, fps=80)
    times = np.array(pq.read_table(data_file(root))["timestamp"])
    rewrite(data_file(root), timestamp=list((times / 8).astype(np.float32)))


def other_cameras(root: Path) -> None:
    info = json.loads((root / "meta" / "info.json").read_text())
    names = {"observation.images.top": "observation.images.front"}
    info["features"] = {names.get(key, key): feature for key, feature in info["features"].items()}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    table = pq.read_table(data_file(root))
    pq.write_table(table.rename_columns([names.get(name, name) for name in table.column_names]), data_file(root))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (turned, "image top differs 64 × 48 64 × 48, upside down"),
        (in_degrees, "like degrees where radians are expected"),
        (at_80_hz, "rate differs 10 Hz 80 Hz"),
        (
            other_cameras,
            "cameras: front: every observation is refused: top missing. Mend: name them as the policy does, if they see"
            " the same: --cameras '{observation.images.front: top}'",
        ),
    ],
)
def test_a_difference_is_told_with_its_mend_and_exits_1(
    run: Path, pictures_copy: Path, capsys: pytest.CaptureFixture[str], change, said: str
) -> None:
    change(pictures_copy)
    status, printed = check(capsys, run, "--dataset", str(pictures_copy), "--frames", "0")
    assert status == 1
    assert said in printed


def test_renamed_cameras_can_be_named_as_in_training(
    run: Path, pictures_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_cameras(pictures_copy)
    named = json.dumps({"observation.images.front": "top"})
    status, printed = check(capsys, run, "--dataset", str(pictures_copy), "--cameras", named, "--frames", "0")
    assert status == 0, printed


def test_what_agrees_is_said_without_the_pages_words(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _, said = check(capsys, run, "--frames", "0")
    assert "relative actions ok none: trained on as recorded read in the same way" in said
    assert "its own are not needed" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--frames", "-1"], "frames is -1"),
        (["--seed", "-1"], "seed is -1"),
        (["--device", "cuda:9"], "device 'cuda:9' cannot be used"),
        (["--tasks", "[drawer-open-v3]"], "tasks are a simulator's: give --env too"),
        (["--env", "MetaWorld", "--state_keys", "[a]"], "state_keys says how a dataset is read"),
    ],
)
def test_an_option_without_effect_or_sense_is_refused(run: Path, options: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        main(["check", str(run), *options])


def test_a_dataset_may_be_read_without_a_state(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed = check(capsys, run, "--state_keys", "[]", "--frames", "0")
    assert status == 1
    assert "state differs" in printed


def test_images_that_were_replaced_stop_a_resume(run: Path, pictures_copy: Path, tmp_path: Path) -> None:
    turned(pictures_copy)
    copy = shutil.copytree(run, tmp_path / "run")
    data = ["--data.sources.robot.init_args.path", str(pictures_copy)]
    with pytest.raises(SystemExit, match="the images of top differ by"):
        main(["fit", "--ckpt_path", str(copy), *data])
