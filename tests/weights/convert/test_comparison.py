"""An export is opened by stock LeRobot and compared with the policy; what LeRobot would do otherwise is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.peer import lerobot_sizes
from pi05_lightning import Pi05Policy
from pi05_lightning.cli.convert import answers_of, convert
from pi05_lightning.data.processor import Language, Processor
from pi05_lightning.data.prompt import Prompts
from pi05_lightning.data.transforms import Normalize, Quantiles, RelativeActions
from pi05_lightning.files.local import write_json
from pi05_lightning.models.config import GemmaConfig, ModelConfig
from pi05_lightning.types import Frame
from pi05_lightning.weights.abilities import ADVANTAGE, Trained
from pi05_lightning.weights.folder import TRAINED, save
from pi05_lightning.weights.lerobot import lerobot_tensors
from pi05_lightning.weights.lerobot_check import as_lerobot_uses_it, differences, misfits, open_lerobot
from pi05_lightning.weights.lerobot_processor import cameras
from pi05_lightning.weights.locate import locate

from .conftest import CONFIG, export

Save = Callable[..., Path]


@pytest.fixture
def saved(ours: Path, tmp_path: Path) -> Save:
    """The policy as if it had been trained here, its processor changed."""

    def write(change: Callable[[Processor], object] = lambda processor: None, **options) -> Path:
        processor = locate(ours).processor()
        change(processor)
        save(tmp_path / "trained", locate(ours).model(), processor, **options)
        return tmp_path / "trained"

    return write


def with_prompts(**changes: object) -> Callable[[Processor], None]:
    def change(processor: Processor) -> None:
        prompts = replace(processor.language.prompts, **changes)
        processor.language = replace(processor.language, prompts=prompts)

    return change


def with_robot(**changes: object) -> Callable[[Processor], None]:
    def change(processor: Processor) -> None:
        (name,) = processor.acting
        processor.robots[name] = replace(processor.robots[name], **changes)

    return change


def on_subtasks(processor: Processor) -> None:
    processor.language = Language(prompts=Prompts(clip_state=False), condition_on="subtask")


UNLIKE_LEROBOT = {
    "state_bins": (with_prompts(clip_state=True), "clip_state: false"),
    "prompt": (with_prompts(action="{task} <- {state}"), "LeRobot's prompt is 'Task: "),
    "subtasks": (on_subtasks, "condition_on: task"),
    "relative_actions": (with_robot(relative=RelativeActions((0,), (1,))), "relative_dims"),
}


# --- what LeRobot does as the policy does


def test_comparison_is_reported(saved: Save, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    export(saved(), tmp_path / "out", tokenizer=str(tokenizer))
    out = capsys.readouterr().out
    assert "compared with stock LeRobot on 0 recorded and 2 made-up frames" in out
    assert "not verified" not in out
    assert "otherwise" not in out


def test_tokenizer_that_is_not_at_hand_is_said_not_to_be_verified(
    saved: Save, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    export(saved(), tmp_path / "out")
    assert "not verified: that the policy's tokenizer is google/paligemma-3b-pt-224" in capsys.readouterr().out


def test_another_tokenizer_than_lerobots_is_refused(saved: Save, tokenizer: Path, tmp_path: Path) -> None:
    """LeRobot's adds no <bos> here."""
    other = Path(shutil.copytree(tokenizer, tmp_path / "other"))
    values = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(values | {"post_processor": None}))
    with pytest.raises(ValueError, match=r"LeRobot's prompt has \d+ tokens"):
        export(saved(), tmp_path / "out", tokenizer=str(other))
    assert not (tmp_path / "out").exists()


