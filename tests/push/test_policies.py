"""Policies on the Hub, which is a server on this machine here: whole or not at all, and loaded from it."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from pi05_lightning import Pi05DataModule, Pi05Policy
from pi05_lightning.cli.main import main
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.files.local import write_json
from pi05_lightning.sim.encoding import SETTINGS, encode_video
from pi05_lightning.training.run_directory import write_config
from pi05_lightning.weights.abilities import Trained
from pi05_lightning.weights.folder import save
from pi05_lightning.weights.locate import locate
from tests.untrained import untrained_model

from .loopback_hub import Hub, reached

MODEL, DATA = "models/lab/arm", "datasets/lab/drawers"
PATHS = {"robot": "/secret/place/kitchen", "above": "../secret/bathroom", "below": "secret/place/cellar"}
ENV = "lab.Kitchen(scene='/secret/place/x.xml', skins=(\"../secret/it's.png\",), task='open / shut')"


@pytest.fixture(scope="module")
def pushed(policy: Pi05Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub that a run was pushed to."""
    here = tmp_path_factory.mktemp("pushed")
    with reached(here / "cache") as hub:
        make_run(here / "run", policy)
        main(["push", str(here / "run"), "lab/arm", "--license", "apache-2.0", "--private"])
        yield hub


@pytest.fixture(scope="module")
def policy(pictures: Path) -> Pi05Policy:
    """Untrained, of a dataset that has a place on this machine."""
    model = untrained_model()
    data = Pi05DataModule({"robot": LeRobotConfig(str(pictures))}, shapes=model.config.shapes)
    made = Pi05Policy((model, data.processor))
    made.trained = Trained({"pretrain": 3, "posttrain": 5}, {"flow": 5}, complete=True)
    return made


def write_film(file: Path, grey: int) -> bytes:
    """Four frames of one shade. Returns what was written."""
    encode_video(file, np.full((4, 32, 32, 3), grey, np.uint8), 8, **SETTINGS)
    return file.read_bytes()


def make_run(run: Path, policy: Pi05Policy) -> None:
    """A run's directory that holds weights, a rollout with a film, metrics, and paths of this machine."""
    save(run, policy.model, policy.processor, policy.trained)
    sources = {name: {"init_args": {"path": path}} for name, path in PATHS.items()}
    language = {"prompts": {"action": "... ~{task} /"}}
    config = {
        "data": {"fast": "/secret/place/fast", "tokenizer": "~secret/words", "sources": sources, "language": language},
        "seed_everything": 0,
        "model": {"init_from": "lab/before"},
        "trainer": {"logger": {"tracking_uri": "http://me:secret@flow.lab/x", "save_dir": "file:/secret/runs"}},
    }
    write_config(run, yaml.safe_dump(config))
    success = {"policy": {"open-drawer": [9, 10]}, "random": {"open-drawer": [0, 10]}}
    film = {"mode": "policy", "task": "open-drawer", "seed": 3, "number": 1, "outcome": "failed: out of time"}
    measured = {"sha256": locate(run).content_hash(), "seed": 5, "max_seconds": {"open-drawer": 4.0}}
    result = {
        "success": success,
        "acting": {"policy": {"noise_scale": 0.5, "execution_horizon": 1}},
        **measured,
        "env": ENV,
    }
    write_json(run / "rollout" / "rollout.json", result | {"films": {"one.mp4": film}})
    write_film(run / "rollout" / "one.mp4", 0)
    write_json(run / "metrics.json", {"robot/continuous_robot_actions": {"samples": 4, "action_mae": 0.25}})
    write_json(run / "measured.json", {"sha256": measured["sha256"]})
    versions = {"pi05_lightning": "0.2.0"}
    hub = {"init_from": "lab/before", "data": {}}
    samples = {"robot/qa": {"train": 7, "val": 2}}
    write_json(run / "provenance.json", {"samples": samples, "versions": versions, "hub": hub})


@pytest.fixture
def run(policy: Pi05Policy, tmp_path: Path) -> Path:
    make_run(tmp_path / "run", policy)
    return tmp_path / "run"


def chunk(policy: Pi05Policy) -> np.ndarray:
    images = {camera: torch.zeros(3, 9, 9) for camera in policy.inputs.cameras}
    noise = torch.zeros(policy.model.config.horizon, policy.model.config.action_dim)
    task = policy.processor.robots[policy.robot].tasks[0]
    return policy.predict_chunk({"image": images, "state": torch.zeros(3), "task": task}, noise)


