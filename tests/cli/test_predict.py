"""`pi05 predict`: chunks in the robot's units, read back with pandas and compared with LeRobot's own reading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from pi05_lightning import Pi05Policy
from pi05_lightning.acting import Acting
from pi05_lightning.cli.main import main
from pi05_lightning.data.datamodule import Pi05DataModule
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.flow_noise import draw_noise
from pi05_lightning.module.prediction import Predictor
from pi05_lightning.weights.abilities import UNKNOWN
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.training_checkpoint import find_checkpoint
from tests.untrained import untrained_model

STEPS = 2
SHAPES = ModelConfig.preset("debug").shapes
# the second robot: five dims, of which two are predicted relative to the state
ACTING = ("--acting.num_steps", "3", "--acting.noise_scale", "1")
ARMS = {
    "arm": {"action_keys": ["action"]},
    "two/arms": {
        "action_keys": ["action", "observation.state"],
        "relative_dims": [3, 4],
        "relative_state_dims": [0, 2],
    },
}


@pytest.fixture(scope="module")
def sources(videos: Path) -> dict[str, LeRobotConfig]:
    return {name: LeRobotConfig(path=str(videos), val_fraction=0.4, **options) for name, options in ARMS.items()}


@pytest.fixture(scope="module")
def run(videos: Path, captions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two robots of different dims, and captions, with what it predicts."""
    module = "pi05_lightning.data.sources."
    web = {"class_path": module + "vision_text.VisionTextConfig", "init_args": {"path": str(captions)}}
    robots = {
        name: {
            "class_path": module + "lerobot.LeRobotConfig",
            "init_args": {"path": str(videos), "val_fraction": 0.4, **options},
        }
        for name, options in ARMS.items()
    }
    content = {
        "model": {"config": "debug"},
        "data": {"sources": {"web": web, **robots}, "batch_size": 3, "num_workers": 0},
        "stages": {"pretrain_steps": 0, "posttrain_steps": STEPS},
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "val_check_interval": 1000,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
        },
    }
    folder = tmp_path_factory.mktemp("predict")
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    main(["fit", "-c", str(folder / "config.yaml"), "--run", str(folder / "run")])
    main(["predict", str(folder / "run"), *ACTING])
    return folder / "run"


def read(run: Path, source: str) -> pd.DataFrame:
    return pd.read_parquet(run / "predictions" / source)


def chunks(column: pd.Series) -> np.ndarray:
    """f32[N T A]"""
    return np.stack([np.stack(chunk) for chunk in column])


def about(run: Path) -> dict:
    return json.loads((run / "predictions" / "predictions.json").read_text())


@pytest.mark.parametrize("source", ARMS)
def test_truth_is_what_lerobot_reads_at_the_same_place(run: Path, videos: Path, source: str) -> None:
    keys, rows = ARMS[source]["action_keys"], read(run, source)
    steps = [step / 10 for step in range(SHAPES.horizon)]
    recorded = LeRobotDataset("pi05/recorded", root=videos, delta_timestamps=dict.fromkeys(keys, steps))
    first = {episode["episode_index"]: episode["dataset_from_index"] for episode in recorded.meta.episodes}
    assert len(rows) > 10
    for row in rows.itertuples():
        item = recorded[first[row.episode_index] + row.frame_index]
        expected = torch.cat([item[key].reshape(SHAPES.horizon, -1) for key in keys], dim=-1)
        np.testing.assert_array_equal(np.stack(row.action), expected.numpy())
        np.testing.assert_array_equal(row.action_is_pad, item[f"{keys[0]}_is_pad"].numpy())
        np.testing.assert_array_equal(row.state, item["observation.state"].reshape(-1, 3)[0].numpy())
        assert (row.source, row.task, row.timestamp) == (source, item["task"], pytest.approx(float(item["timestamp"])))


@pytest.mark.parametrize("source", ARMS)
def test_prediction_is_what_the_policy_does(run: Path, sources: dict[str, LeRobotConfig], source: str) -> None:
    data = sources[source].open(source, "val", SHAPES)
    policy = Pi05Policy.from_pretrained(run, num_steps=3, robot=source)
    rows = read(run, source)
    assert chunks(rows.predicted_action).shape == (len(data), SHAPES.horizon, policy.action_dim)
    for index in (0, 7, len(data) - 1):
        noise, _ = draw_noise(torch.tensor([index]), 0, 1, SHAPES.horizon, SHAPES.action_dim)
        expected = policy.session(0).predict_chunk(data[index], noise[0, 0])
        np.testing.assert_allclose(np.stack(rows.predicted_action[index]), expected, atol=1e-5)
        assert rows.predicted_subtask[index] == policy.predict_subtasks([data[index]])[0]
        assert rows.subtask[index] == data[index].subtask