def test_frames_of_a_dataset_are_compared(
    saved: Save, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def of_the_dataset(processor: Processor) -> None:
        quantiles = Quantiles(np.full(3, -2), np.full(3, 2)), Quantiles(np.full(2, 0), np.full(2, 10))
        with_robot(normalize=Normalize(*quantiles))(processor)

    export(saved(of_the_dataset), tmp_path / "out", data=str(videos))
    assert "compared with stock LeRobot on 3 recorded and 2 made-up frames" in capsys.readouterr().out


def test_robots_own_dataset_is_compared_where_it_is(
    saved: Save, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    quantiles = Quantiles(np.full(3, -2), np.full(3, 2)), Quantiles(np.full(2, 0), np.full(2, 10))
    export(saved(with_robot(normalize=Normalize(*quantiles), dataset=str(videos))), tmp_path / "out")
    assert "on 3 recorded and 2 made-up frames" in capsys.readouterr().out


def test_robot_of_several_is_written_with_its_own_cameras(
    saved: Save, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def joined_by_an_arm_of_one_camera(processor: Processor) -> None:
        (name,) = processor.acting
        processor.robots["arm"] = replace(processor.robots[name], cameras=("wrist",))

    export(saved(joined_by_an_arm_of_one_camera), tmp_path / "out", robot="arm")
    assert cameras(json.loads((tmp_path / "out" / "config.json").read_text())) == ("wrist",)
    assert "otherwise" not in capsys.readouterr().out


def test_dataset_without_one_of_the_cameras_is_none_of_the_robots(saved: Save, pictures: Path, tmp_path: Path) -> None:
    quantiles = Quantiles(np.full(3, -2), np.full(3, 2)), Quantiles(np.full(2, 0), np.full(2, 10))
    folder = saved(with_robot(normalize=Normalize(*quantiles)))
    with pytest.raises(ValueError, match=r"has the cameras \['top'\], .* the policy has \['top', 'wrist'\]"):
        export(folder, tmp_path / "out", data=str(pictures))


def test_states_that_a_policy_would_refuse_are_compared(saved: Save, videos: Path, tmp_path: Path) -> None:
    quantiles = Quantiles(np.full(3, -0.01), np.full(3, 0.01)), Quantiles(np.full(2, 0), np.full(2, 10))
    export(saved(with_robot(normalize=Normalize(*quantiles))), tmp_path / "out", data=str(videos))


def test_whoever_may_read_one_file_of_an_export_may_read_all(saved: Save, tmp_path: Path) -> None:
    export(saved(), tmp_path / "out")
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1
    assert any((tmp_path / "out").glob("policy_*.safetensors"))


def test_dataset_of_another_robot_is_refused(saved: Save, videos: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"is not of robot: .* 3 dimensions of state and 2 of action; the policy has .* 4 and 3"
    ):
        export(saved(), tmp_path / "out", data=str(videos))


def test_long_prompts_of_the_robots_tasks_are_not_cut(saved: Save, tmp_path: Path) -> None:
    task = "put the cup on the plate " * 60
    folder = saved(with_robot(tasks=(task,)))
    frame = Frame(task=task, state=np.zeros(4, np.float32))
    assert len(locate(folder).processor().prompt(frame, "robot").tokens) > 200
    export(folder, tmp_path / "out")


# --- what it does not


@pytest.mark.parametrize(("change", "message"), UNLIKE_LEROBOT.values(), ids=UNLIKE_LEROBOT.keys())
def test_what_lerobot_would_do_otherwise_is_refused_or_forced_and_said(
    saved: Save, tmp_path: Path, capsys: pytest.CaptureFixture, change: Callable[[Processor], object], message: str
) -> None:
    folder = saved(change)
    with pytest.raises(ValueError, match=message):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(folder, tmp_path / "out", force=True)
    assert message in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_policy_that_is_told_its_advantage_is_refused(saved: Save, tmp_path: Path) -> None:
    folder = saved()
    write_json(folder / TRAINED, asdict(Trained({"recap": 5}, {"flow": 5, ADVANTAGE: 5}, complete=True)))
    with pytest.raises(ValueError, match="LeRobot's prompt has no place for: there it acts as with --advantage none"):
        export(folder, tmp_path / "out")


def test_all_that_lerobot_would_do_otherwise_is_listed(saved: Save, tmp_path: Path) -> None:
    folder = saved(with_prompts(clip_state=True, action="{task} <- {state}"))
    with pytest.raises(ValueError, match=r"LeRobot's prompt is(.|\n)*clip_state: false(.|\n)*--force"):
        export(folder, tmp_path / "out")


def test_forced_state_bins_are_seen_to_differ(saved: Save, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    export(saved(with_prompts(clip_state=True)), tmp_path / "out", force=True)
    assert "frame 0: LeRobot's prompt has" in capsys.readouterr().out


def test_policy_without_a_state_is_written_and_compared_where_that_is_forced(
    saved: Save, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    normalize = Normalize(Quantiles(np.zeros(0), np.zeros(0)), Quantiles(np.full(2, 0), np.full(2, 10)))
    export(saved(with_robot(normalize=normalize)), tmp_path / "out", data=str(videos), force=True)
    out = capsys.readouterr().out
    assert "the policy was trained without a state, which LeRobot's prompt has to have" in out
    assert "on 3 recorded and 2 made-up frames" in out


def test_flow_head_that_was_never_trained_is_refused(saved: Save, tmp_path: Path) -> None:
    folder = saved(trained=Trained({"pretrain": 5}, {"fast": 5}, complete=True))
    with pytest.raises(ValueError, match="flow head was not trained"):
        export(folder, tmp_path / "out")


def test_size_that_lerobot_would_fill_with_random_weights_is_refused(
    saved: Save, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = saved()
    with pytest.raises(ValueError, match=r"published sizes alone: \d+ of \d+ tensors do not fit.*random\s+weights"):
        convert(source=folder, target=tmp_path / "out", format="lerobot")
    assert not (tmp_path / "out").exists()
    convert(source=folder, target=tmp_path / "out", format="lerobot", force=True)
    out = capsys.readouterr().out
    assert "random weights" in out
    assert "not compared" in out


def test_published_size_fits_lerobot_and_other_numbers_of_heads_do_not() -> None:
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    from pi05_lightning.models.pi05 import Pi05

    def tensors_of(config: ModelConfig) -> dict[str, torch.Tensor]:
        return lerobot_tensors(Pi05.without_memory(config).state_dict(), {})

    base = ModelConfig()
    assert misfits(PI05Config(device="cpu"), base, tensors_of(base)) == []
    wide = {"num_heads": 4, "head_dim": 512}  # the same query weights, in other heads
    gemmas = replace(base.language, **wide), replace(base.expert, **wide)
    other = replace(base, language=gemmas[0], expert=gemmas[1])
    assert "language.num_heads is 4, and LeRobot's is always 8" in misfits(PI05Config(device="cpu"), other, {})
    deep = replace(base, language=GemmaConfig(depth=17), expert=replace(base.expert, depth=17))
    assert "tensors do not fit" in misfits(PI05Config(device="cpu"), deep, tensors_of(deep))[0]


def test_lerobots_policy_with_other_weights_is_found_out(ours: Path, exported: Path, tmp_path: Path) -> None:
    """The comparison itself: one weight of an expert's layer, a hundredth of a percent of all, is another."""
    expected = answers_of(Pi05Policy(ours), None)
    tokenizer = as_lerobot_uses_it(locate(ours).processor().tokenizer)
    with lerobot_sizes(CONFIG):
        opened = open_lerobot(exported, tokenizer)
        assert differences(*opened, expected, 2e-3)[0] == []
        for file in exported.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(tmp_path / "model.safetensors")
        name = next(name for name in tensors if "action_out_proj" in name and name.endswith("bias"))
        save_file({**tensors, name: tensors[name] + 0.05}, tmp_path / "model.safetensors")
        problems, worst = differences(*open_lerobot(tmp_path, tokenizer), expected, 2e-3)
    assert problems == [p for p in problems if "an action of LeRobot's is off by" in p]
    assert len(problems) == 2
    assert worst > 2e-3
