"""Checkpoints that LeRobot itself wrote: into ours, and back into what LeRobot itself opens."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pi05_lightning.cli.convert import convert
from pi05_lightning.data.processor import Processor
from pi05_lightning.policy import Pi05Policy
from pi05_lightning.serving.reader import Reader
from pi05_lightning.serving.server import PolicyServer
from pi05_lightning.weights.lerobot import (
    EXPERT_LM_HEAD,
    LM_HEAD,
    PREFIX,
    to_lerobot,
    to_ours,
)
from pi05_lightning.weights.lerobot_folder import LeRobotFolder
from pi05_lightning.weights.lerobot_plugin import save_for_plugin
from pi05_lightning.weights.lerobot_processor import write_lerobot
from pi05_lightning.weights.locate import locate

from .conftest import (
    ACTION_DIM,
    CONFIG,
    EMBED_TOKENS,
    STATE_DIM,
    Copy,
    Predict,
    between_processors,
    export,
    open_lerobot,
)

# --- names


def test_every_key_of_lerobots_policy_has_its_place_and_comes_back(source: Path) -> None:
    keys = load_file(source / "model.safetensors").keys() - {PREFIX + LM_HEAD, PREFIX + EXPERT_LM_HEAD}
    renamed = {key: to_ours(key) for key in keys}
    assert None not in renamed.values()
    assert len(set(renamed.values())) == len(keys)
    assert all(to_lerobot(ours) == key for key, ours in renamed.items() if ours)


def test_report_counts_every_key(source: Path) -> None:
    report = LeRobotFolder(source).mapped.report()
    counts = [int(line.split(" × ")[0]) for line in report.splitlines() if " × " in line]
    assert sum(counts) == len(load_file(source / "model.safetensors"))


def test_dimensions_are_read_from_the_tensors(source: Path) -> None:
    assert locate(source).config() == CONFIG


def test_rate_is_told_where_it_is_said_and_goes_on_with_the_policy(
    source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    def served(path: Path) -> Any:
        policy = Pi05Policy(path, tokenizer=str(tokenizer) if path == source else None)
        return PolicyServer(policy, Reader(policy.inputs.cameras, {}, None)).metadata["fps"]

    convert(source=source, target=tmp_path / "at_30", tokenizer=str(tokenizer), fps=30)
    assert (served(source), served(tmp_path / "at_30")) == (None, 30)
    assert locate(tmp_path / "at_30").trained == LeRobotFolder.trained
    export(tmp_path / "at_30", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_text() == (source / "config.json").read_text()
    with pytest.raises(ValueError, match=r"fps: .* says that itself"):
        convert(source=tmp_path / "at_30", target=tmp_path / "again", fps=15)


def test_rate_can_be_said_once_it_is_ours_and_all_goes_back_as_it_came(
    source: Path, ours: Path, tmp_path: Path
) -> None:
    convert(source=ours, target=tmp_path / "at_30", fps=30)
    robot = locate(tmp_path / "at_30").processor().robots["robot"]
    assert (robot.fps, robot.fps_is_known) == (30, True)
    export(tmp_path / "at_30", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


# --- round trip


def test_round_trip_gives_the_same_file_byte_for_byte(source: Path, exported: Path) -> None:
    for file in source.iterdir():
        if file.name != "README.md":
            assert (exported / file.name).read_bytes() == file.read_bytes(), file.name


def test_round_trip_from_a_checkpoint_without_drift_gives_the_same_file(copy: Copy, tmp_path: Path) -> None:
    folder = copy(lambda tensors: tensors.update({PREFIX + LM_HEAD: tensors[EMBED_TOKENS].clone()}))
    convert(source=folder, target=tmp_path / "ours")
    kept = load_file(tmp_path / "ours" / "lerobot" / "unread.safetensors")
    assert PREFIX + LM_HEAD not in kept
    export(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_mixed_dtypes_keep_them_both_ways(copy: Copy, tmp_path: Path, dtype: torch.dtype) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if "norm" not in key and "vision" not in key:  # as LeRobot's own dtype: bfloat16
                tensors[key] = tensor.to(dtype)

    folder = copy(halve)
    convert(source=folder, target=tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_stock_lerobot_opens_the_export_and_predicts_the_same(
    source: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = open_lerobot(source)
    capsys.readouterr()
    policy = open_lerobot(exported)
    assert "All keys loaded successfully!" in capsys.readouterr().out
    batch = {
        "observation.images.top": torch.rand(1, 3, 60, 80),
        "observation.images.wrist": torch.rand(1, 3, 28, 28),
        "observation.language.tokens": torch.randint(2, 4096, (1, 9)),
        "observation.language.attention_mask": torch.ones(1, 9, dtype=torch.bool),
    }
    noise = torch.randn(1, CONFIG.horizon, CONFIG.action_dim)
    chunks = [p.predict_action_chunk(batch, noise=noise) for p in (reference, policy)]
    assert torch.equal(*chunks)


def test_export_of_a_model_that_never_was_lerobots_opens_in_stock_lerobot(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = Pi05Policy.from_pretrained(ours)
    policy.save_pretrained(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "out")
    capsys.readouterr()
    opened = open_lerobot(tmp_path / "out")
    assert "All keys loaded successfully!" in capsys.readouterr().out
    assert list(opened.config.image_features) == ["observation.images.top", "observation.images.wrist"]
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(state[PREFIX + LM_HEAD], state[EMBED_TOKENS])


def test_export_predicts_in_stock_lerobot_what_the_policy_predicts(ours: Path, tokenizer: Path, tmp_path: Path) -> None:
    """With the processors that the export wrote; only where the tokenizer is must be said."""
    policy = Pi05Policy.from_pretrained(ours)
    policy.save_pretrained(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "out")
    predict = between_processors(
        tmp_path / "out", overrides={"tokenizer_processor": {"tokenizer_name": str(tokenizer)}}
    )
    observation = {
        "image": {name: torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8) for name in ("top", "wrist")},
        "state": torch.tensor([0.2, 0.3, -0.4, 1.5]),
        "task": "open the_drawer",
    }
    noise = torch.randn(CONFIG.horizon, CONFIG.action_dim)
    _, expected = predict(observation, noise)
    found = policy.predict_chunk(observation, noise)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("cameras", "keys"),
    [
        (("image",), ["observation.image"]),
        (("image", "image2"), ["observation.images.image", "observation.images.image2"]),
        (("top",), ["observation.images.top"]),
    ],
    ids=["PushT", "LIBERO", "one with a name"],
)
def test_images_are_named_as_in_lerobots_environments(
    ours: Path, tmp_path: Path, cameras: tuple[str, ...], keys: list[str]
) -> None:
    policy = Pi05Policy(ours)
    before, model = policy.processor, policy.model
    robot = replace(before.robots[policy.robot], cameras=cameras)
    processor = Processor(before.shapes, before.tokenizer, cameras, {policy.robot: robot}, before.language)
    write_lerobot(tmp_path / "stock", model.config, processor, policy.robot, torch.float32)
    save_for_plugin(tmp_path / "plugin", model, processor, policy.robot, locate(ours).trained)
    for folder in (tmp_path / "stock", tmp_path / "plugin"):
        features = json.loads((folder / "config.json").read_text())["input_features"]
        assert [key for key, feature in features.items() if feature["type"] == "VISUAL"] == keys


# --- the whole policy


BLACK = {name: torch.zeros(3, 9, 9) for name in ("top", "wrist")}
OBSERVATIONS = {
    "both_cameras": ({"top": (28, 28), "wrist": (28, 28)}, [0.1, -0.2, 0.9, 0.4], "Put the_cup\non the plate "),
    "other_sizes": ({"top": (60, 80), "wrist": (37, 5)}, [0.1, -0.2, 0.9, 0.4], "open"),
    "no_top_and_a_single_pixel": ({"wrist": (1, 1)}, [9.0, -9.0, 0.0, 1.0], "go"),
    "no_wrist_and_a_state_beyond_its_range": ({"top": (300, 17)}, [-1e6, 1e6, -1.0, 2.0], "Ärmel: hoch, {x} _ _"),
}


@pytest.fixture(scope="module")
def lerobot_policy(source: Path) -> Predict:
    return between_processors(source)


@pytest.mark.parametrize(("images", "state", "task"), OBSERVATIONS.values(), ids=OBSERVATIONS.keys())
def test_converted_policy_predicts_lerobots_actions_in_real_units(
    lerobot_policy: Predict, ours: Path, images: dict[str, tuple[int, int]], state: list[float], task: str
) -> None:
    """Through both packages' own processors: images, prompt, statistics, sampling, statistics back."""
    missing = [name for name in ("top", "wrist") if name not in images]
    policy = Pi05Policy.from_pretrained(ours, missing_cameras=missing, max_state_distance=None)
    generator = torch.Generator().manual_seed(0)
    observation = {
        "image": {
            name: torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
            for name, size in images.items()
        },
        "state": torch.tensor(state),
        "task": task,
    }
    noise = torch.randn(CONFIG.horizon, CONFIG.action_dim, generator=generator)
    tokens, expected = lerobot_policy(observation, noise)
    prepared = policy.prepare(observation)
    assert prepared.tokens[prepared.token_mask].tolist() == tokens.tolist()
    found = policy.predict_chunk(observation, noise)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_policy_opens_lerobots_folder_as_it_is(source: Path, ours: Path) -> None:
    observation = {"image": BLACK, "state": torch.zeros(STATE_DIM), "task": "open"}
    noise = torch.randn(CONFIG.horizon, CONFIG.action_dim)
    one, other = (Pi05Policy.from_pretrained(folder).predict_chunk(observation, noise) for folder in (source, ours))
    assert (one == other).all()


