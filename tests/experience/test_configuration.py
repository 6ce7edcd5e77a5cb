"""What a round trains on: which datasets, read how, and how often each of them is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pi05_lightning.cli import value_fit
from pi05_lightning.data.processor import Language
from pi05_lightning.experience.reading import CLASS_PATH, Reading, last_stage
from pi05_lightning.experience.rounds import METHODS, AttemptSummary, Method, configuration
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.value import ValueHead
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Modality
from pi05_lightning.weights.folder import save
from tests.experience.attempts import SUCCESSES, TRAINING


def test_frames_of_either_sign_are_drawn_as_often_and_corrections_as_both() -> None:
    signs = dict.fromkeys(["positive", "negative"], 0.075)
    first, alone = AttemptSummary("tries", Path("labels")), AttemptSummary("more", Path("more_labels"), corrected=False)
    assert shares("recap", [first]) == pytest.approx(
        {"demonstrations_0": 0.4, "positive_0": 0.15, "negative_0": 0.15, "corrections_0": 0.3}
    )
    assert shares("recap", [first, alone]) == pytest.approx(
        {
            "demonstrations_0": 0.4,
            **{f"{sign}_0": share for sign, share in signs.items()},
            "corrections_0": 0.15,
            **{f"{sign}_1": 2 * share for sign, share in signs.items()},
        }
    )


def test_rounds_without_corrections_or_successes_are_left_out_and_refused_where_none_has_them() -> None:
    good, bad = AttemptSummary("good"), AttemptSummary("bad", corrected=False, successes=[])
    assert shares("dagger", [bad, good]) == pytest.approx({"demonstrations_0": 0.4, "corrections_1": 0.6})
    assert shares("successes", [good, bad]) == pytest.approx({"demonstrations_0": 0.4, "successes_0": 0.6})
    with pytest.raises(ValueError, match="dagger has nothing to learn from: the expert never took over in bad"):
        shares("dagger", [bad])
    only_negative = AttemptSummary("failed", Path("labels"), ("negative",), corrected=False)
    assert shares("recap", [only_negative]) == pytest.approx({"demonstrations_0": 0.4, "negative_0": 0.6})
    all_corrected = AttemptSummary("driven", Path("labels"), ())
    assert shares("recap", [all_corrected]) == pytest.approx({"demonstrations_0": 0.4, "corrections_0": 0.6})
    with pytest.raises(ValueError, match="successes has nothing to learn from: no attempt succeeded without"):
        shares("successes", [bad, bad])


def shares(method: Method, tries: Sequence[AttemptSummary]) -> dict[str, float]:
    """Of the draws, by the sources' names."""
    (stage,) = configuration(method, Path("policy"), Reading(), ["demos"], tries, TRAINING)["stages"]["then"]
    return {name.partition("/")[0]: share for name, share in stage["mixture"].items()}