def test_file_says_what_its_numbers_are(run: Path, videos: Path) -> None:
    found = about(run)
    assert set(found["sources"]) == set(ARMS)  # captions have no actions
    assert found["sources"]["two/arms"] == {
        "dataset": str(videos),
        "samples": len(read(run, "two/arms")),
        "fps": 10.0,
        "action": {"action": ["dx", "dy"], "observation.state": ["x", "y", "z"]},
        "state": {"observation.state": ["x", "y", "z"]},
    }
    assert (found["step"], found["seed"], found["acting"]["num_steps"]) == (STEPS, 0, 3)
    assert Path(found["checkpoint"]).samefile(find_checkpoint(run))
    assert found["sha256"] == locate(run).content_hash()


@pytest.mark.slow
def test_two_ranks_predict_together_what_one_does_and_replace_it(run: Path, tmp_path: Path) -> None:
    one = read(run, "arm")
    command = [sys.executable, "-m", "pi05_lightning", "predict", str(run), "--run", str(tmp_path)]
    options = [*ACTING, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    (tmp_path / "predictions" / "arm").mkdir(parents=True)
    (tmp_path / "predictions" / "arm" / "rank-2.parquet").write_text("of an earlier prediction on three ranks")
    subprocess.run([*command, *options], env=os.environ, check=True, capture_output=True, timeout=600)
    two = read(tmp_path, "arm").sort_values(["episode_index", "frame_index"], ignore_index=True)
    assert about(tmp_path)["sources"]["arm"]["samples"] == len(two) == len(one)
    np.testing.assert_array_equal(two[["episode_index", "frame_index"]], one[["episode_index", "frame_index"]])
    np.testing.assert_allclose(chunks(two.predicted_action), chunks(one.predicted_action), atol=1e-5)


def test_chunk_that_is_not_finite_is_refused_with_its_place(run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(find_checkpoint(run), weights_only=True)
    checkpoint["state_dict"]["model.flow_head.action_out_proj.bias"].fill_(torch.nan)
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    with pytest.raises(SystemExit, match=r"arm, a frame from {'episode_index': \d, 'frame_index': 0.*action.* is nan"):
        main(["predict", str(tmp_path / "broken.ckpt"), "--run", str(tmp_path)])
    assert not (tmp_path / "predictions").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--data.sources.arm.init_args.action_keys", "[observation.state]"], "arm has 3 action dims .* with 2"),
        (
            ["--data.sources", "{web: {class_path: WEB, init_args: {path: FILE}}}"],
            "no validation sample .* has actions",
        ),
    ],
)
def test_data_that_the_checkpoint_has_no_actions_for_is_refused(
    run: Path, captions: Path, tmp_path: Path, flags: list[str], named: str
) -> None:
    web = "pi05_lightning.data.sources.vision_text.VisionTextConfig"
    flags = [flag.replace("WEB", web).replace("FILE", str(captions)) for flag in flags]
    with pytest.raises(SystemExit, match=named):
        main(["predict", str(run), "--run", str(tmp_path), *flags])


def test_source_that_the_checkpoint_does_not_know_is_refused(run: Path, videos: Path, tmp_path: Path) -> None:
    source = (
        f"{{other: {{class_path: pi05_lightning.data.sources.lerobot.LeRobotConfig, init_args: {{path: {videos}}}}}}}"
    )
    with pytest.raises(
        SystemExit, match=r"data\.sources\.other: the checkpoint knows no such robot, only arm, two/arms"
    ):
        main(["predict", str(run), "--run", str(tmp_path), "--data.sources", source])


def predicted_frames(root: Path) -> list[int]:
    source = LeRobotConfig(path=str(root), val_fraction=0.4, on_bad_sample="skip")
    (loader,) = Pi05DataModule({"arm": source}, 4, num_workers=0, shapes=SHAPES).predict_dataloader()
    return [place["frame_index"] for batch in loader for place in batch.places]


def test_source_of_the_same_robot_is_seen_by_its_own_cameras(videos: Path) -> None:
    one = {"cameras": {"observation.images.top": "top"}}
    sources = {
        "arm": LeRobotConfig(path=str(videos), val_fraction=0.4, **one),
        "more": LeRobotConfig(path=str(videos), val_fraction=0.4, same_robot_as="arm"),
    }
    data = Pi05DataModule(sources, batch_size=2, num_workers=0, val_samples=2, shapes=SHAPES)
    cameras = {name: source.camera_names for name, source in data.predicted_sources.items()}
    assert cameras["more"] != cameras["arm"]
    predictor = Predictor(cameras, untrained_model(), data.processor, Acting(hierarchical=False), 0, UNKNOWN)
    for (batch,) in data.predict_dataloader():
        assert np.isfinite(predictor.predict(batch).actions).all()


def test_bad_frames_that_are_to_be_skipped_are_left_out(videos_copy: Path) -> None:
    whole = predicted_frames(videos_copy)
    for file in (videos_copy / "videos").rglob("*.mp4"):
        content = bytearray(file.read_bytes())
        content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
        file.write_bytes(content)
    left = predicted_frames(videos_copy)
    assert 0 < len(left) < len(whole)