def test_pushed_policy_is_loaded_from_the_hub_and_acts_the_same(pushed: Hub, policy: Pi05Policy) -> None:
    assert pushed.commits == 1
    assert (chunk(Pi05Policy.from_pretrained("lab/arm")) == chunk(policy)).all()


@pytest.mark.usefixtures("pushed")
def test_lerobot_reads_the_pushed_configuration() -> None:
    from lerobot.configs import PreTrainedConfig

    import lerobot_policy_pi05_lightning  # noqa: F401

    config = PreTrainedConfig.from_pretrained("lab/arm")
    assert config.type == "pi05_lightning"
    assert config.output_features["action"].shape == (2,)


def test_card_says_data_stages_results_and_licence(pushed: Hub, tmp_path: Path) -> None:
    files = pushed.repositories[MODEL]
    assert pushed.private == {MODEL}
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "robotics"
    assert card.data.base_model == "lab/before"
    assert [result.metric_value for result in card.data.eval_results] == [0.9]
    for said in (
        "| posttrain | 5 |",
        "| robot/qa | kitchen | 7 | 2 |",
        "| open-drawer | 9/10 (0.60–0.98) | 0/10 (0.00–0.28) |",
        r"| robot/continuous\_robot\_actions | 4 | 0.250 |",
        "films/one.mp4",
        "policy, subtask first · open-drawer · initial state 1 (seed 3): failed: out of time",
        "| time limit | 4 s |",
        """| simulator | lab.Kitchen(scene='x.xml', skins=("it's.png",), task='open / shut') |""",
        "action of 2, chunks of 8, 10 actions per second |",
        "| noise | × 0.5 |",
        'Pi05Policy.from_pretrained("lab/arm")',
        "--policy.path=lab/arm",
    ):
        assert said in card.text, said
    assert files["films/one.mp4"] == write_film(tmp_path / "one.mp4", 0)


@pytest.mark.parametrize(
    "text",
    [
        "put the <red> block into *bin 2*",
        "a|b\\|c",
        "# one\ntwo",
        "`go` to __it__ & wait",
        "~~no~~ [see](it) &lt;",
        "> 5",
    ],
)
def test_card_shows_instructions_cells_and_captions_as_they_are(
    hub: Hub, policy: Pi05Policy, tmp_path: Path, text: str
) -> None:
    robots = policy.processor.robots
    kept = robots["robot"]
    robots["robot"] = replace(kept, tasks=(text,))
    try:
        make_run(tmp_path / "run", policy)
    finally:
        robots["robot"] = kept
    file = tmp_path / "run" / "rollout" / "rollout.json"
    result = json.loads(file.read_text())
    film = result["films"]["one.mp4"] | {"outcome": text}
    write_json(file, result | {"success": {"policy": {text: [9, 10]}}, "films": {"one.mp4": film}})
    main(["push", str(tmp_path / "run"), "lab/arm"])
    card = ModelCard(hub.repositories[MODEL]["README.md"].decode())
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(card.text)
    shown = html.escape(text.replace("\n", " "))
    for place in (f"<li>{shown}</li>", f"<td>{shown}</td>", f"initial state 1 (seed 3): {shown}</p>"):
        assert place in page, place


@pytest.mark.parametrize("held_out", [True, False])
def test_card_calls_initial_states_held_out_where_that_is_known(hub: Hub, run: Path, held_out: bool) -> None:
    result = json.loads((run / "rollout" / "rollout.json").read_text())
    write_json(run / "rollout" / "rollout.json", result | {"held_out": held_out})
    main(["push", str(run), "lab/arm"])
    card = ModelCard(hub.repositories[MODEL]["README.md"].decode())
    assert ("on initial states not trained on" in card.text) is held_out
    assert [result.dataset_name.startswith("10 held-out") for result in card.data.eval_results] == [held_out]