def test_stage_goes_on_with_what_the_policy_was_last_trained_on(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    words = {"class_path": "VisionTextConfig", "init_args": {"path": str(tmp_path / "web")}}
    gone = {"class_path": "VisionTextConfig", "init_args": {"path": str(tmp_path / "gone")}}
    mixture = {"arm/continuous_robot_actions": 0.8, "arm/qa": 0.1, "web/qa": 0.04, "gone/qa": 0.04, "other/qa": 0.02}
    stage = {"losses": {"text": 1.0, "flow": 1.0}, "mixture": mixture, "flow_alpha": 3.0}
    reading = Reading(fast="fast", stage=stage, sources={"web": words, "gone": gone}, cameras=("wrist", "top"))
    reading.sources["arm"] = reading.source("runs/demo/data/robot", "")
    found = configuration(
        "recap",
        tmp_path,
        reading,
        ["runs/demo/data/../data/robot"],
        [AttemptSummary("tries", tmp_path / "labels", corrected=False)],
        TRAINING,
    )
    assert found["data"]["cameras"] == ["wrist", "top"]  # whatever the order of the sources
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


class HeadOfAnswers(ValueHead):
    """Learns from questions alone."""

    terms: ClassVar = {"answers": frozenset({Modality.QA})}


@pytest.mark.parametrize(
    ("rest", "losses"),
    [
        ({"web/qa": 0.2}, {"subtask": 1.0, "fast": 0.0, "flow": 1.0, "others": {}}),
        ({"arm/qa": 0.2}, {"text": 1.0, "subtask": 1.0, "fast": 0.0, "flow": 1.0, "others": {"answers": 0.5}}),
    ],
)
def test_a_loss_of_which_all_data_is_gone_is_left_out(
    rest: dict[str, float], losses: dict[str, Any], tmp_path: Path
) -> None:
    own = {"text": 1.0, "subtask": 1.0, "fast": 0.0, "flow": 1.0, "others": {"answers": 0.5}}
    stage = {"losses": own, "mixture": {"arm/continuous_robot_actions": 0.8} | rest}
    head = {"class_path": f"{__name__}.{HeadOfAnswers.__name__}"}
    gone = {"class_path": "VisionTextConfig", "init_args": {"path": str(tmp_path / "gone")}}
    reading = Reading(
        stage=stage, sources={"web": gone}, model={"heads": {"answers": head}}, language={"condition_on": "both"}
    )
    reading.sources["arm"] = reading.source("demos", "")
    found = configuration("recap", tmp_path, reading, ["demos"], [AttemptSummary("tries", Path("labels"))], TRAINING)
    assert found["stages"]["then"][0]["losses"] == losses


def test_each_dataset_is_read_as_the_policy_read_it_and_attempts_as_its_robots(tmp_path: Path) -> None:
    read = {
        "arm": {"cameras": {"observation.image": "front"}},
        "other": {"cameras": {"observation.rgb": "front"}, "relative_dims": [1]},
    }
    sources = {
        name: {
            "class_path": CLASS_PATH,
            "init_args": {**options, "path": str(tmp_path / name), "episodes": "length > 9"},
        }
        for name, options in read.items()
    }
    demonstrations = [str(tmp_path / "other"), str(tmp_path / "arm"), str(tmp_path / "new")]
    found = configuration(
        "successes",
        tmp_path,
        Reading(sources=sources),
        demonstrations,
        [AttemptSummary("tries", successes=SUCCESSES)],
        TRAINING,
    )
    read_as = {name: source["init_args"] for name, source in found["data"]["sources"].items()}
    assert "cameras" not in read_as["successes_0"]  # what collects them names them as the policy does
    assert read_as["successes_0"]["relative_dims"] == [1]
    cameras = {name: options["cameras"] for name, options in read_as.items() if name != "successes_0"}
    as_other = read["other"]["cameras"]
    arm = read["arm"]["cameras"]
    assert cameras == {"other": as_other, "arm": arm, "demonstrations_2": as_other}
    episodes = {name: options.get("episodes") for name, options in read_as.items()}
    own = {"other": "length > 9", "arm": "length > 9", "demonstrations_2": None}
    assert episodes == {**own, "successes_0": SUCCESSES}


def test_paths_below_home_are_those_of_the_policys_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "web").mkdir()
    words = {name: {"class_path": "VisionTextConfig", "init_args": {"path": f"~/{name}"}} for name in ("web", "gone")}
    reading = Reading(sources=words)
    reading.sources["arm"] = reading.source("~/arm", "")
    assert reading.name_of(str(tmp_path / "arm")) == "arm"
    assert [*reading.others] == ["web"]


def test_attempts_are_read_with_all_episodes_whichever_the_policy_was_trained_on(tmp_path: Path) -> None:
    """As where the policy is one of an earlier round of successes."""
    paths = {name: str(tmp_path / name) for name in ("arm", "successes_0")}
    read = {
        name: {"class_path": CLASS_PATH, "init_args": {"path": path, "episodes": "success"}}
        for name, path in paths.items()
    }
    reading, demonstrations, tries = (
        Reading(sources=read),
        [paths["arm"]],
        [AttemptSummary(paths["successes_0"], Path("signs"))],
    )
    sources = configuration("recap", tmp_path, reading, demonstrations, tries, TRAINING)["data"]["sources"]
    episodes = {name: source["init_args"].get("episodes") for name, source in sources.items()}
    assert episodes == {"arm": "success", "positive_0": None, "negative_0": None, "corrections_0": None}
    of_value = [reading.options(path, paths["arm"], attempts=name != "arm") for name, path in paths.items()]
    assert [options.get("episodes") for options in of_value] == ["success", None]


def test_demonstrations_of_corrections_alone_stay_so(tmp_path: Path) -> None:
    """What the policy did in them before is no demonstration."""
    path, read = str(tmp_path / "corrected"), {"frames": "corrections"}
    reading = Reading(sources={"expert": {"class_path": CLASS_PATH, "init_args": {"path": path} | read}})
    for method in METHODS:
        tries = AttemptSummary("tries", Path("signs"))
        sources = configuration(method, tmp_path, reading, [path], [tries], TRAINING)["data"]["sources"]
        assert sources["expert"]["init_args"]["frames"] == "corrections"
    read["frames"] = "negative"
    reading = Reading(sources={"negative_0": {"class_path": CLASS_PATH, "init_args": {"path": path} | read}})
    with pytest.raises(ValueError, match="was read with `frames: negative`, as 'negative_0': it holds attempts"):
        configuration("recap", tmp_path, reading, [path], [tries], TRAINING)


