"""One process opens a sharded run as any other: every command that takes a checkpoint gives what a file of it gives."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from gathered import digests
from killable_fit import fit
from sharded_ranks import on_ranks
from sharded_runs import validate

from pi05_lightning import Pi05Policy
from pi05_lightning.cli.main import main
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.weights.locate import locate, locate_run, run_of
from pi05_lightning.weights.sharded_checkpoint import is_sharded, read, read_into

ALONE = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--trainer.callbacks", "null"]
AT_ONCE = ["--checkpoint.in_background", "false"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, two_stages: Path) -> Path:
    """The run of two ranks, with averaged weights, that was saved in the background."""
    folder = tmp_path_factory.mktemp("sharded")
    args = ["-c", str(two_stages), "--run", str(folder / "run"), "--checkpoint.in_background", "true"]
    args += ["--trainer.max_steps", "4"]
    assert fit(args, folder / "log", 2, "fsdp2") == [0, 0], (folder / "log").read_text()
    return folder / "run"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, sharded: Path) -> Path:
    """The same checkpoint as one file."""
    file = tmp_path_factory.mktemp("single") / "checkpoints" / "last.ckpt"
    file.parent.mkdir()
    torch.save(read(sharded / "checkpoints" / "last.ckpt"), file)
    return file


def test_it_is_found_by_run_and_by_name(sharded: Path) -> None:
    last = sharded / "checkpoints" / "last.ckpt"
    assert last.is_symlink()
    assert is_sharded(last)
    assert {path.name for path in last.parent.iterdir()} == {"last.ckpt", os.readlink(last)}
    for path in (sharded, sharded / "checkpoints", last):
        assert locate_run(path).steps == 4
        assert run_of(path) == sharded


@pytest.mark.parametrize("averaged", [True, False])
def test_its_tensors_are_those_of_a_file(sharded: Path, single: Path, averaged: bool) -> None:
    for dtype in (None, torch.bfloat16):
        found, expected = (locate(path, averaged=averaged).tensors(dtype) for path in (sharded, single))
        assert list(found) == list(expected)
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name]), name
    own, average = (locate(sharded, averaged=value).tensors() for value in (False, True))
    assert any(not torch.equal(own[name], average[name]) for name in own)


def test_what_does_not_train_reads_the_averages_or_the_weights_into_a_model_and_nothing_else(sharded: Path) -> None:
    last, model = sharded / "checkpoints" / "last.ckpt", Pi05(ModelConfig.preset("debug"))
    for averaged in (True, False):
        found = read_into(model, last, averaged=averaged)
        assert read(last).keys() - found.keys() == {"optimizer_states", "ema"}
        for name, tensor in locate(sharded, averaged=averaged).tensors().items():
            assert torch.equal(model.state_dict()[name], tensor)
            assert found["state_dict"][f"model.{name}"].data_ptr() == model.state_dict()[name].data_ptr()


def test_the_policy_acts_as_that_of_a_file(sharded: Path, single: Path) -> None:
    chunks = []
    for path in (sharded, single):
        policy = Pi05Policy.from_pretrained(path, device="cpu")
        images = {camera: torch.zeros(3, 28, 28) for camera in policy.inputs.cameras}
        chunks.append(policy.predict_chunk({"task": "open the drawer", "state": np.zeros(3), "image": images}))
    assert np.array_equal(*chunks)


def test_it_is_converted_as_a_file(sharded: Path, single: Path, tmp_path: Path) -> None:
    for name, path in {"sharded": sharded, "single": single}.items():
        main(["convert", "--source", str(path), "--target", str(tmp_path / name)])
    found, expected = (tmp_path / name / "model.safetensors" for name in ("sharded", "single"))
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.slow
def test_it_is_validated_and_reported_as_a_file(sharded: Path, single: Path, tmp_path: Path) -> None:
    for name, path in {"sharded": sharded, "single": single}.items():
        main(
            ["validate", str(path), "--run", str(tmp_path / f"run-{name}"), *ALONE, "--trainer.limit_val_batches", "2"]
        )
    found, expected = (
        json.loads((tmp_path / f"run-{name}" / "metrics.json").read_text()) for name in ("sharded", "single")
    )
    assert found == expected
    main(["report", str(sharded)])
    assert (sharded / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sharded", "single"])
def test_ranks_validate_it_and_a_file_as_one_process(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = str(request.getfixturevalue(kind))
    validate(path, str(tmp_path / "one"), 1)
    on_ranks(2, validate, path, str(tmp_path / "two"), 2)
    found, expected = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("two", "one"))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-4, abs=1e-6, nan_ok=True)


@pytest.mark.slow
def test_one_process_trains_on_from_it_and_begins_with_its_weights_as_with_a_file(
    sharded: Path, single: Path, tmp_path: Path
) -> None:
    ends = []
    for name, path in {"sharded": sharded, "single": single}.items():
        on, new = tmp_path / f"on-{name}", tmp_path / f"new-{name}"
        one = [*ALONE, *AT_ONCE, "--trainer.max_steps", "5"]
        main(["fit", "--ckpt_path", str(path), "--run", str(on), *one])
        config = ["-c", str(sharded / "config.yaml"), "--model.init_from", str(path), "--trainer.max_steps", "1"]
        main(["fit", *config, "--run", str(new), *ALONE, *AT_ONCE])
        ends.append([digests(read(run / "checkpoints" / "last.ckpt")) for run in (on, new)])
    assert ends[0] == ends[1]