def test_no_path_of_this_machine_is_published(pushed: Hub, pictures: Path) -> None:
    files = pushed.repositories[MODEL]
    published = yaml.safe_load(files["run.yaml"])
    assert [published["data"][name] for name in ("fast", "tokenizer")] == ["fast", "words"]
    assert published["data"]["language"]["prompts"]["action"] == "... ~{task} /"
    paths = {name: source["init_args"]["path"] for name, source in published["data"]["sources"].items()}
    assert paths == {"robot": "kitchen", "above": "bathroom", "below": "cellar"}
    assert published["trainer"]["logger"] == {"tracking_uri": "http://flow.lab/x", "save_dir": "file:runs"}
    told = [name for name, content in files.items() if str(pictures.parent).encode() in content or b"secret" in content]
    assert told == []


def test_dry_run_shows_folder_and_card_and_sends_nothing(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["push", str(run), "lab/arm", "--dry-run", "--out", str(tmp_path / "kept")])
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown
    assert "# arm" in shown
    assert "No licence is stated" in shown
    assert hub.repositories == {}
    assert (tmp_path / "kept" / "README.md").read_text() in shown


def test_failed_push_leaves_what_readers_saw_and_goes_on_where_it_was(hub: Hub, run: Path) -> None:
    main(["push", str(run), "lab/arm"])
    before = dict(hub.repositories[MODEL])
    write_film(run / "rollout" / "one.mp4", 100)
    second = write_film(run / "rollout" / "two.mp4", 200)
    result = json.loads((run / "rollout" / "rollout.json").read_text())
    write_json(
        run / "rollout" / "rollout.json", result | {"films": result["films"] | {"two.mp4": result["films"]["one.mp4"]}}
    )
    hub.sent.clear()
    hub.refuse_objects_after = 1
    with pytest.raises(SystemExit, match=r"the push to lab/arm failed .* readers see none of it"):
        main(["push", str(run), "lab/arm"])
    assert hub.repositories[MODEL] == before
    assert len(hub.sent) == 1
    hub.refuse_objects_after, hub.refuse_commits = None, True
    with pytest.raises(SystemExit, match="readers see none of it"):
        main(["push", str(run), "lab/arm"])
    assert hub.repositories[MODEL] == before
    hub.refuse_commits = False
    main(["push", str(run), "lab/arm"])
    assert hub.repositories[MODEL]["films/two.mp4"] == second
    assert len(hub.sent) == len(set(hub.sent)) == 2