def test_normalisation_statistics_come_along(source: Path, ours: Path) -> None:
    stats = load_file(next(source.glob("policy_preprocessor*.safetensors")))
    normalize = next(iter(Pi05Policy.from_pretrained(ours).processor.robots.values())).normalize
    for quantiles, key in ((normalize.state, "observation.state"), (normalize.action, "action")):
        assert quantiles.q01.tolist() == stats[f"{key}.q01"].tolist()
        assert quantiles.q99.tolist() == stats[f"{key}.q99"].tolist()


def test_without_a_tokenizer_the_weights_are_converted_and_come_back(
    source: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    path = folder / "policy_preprocessor.json"
    path.write_text(path.read_text().replace(json.dumps(str(tokenizer)), '"/nowhere/at/all"'))
    convert(source=folder, target=tmp_path / "ours")
    assert "--tokenizer FOLDER" in capsys.readouterr().out
    export(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_weights_without_lerobots_processors_are_given_some_on_the_way_back(
    copy: Copy, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(lambda tensors: None)
    for file in folder.glob("policy_*"):
        file.unlink()
    convert(source=folder, target=tmp_path / "ours", tokenizer=str(tokenizer))
    export(tmp_path / "ours", tmp_path / "back", tokenizer=str(tokenizer))
    assert "compared with stock LeRobot on 0 recorded and 2 made-up frames" in capsys.readouterr().out
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


# --- openpi


def test_openpis_names_give_the_same_model(source: Path, copy: Copy, tmp_path: Path) -> None:
    """No prefix, the head tied (so `embed_tokens` is not in the file), its own config.json and statistics."""

    def as_openpi(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix(PREFIX)] = tensors.pop(key)
        tensors[LM_HEAD] = tensors.pop(EMBED_TOKENS.removeprefix(PREFIX))

    folder = copy(as_openpi)
    for file in (*folder.glob("policy_*"), folder / "config.json"):
        file.unlink()
    (folder / "config.json").write_text(
        json.dumps({"action_dim": CONFIG.action_dim, "action_horizon": CONFIG.horizon, "precision": "float32"})
    )
    stats = {
        name: {"mean": [0] * dims, "std": [1] * dims, "q01": [-0.5] * dims, "q99": [2.5] * dims}
        for name, dims in (("state", STATE_DIM), ("actions", ACTION_DIM))
    }
    (folder / "assets" / "lab" / "arm").mkdir(parents=True)
    (folder / "assets" / "lab" / "arm" / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))

    assert locate(folder).config() == locate(source).config()
    tensors, expected = locate(folder).tensors(), locate(source).tensors()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in tensors)
    convert(source=folder, target=tmp_path / "ours", tokenizer="tiny")
    robots = Pi05Policy.from_pretrained(tmp_path / "ours").processor.robots
    assert list(robots) == ["lab/arm"]
    assert robots["lab/arm"].normalize.action.q99.tolist() == [2.5] * ACTION_DIM


def split(folder: Path) -> Path:
    """The folder with its weights in two files and an index, as large checkpoints have them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {key: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, key in enumerate(tensors)}
    for name in set(files.values()):
        save_file({key: tensors[key] for key in tensors if files[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def test_weights_in_several_files_are_read_as_one(source: Path, copy: Copy, tmp_path: Path) -> None:
    folder = split(copy(lambda tensors: None))
    found, expected = locate(folder).tensors(), locate(source).tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    convert(source=folder, target=tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_missing_one_of_several_files_is_named(copy: Copy, tmp_path: Path) -> None:
    folder = split(copy(lambda tensors: None))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors does not exist"):
        convert(source=folder, target=tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_tensor_in_two_of_several_files_is_named(source: Path, copy: Copy) -> None:
    folder = split(copy(lambda tensors: None))
    tensors = load_file(source / "model.safetensors")
    save_file(tensors, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"holds what another file .* holds too: model\."):
        locate(folder).tensors()


def test_an_index_that_points_elsewhere_is_refused(copy: Copy, tmp_path: Path) -> None:
    folder = split(copy(lambda tensors: None))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
    with pytest.raises(ValueError, match="has no weight_map of tensors to files beside it"):
        locate(folder).tensors()


def test_pi0s_names_of_the_time_mlp_are_understood(source: Path, copy: Copy) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if "time_mlp" in key]:
            tensors[key.replace("time_mlp", "action_time_mlp")] = tensors.pop(key)
        tensors["model.state_proj.weight"] = torch.zeros(3, 3)

    folder = copy(rename)
    found, expected = locate(folder).tensors(), locate(source).tensors()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert re.search(r"state_proj\.weight \[3, 3\] .*dropped", LeRobotFolder(folder).mapped.report())


def test_pi0s_state_projection_is_not_exported_where_lerobot_would_stumble_on_it(
    source: Path, copy: Copy, tmp_path: Path
) -> None:
    folder = copy(lambda tensors: tensors.update({"state_proj.weight": torch.zeros(3, 3)}))
    convert(source=folder, target=tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_bf16_checkpoint_with_fp32_parts_predicts_in_every_dtype(source: Path, copy: Copy) -> None:
    """LeRobot keeps norms, projections and vision in fp32."""

    def halve(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if "paligemma_with_expert" in key and not re.search(r"vision|projector|layernorm|model\.norm", key):
                tensors[key] = tensor.bfloat16()

    folder = copy(halve)
    observation = {"image": BLACK, "state": torch.zeros(STATE_DIM), "task": "open"}
    noise = torch.randn(CONFIG.horizon, CONFIG.action_dim)
    expected = Pi05Policy.from_pretrained(source).predict_chunk(observation, noise)
    for dtype in (None, torch.float32, torch.bfloat16):
        found = Pi05Policy.from_pretrained(folder, dtype=dtype).predict_chunk(observation, noise)
        torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected), rtol=0.05, atol=0.05)


def test_a_loaded_model_is_ready_to_train(source: Path) -> None:
    model = locate(source).model()
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in model.parameters())
