"""What was measured is what is served: a rollout says how the policy acted, and `--as-measured` acts like that."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from safetensors.torch import load_file, save_file

from pi05_lightning import Pi05Policy
from pi05_lightning.acting import Acting, measured
from pi05_lightning.cli.main import main
from pi05_lightning.cli.rollout import rollout
from pi05_lightning.cli.serve import acting_as_measured
from pi05_lightning.evaluation.report.page import render
from pi05_lightning.evaluation.report.run import read_run
from pi05_lightning.serving.wire import unpack
from tests.weights.hub_cache import hold_in_cache

GIVEN = {"execution_horizon": 3, "noise_scale": 0.5, "num_steps": 4, "replan_subtask_every": 2}


@pytest.fixture(scope="module")
def run(untrained, tmp_path_factory) -> Path:
    """An exported policy with a rollout of its own."""
    folder = Path(shutil.copytree(untrained, tmp_path_factory.mktemp("as_measured") / "run"))
    options = {"episodes": 1, "modes": ("policy", "flat"), "max_seconds": 0.2, "num_workers": 1, "videos": 0}
    rollout(folder, ["reach-v3"], **options, **GIVEN)
    return folder


def test_rollout_stores_every_option_with_what_the_defaults_came_to(run):
    stored = json.loads((run / "rollout" / "rollout.json").read_text())["acting"]
    how = Acting(robot="robot", hierarchical=True, **GIVEN)
    assert stored["policy"] == json.loads(json.dumps(asdict(how)))
    assert stored["flat"] == stored["policy"] | {"hierarchical": False}


def test_policy_made_from_it_acts_as_the_measured_one(run):
    for mode in (None, "flat"):
        how, named, _ = measured(run, mode)
        assert named == (mode or "policy")
        policy = Pi05Policy.from_pretrained(run, **asdict(how))
        assert policy.resolved == how == Acting(robot="robot", hierarchical=mode is None, **GIVEN)


def test_options_are_on_the_page_of_the_run(run, tmp_path):
    folder = tmp_path / "fit"
    (folder / "rollout").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed_everything: 0\n")
    shutil.copy(run / "rollout" / "rollout.json", folder / "rollout")
    page = render(read_run(folder), {})
    assert "<td>execution_horizon</td><td>3</td><td>3</td>" in page
    assert "<td>hierarchical</td><td>yes</td><td>no</td>" in page
    assert "--as_measured" in page


@pytest.mark.parametrize(
    ("mode", "given", "dtype", "message"),
    [
        ("expert", {}, None, "has no mode expert, only policy, flat"),
        (None, {"noise_scale": 2.0}, None, "noise_scale: as_measured serves the mode policy .* noise_scale 0.5, not 2"),
        (None, {}, "int8", "dtype: as_measured serves the mode policy of the rollout, which had dtype None, not int8"),
    ],
)
def test_what_was_not_measured_is_refused(run, mode, given, dtype, message):
    with pytest.raises(ValueError, match=message):
        acting_as_measured(run, mode, Acting(**given), dtype)


def test_dtype_of_the_rollout_is_that_of_the_server(run, tmp_path):
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    file = moved / "rollout" / "rollout.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "int8"}))
    with pytest.raises(ValueError, match=r"in 8 bits that moved.int8.json says, which is not in .*copy it"):
        acting_as_measured(moved, None, Acting(), None)
    (tmp_path / "moved.int8.json").touch()
    assert acting_as_measured(moved, None, Acting(), None) == (
        Acting(robot="robot", hierarchical=True, **GIVEN),
        "int8",
    )


def test_a_run_without_a_rollout_says_what_is_missing(untrained, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", str(untrained), "--port", "0", "--as-measured"])
    message = str(stopped.value)
    assert f"there is no {untrained}/rollout/rollout.json" in message
    assert f"pi05 rollout {untrained}" in message


def test_other_weights_than_the_measured_are_refused_and_a_moved_run_is_not(run, fast_policy, tmp_path):
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    assert measured(moved) == measured(run)
    shutil.copy(fast_policy / "last.ckpt", moved / "rollout" / "newer.ckpt")
    with pytest.raises(ValueError, match=r"there is no .*moved/rollout/rollout/rollout.json"):
        measured(moved / "rollout" / "newer.ckpt")
    shutil.move(moved / "rollout" / "newer.ckpt", moved)
    with pytest.raises(ValueError, match=r"measured \., and .*newer.ckpt is newer.ckpt of the run: name the former"):
        measured(moved / "newer.ckpt")


def test_weights_that_took_the_place_of_the_measured_are_refused(run, tmp_path):
    trained_on = Path(shutil.copytree(run, tmp_path / "trained_on"))
    tensors = load_file(trained_on / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, trained_on / "model.safetensors")
    with pytest.raises(ValueError, match=r"measured other weights than .*trained_on has now: measure it with"):
        measured(trained_on)


def test_a_hub_ids_rollout_is_under_runs_and_leaves_the_id_what_it_is(untrained, tmp_path, monkeypatch):
    snapshots = hold_in_cache(untrained, tmp_path / "hub", monkeypatch)
    monkeypatch.chdir(tmp_path)
    rollout(Path("lab/arm"), ["reach-v3"], episodes=1, modes=("policy",), max_seconds=0.2, num_workers=1, videos=0)
    assert (tmp_path / "runs" / "lab--arm" / "rollout" / "rollout.json").is_file()
    assert not (tmp_path / "lab").exists()
    assert len([*snapshots.iterdir()]) == 1
    assert measured(Path("lab/arm"))[1] == "policy"


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "sent"), [(["--as-measured"], 3), (["--as_measured", "flat"], 3), ([], 1)])
def test_server_sends_what_the_rollout_executed(run, flags, sent):
    command = [sys.executable, "-m", "pi05_lightning", "serve", str(run), "--port", "0", *flags]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    async def metadata(address: str) -> dict[str, Any]:
        async with ClientSession() as session, session.ws_connect(address) as socket:
            return unpack(await socket.receive_bytes())

    try:
        lines = list[str]()
        while "serving at" not in "".join(lines):
            lines.append(next(server.stderr))
        told = asyncio.run(metadata(lines[-1].split()[-1]))
        assert (told["action_horizon"], told["acting"]["execution_horizon"]) == (sent, sent)
        assert f"execution_horizon {sent}" in "".join(lines)
    finally:
        server.terminate()
        server.communicate(timeout=60)