def test_no_dataset_takes_the_name_of_another(tmp_path: Path) -> None:
    """The policy is one of rounds, which called its data as these would."""
    words = {"class_path": "VisionTextConfig", "init_args": {"path": str(tmp_path)}}
    read = {name: str(tmp_path / name) for name in ("demonstrations_0", "successes_0", "demonstrations_0_2")}
    stage = {"mixture": {"demonstrations_0/continuous_robot_actions": 0.9, "successes_1/qa": 0.1}}
    reading = Reading(stage=stage, sources={"successes_1": words})
    reading.sources.update({n: {"class_path": CLASS_PATH, "init_args": {"path": p}} for n, p in read.items()})
    new = str(tmp_path / "new")
    demonstrations, tries = (
        [new, read["demonstrations_0"], read["successes_0"]],
        [AttemptSummary("tries"), AttemptSummary("more")],
    )
    found = configuration("successes", tmp_path, reading, demonstrations, tries, TRAINING)
    sources = found["data"]["sources"]
    assert sources.pop("successes_1") == words
    assert {name: source["init_args"]["path"] for name, source in sources.items()} == {
        "demonstrations_0_3": new,
        "demonstrations_0": read["demonstrations_0"],
        "successes_0": read["successes_0"],
        "successes_0_2": "tries",
        "successes_1_2": "more",
    }
    shares = found["stages"]["then"][0]["mixture"]
    assert {name.partition("/")[0] for name in shares} == {*sources, "successes_1"}
    assert sum(shares.values()) == pytest.approx(1)


def test_robot_of_the_attempts_is_the_one_that_is_named(tmp_path: Path) -> None:
    sources = {
        name: {"class_path": CLASS_PATH, "init_args": {"path": str(tmp_path / name), "same_robot_as": same}}
        for name, same in (("arm", None), ("more", "arm"), ("hand", None))
    }
    reading, demonstrations = Reading(sources=sources), [str(tmp_path / name) for name in sources]
    for robot, same in ((None, "arm"), ("more", "arm"), ("hand", "hand")):
        found = configuration(
            "successes", tmp_path, reading, demonstrations, [AttemptSummary("tries")], TRAINING, robot
        )
        robots = {name: s["init_args"]["same_robot_as"] for name, s in found["data"]["sources"].items()}
        assert robots == {"arm": None, "more": "arm", "hand": None, "successes_0": same}
    with pytest.raises(ValueError, match="the robot of 'arm'"):
        configuration("successes", tmp_path, reading, demonstrations[1:], [AttemptSummary("tries")], TRAINING)
    with pytest.raises(ValueError, match="robot 'leg'"):
        configuration("successes", tmp_path, reading, demonstrations, [AttemptSummary("tries")], TRAINING, "leg")


def test_value_takes_the_policys_precision_and_one_device(tmp_path: Path) -> None:
    reading = Reading(trainer={"accelerator": "gpu", "devices": 8, "strategy": "ddp", "precision": "bf16-mixed"})
    found = value_fit.configuration(tmp_path, reading, {}, steps=1, batch_size=1, lr=1.0)["trainer"]
    assert (found["accelerator"], found["precision"], found["devices"]) == ("gpu", "bf16-mixed", 1)
    assert "strategy" not in found


def test_learning_rate_is_the_policys_where_none_is_given(tmp_path: Path) -> None:
    reading = Reading(lr=2.5e-5)
    of_policy = configuration("demonstrations", tmp_path, reading, ["demos"], [], replace(TRAINING, lr=None))
    of_value = value_fit.configuration(tmp_path, reading, {}, steps=1, batch_size=1, lr=None)
    assert [found["model"]["optimizer"]["init_args"]["lr"] for found in (of_policy, of_value)] == [2.5e-5] * 2


def test_a_stage_that_drew_all_there_was_is_spelled_out() -> None:
    losses = {"text": 0.0, "subtask": 1.0, "flow": 1.0, "others": {}}
    stages = {
        "pretrain_steps": 1,
        "pretrain": {"losses": {**losses, "flow": 0.0}},
        "posttrain_steps": 1,
        "posttrain": {
            "losses": losses,
            "mixture": {},
            "mixture_temperature": 0.5,
            "lr_factors": {"lora_B": 2.0, "flow_head": 0.5},
        },
        "flow_alpha": 10.0,
        "then": [],
    }
    names = ("arm/continuous_robot_actions", "arm/hl_subtask", "arm/fast_robot_actions", "web/web_caption")
    samples = {name: {"train": n, "val": 1} for name, n in zip(names, (100, 25, 100, 9), strict=True)}
    found = last_stage(stages, {}, samples, Language())
    assert found["mixture"] == pytest.approx({names[0]: 2 / 3, names[1]: 1 / 3})
    found = last_stage(stages, {}, samples, Language(condition_on="both"))
    assert found["mixture"] == pytest.approx({names[0]: 0.4, names[1]: 0.2, names[2]: 0.4})
    assert found["lr_factors"] == {"flow_head": 0.5}
    with pytest.raises(ValueError, match="drew from all its data"):
        last_stage(stages, {}, {}, Language())


def test_weights_without_a_configuration_are_refused(tmp_path: Path) -> None:
    save(tmp_path, Pi05(ModelConfig.preset("debug")))
    with pytest.raises(ValueError, match="carries no configuration"):
        Reading.of(tmp_path)