def test_names_are_the_hubs_only_where_the_run_took_them_from_there(
    hub: Hub, policy: Pi05Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever folders there are where it is pushed."""
    monkeypatch.chdir(tmp_path)
    robots = policy.processor.robots
    kept = robots["robot"]
    config = {
        "data": {"sources": {"robot": {"init_args": {"path": "data/drawers"}}}},
        "model": {"init_from": "runs/base"},
    }
    for name, is_known in (("local", False), ("known", True)):
        robots["robot"] = replace(kept, dataset="data/drawers", is_on_hub=is_known)
        try:
            make_run(tmp_path / name, policy)
        finally:
            robots["robot"] = kept
        write_config(tmp_path / name, yaml.safe_dump(config))
        about = json.loads((tmp_path / name / "provenance.json").read_text())
        del about["hub"]
        if is_known:
            about["hub"] = {"init_from": "runs/base", "data": {"robot": "data/drawers"}}
            (tmp_path / "data").mkdir()
            (tmp_path / "runs").mkdir()
        write_json(tmp_path / name / "provenance.json", about)
        main(["push", str(tmp_path / name), "lab/arm"])
        card = ModelCard(hub.repositories[MODEL]["README.md"].decode())
        assert card.data.base_model == ("runs/base" if is_known else None)
        assert card.data.datasets == (["data/drawers"] if is_known else None)
        dataset = "data/drawers" if is_known else "drawers"
        assert f"| robot/qa | {dataset} | 7 | 2 |" in card.text
        published = yaml.safe_load(hub.repositories[MODEL]["run.yaml"])
        assert published["data"]["sources"]["robot"]["init_args"]["path"] == dataset


def test_what_a_later_push_does_not_write_leaves_with_it(hub: Hub, run: Path) -> None:
    main(["push", str(run), "lab/arm"])
    assert {"films/one.mp4", "run.yaml"} <= hub.repositories[MODEL].keys()
    shutil.rmtree(run / "rollout")
    main(["push", str(run), "lab/arm"])
    assert "films/one.mp4" not in hub.repositories[MODEL]
    Pi05Policy.from_pretrained(run).push_to_hub("lab/arm")
    assert "run.yaml" not in hub.repositories[MODEL]
    assert "model.safetensors" in hub.repositories[MODEL]


def test_licence_that_the_hub_does_not_know_has_a_name_and_a_link(hub: Hub, run: Path, pictures: Path) -> None:
    named = ["--license", "other", "--license_name", "lab-1", "--license_link", "https://lab.example/licence"]
    main(["push", str(run), "lab/arm", *named])
    main(["push", str(pictures), "lab/drawers", *named])
    for place in (MODEL, DATA):
        metadata = ModelCard(hub.repositories[place]["README.md"].decode()).data.to_dict()
        assert [metadata[key] for key in ("license", "license_name")] == ["other", "lab-1"]
        assert metadata["license_link"] == "https://lab.example/licence"
    assert "[lab-1](https://lab.example/licence)" in hub.repositories[MODEL]["README.md"].decode()
    for given in (named[:2], named[:4], ["--license", "mit", *named[2:]]):
        with pytest.raises(SystemExit, match="is `other` with a name and a link"):
            main(["push", str(run), "lab/arm", *given])


def test_films_that_are_gone_leave_with_the_next_push_and_other_files_stay(hub: Hub, run: Path) -> None:
    main(["push", str(run), "lab/arm"])
    hub.repositories[MODEL]["theirs.md"] = b"kept"
    hub.repositories[MODEL]["films/old.mp4"] = b"gone"
    write_film(run / "rollout" / "one.mp4", 100)
    main(["push", str(run), "lab/arm"])
    assert "films/old.mp4" not in hub.repositories[MODEL]
    assert hub.repositories[MODEL]["theirs.md"] == b"kept"


def test_damaged_film_is_left_out_and_named(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (run / "rollout" / "one.mp4").read_bytes()
    (run / "rollout" / "one.mp4").write_bytes(whole[: len(whole) // 2])
    main(["push", str(run), "lab/arm", "--license", "mit"])
    assert "left out, as they cannot be read: " in capsys.readouterr().out
    assert "films/one.mp4" not in hub.repositories[MODEL]
    assert "one.mp4" not in hub.repositories[MODEL]["README.md"].decode()


def test_metrics_of_other_weights_are_left_out(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(run / "measured.json", {"sha256": "of others"})
    main(["push", str(run), "lab/arm", "--license", "mit"])
    assert "metrics.json is not known to be of these weights" in capsys.readouterr().out
    assert "## Metrics on validation data" not in hub.repositories[MODEL]["README.md"].decode()


def test_metrics_of_the_other_kind_of_a_checkpoints_weights_say_how_to_have_these(
    hub: Hub, run: Path, policy: Pi05Policy, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"model": policy.model.config.to_dict(), "processor": policy.processor.to_dict()}
    weights = {f"model.{name}": tensor for name, tensor in policy.model.state_dict().items()}
    average = {name: parameter + 1 for name, parameter in policy.model.named_parameters()}
    torch.save({"pi05": about, "state_dict": weights, "ema": average, "global_step": 8}, run / "last.ckpt")
    (run / "model.safetensors").unlink()  # the same as in the checkpoint, so what was measured is its trained weights
    main(["push", str(run), "lab/arm", "--dry-run"])
    mend = f"Run `pi05 validate {run} --ema.validate true` first, or push with --averaged false"
    assert mend in capsys.readouterr().out
    main(["push", str(run), "lab/arm", "--dry-run", "--averaged", "false"])
    assert "left out" not in capsys.readouterr().out
    write_json(run / "measured.json", {"sha256": locate(run).content_hash()})
    main(["push", str(run), "lab/arm", "--dry-run", "--averaged", "false"])
    assert "--ema.validate false` first, or push without --averaged false" in capsys.readouterr().out


def test_card_says_with_which_other_options_metrics_were_measured(hub: Hub, run: Path) -> None:
    measured = json.loads((run / "measured.json").read_text())
    other = {"options": {"trainer.limit_val_batches": 2}, "paths": {"robot": "secret/place/bathroom"}}
    write_json(run / "measured.json", measured | other)
    main(["push", str(run), "lab/arm"])
    card = hub.repositories[MODEL]["README.md"].decode()
    assert "| data.sources.robot.path | bathroom | kitchen |" in card
    assert "trainer.limit" not in card  # the configuration says nothing else
    assert "secret" not in card
    write_json(run / "measured.json", measured | {"paths": {"robot": "/secret/copy/kitchen"}})
    main(["push", str(run), "lab/arm"])
    assert "measured with other options" not in hub.repositories[MODEL]["README.md"].decode()


def test_success_and_films_of_other_weights_are_left_out(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((run / "rollout" / "rollout.json").read_text())
    write_json(run / "rollout" / "rollout.json", result | {"sha256": "of others"})
    main(["push", str(run), "lab/arm", "--license", "mit"])
    assert "rollout.json is of other weights" in capsys.readouterr().out
    assert "films/one.mp4" not in hub.repositories[MODEL]
    card = ModelCard(hub.repositories[MODEL]["README.md"].decode())
    assert card.data.eval_results is None
    assert "open-drawer | 9/10" not in card.text


def test_public_repository_is_not_taken_for_a_private_one(hub: Hub, run: Path) -> None:
    main(["push", str(run), "lab/arm"])
    before = dict(hub.repositories[MODEL])
    write_film(run / "rollout" / "one.mp4", 100)
    with pytest.raises(SystemExit, match="lab/arm is there already, and is public"):
        main(["push", str(run), "lab/arm", "--private"])
    assert hub.repositories[MODEL] == before


def test_all_that_the_hub_says_of_a_card_is_told(hub: Hub, run: Path) -> None:
    hub.wrong_metadata = '"license" must be one of [apache-2.0, mit]'
    with pytest.raises(SystemExit, match=r'"license" must be one of'):
        main(["push", str(run), "lab/arm", "--license", "apache2"])


def test_policy_pushes_itself(hub: Hub, policy: Pi05Policy, tmp_path: Path) -> None:
    address = policy.push_to_hub("lab/arm", license="mit")
    assert address.startswith(hub.address)
    policy.save_pretrained(tmp_path / "here")
    opened = Pi05Policy.from_pretrained("lab/arm")
    assert (chunk(opened) == chunk(Pi05Policy.from_pretrained(tmp_path / "here"))).all()
    assert opened.trained == policy.trained


def test_policy_of_two_robots_is_ours_alone_until_one_is_named(hub: Hub, policy: Pi05Policy, tmp_path: Path) -> None:
    processor = policy.processor
    robot = processor.robots["robot"]
    processor.robots["other"] = replace(robot, tasks=("wave",))
    try:
        save(tmp_path / "two", policy.model, processor)
        main(["push", str(tmp_path / "two"), "lab/arm"])
        assert "LeRobot takes policies of one robot" in hub.repositories[MODEL]["README.md"].decode()
        write_json(
            tmp_path / "two" / "metrics.json",
            {f"{name}/qa": {"samples": 4, "exact_match": 0.5} for name in ("robot", "other")},
        )
        write_config(tmp_path / "two", "seed_everything: 0")
        sha256 = locate(tmp_path / "two").content_hash()
        write_json(tmp_path / "two" / "measured.json", {"sha256": sha256})
        acting = {"robot": "robot", "noise_scale": 0.5, "execution_horizon": 1}
        rolled_out = {"success": {"policy": {"open-drawer": [9, 10]}}, "acting": {"policy": acting}}
        write_json(tmp_path / "two" / "rollout" / "rollout.json", rolled_out | {"sha256": sha256})
        main(["push", str(tmp_path / "two"), "lab/arm", "--robot", "robot"])
        assert "9/10" in hub.repositories[MODEL]["README.md"].decode()
        main(["push", str(tmp_path / "two"), "lab/arm", "--robot", "other"])
        card = hub.repositories[MODEL]["README.md"].decode()
        assert "9/10" not in card
        assert "| other/qa |" in card
        assert "| robot/qa |" not in card
        assert "--policy.path=lab/arm" in hub.repositories[MODEL]["README.md"].decode()
    finally:
        del processor.robots["other"]


@pytest.mark.parametrize(
    ("source", "repo", "said"),
    [
        ("missing", "lab/arm", "missing"),
        (".", "arm", "arm is no name of a repository"),
        (".", "lab/arm", "neither a checkpoint nor"),
    ],
)
def test_what_cannot_be_pushed_is_refused(hub: Hub, tmp_path: Path, source: str, repo: str, said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        main(["push", str(tmp_path / source), repo])
    assert hub.repositories == {}
