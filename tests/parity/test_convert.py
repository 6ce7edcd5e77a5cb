"""Checkpoints that LeRobot itself wrote: into ours, and back into what LeRobot itself opens."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import TokenizerProcessorStep, make_default_policy_processor_steps
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.processor.factory import make_policy_processor_pipelines
from lerobot.processor.pipeline import PolicyProcessorPipeline
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pi05_lightning.convert_command import convert
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.data.transforms import RelativeActions
from pi05_lightning.models.checkpoint import build
from pi05_lightning.models.config import GemmaConfig, ModelConfig, VisionConfig
from pi05_lightning.models.convert import (
    EXPERT_LM_HEAD,
    LM_HEAD,
    PREFIX,
    load_lerobot,
    map_foreign,
    to_lerobot,
    to_ours,
)
from pi05_lightning.policy import Pi05Policy

from .reference import lerobot_sizes, randomize

EMBED_TOKENS = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
STATE_DIM, ACTION_DIM = 4, 3
Copy = Callable[[Callable[[dict[str, Tensor]], object]], Path]
Predict = Callable[[dict, Tensor], tuple[Tensor, Tensor]]

CONFIG = ModelConfig(
    vision=VisionConfig(image_size=28, patch_size=14, width=72, depth=2, mlp_dim=96, num_heads=1),
    language=GemmaConfig(width=48, depth=2, mlp_dim=64, num_heads=8, num_kv_heads=1, head_dim=16),
    expert=GemmaConfig(width=32, depth=2, mlp_dim=40, num_heads=8, num_kv_heads=1, head_dim=16),
    vocab_size=4096,
    horizon=6,
    action_dim=5,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the Hub has them, with the shipped tokenizer; as PaliGemma's it begins a text with <bos>."""
    folder = tmp_path_factory.mktemp("tokenizer")
    shipped = TextTokenizer.load("tiny").tokenizer
    shipped.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", shipped.token_to_id("<bos>"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=shipped, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def open_lerobot(folder: Path) -> PI05Policy:
    with lerobot_sizes(CONFIG):
        return PI05Policy.from_pretrained(folder)


def between_processors(folder: Path, overrides: dict | None = None) -> Predict:
    """LeRobot's policy between the folder's processors: (observation, noise) to tokens and actions in real units."""
    policy = open_lerobot(folder)
    before = PolicyProcessorPipeline.from_pretrained(
        folder, config_filename="policy_preprocessor.json", overrides=overrides
    )
    after = PolicyProcessorPipeline.from_pretrained(
        folder,
        config_filename="policy_postprocessor.json",
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )

    def predict(observation: dict, noise: Tensor) -> tuple[Tensor, Tensor]:
        images = {f"observation.images.{name}": image.float() / 255 for name, image in observation["image"].items()}
        batch = before({**images, "observation.state": observation["state"], "task": observation["task"]})
        tokens = batch["observation.language.tokens"][batch["observation.language.attention_mask"]]
        return tokens, after(policy.predict_action_chunk(batch, noise=noise[None])[0])

    return predict


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """A checkpoint as LeRobot's training writes it: policy and both processors. Its lm_head has drifted."""
    folder = tmp_path_factory.mktemp("lerobot")
    size = CONFIG.vision.image_size
    config = PI05Config(
        device="cpu",
        chunk_size=CONFIG.horizon,
        n_action_steps=CONFIG.horizon,
        max_action_dim=CONFIG.action_dim,
        image_resolution=(size, size),
        input_features={
            "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 60, 80)),
            "observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, size, size)),
            "observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
    )
    with lerobot_sizes(CONFIG):
        policy = PI05Policy(config)
    randomize(policy)
    policy.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    stats = {
        key: {"q01": -torch.rand(dims, generator=generator), "q99": 1 + torch.rand(dims, generator=generator)}
        for key, dims in (("observation.state", STATE_DIM), ("action", ACTION_DIM))
    }
    steps = make_default_policy_processor_steps(config, stats)
    tokenize = TokenizerProcessorStep(tokenizer_name=str(tokenizer), max_length=64, padding="max_length")
    state = Pi05PrepareStateTokenizerProcessorStep()
    for pipeline in make_policy_processor_pipelines(
        [steps.rename_observations, steps.add_batch_dim, steps.normalize, state, tokenize, steps.to_device],
        [steps.unnormalize, steps.to_cpu],
    ):
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours") / "policy"
    convert(source=source, target=folder)
    return folder


@pytest.fixture(scope="module")
def exported(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "policy"
    convert(source=ours, target=folder, format="lerobot")
    return folder


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Copy:
    """A copy of the source whose tensors were changed."""

    def changed(change: Callable[[dict[str, Tensor]], None]) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(source, folder)
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return changed


# --- names


def test_every_key_of_lerobots_policy_has_its_place_and_comes_back(source: Path) -> None:
    keys = load_file(source / "model.safetensors").keys() - {PREFIX + LM_HEAD, PREFIX + EXPERT_LM_HEAD}
    renamed = {key: to_ours(key) for key in keys}
    assert None not in renamed.values()
    assert len(set(renamed.values())) == len(keys)
    assert all(to_lerobot(ours) == key for key, ours in renamed.items() if ours)


def test_report_counts_every_key(source: Path) -> None:
    report = map_foreign(source).report()
    counts = [int(line.split(" × ")[0]) for line in report.splitlines() if " × " in line]
    assert sum(counts) == len(load_file(source / "model.safetensors"))


def test_dimensions_are_read_from_the_tensors(source: Path) -> None:
    assert load_lerobot(source)[0] == CONFIG


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
    convert(source=tmp_path / "ours", target=tmp_path / "back", format="lerobot")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_mixed_dtypes_keep_them_both_ways(copy: Copy, tmp_path: Path, dtype: torch.dtype) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if "norm" not in key and "vision" not in key:  # as LeRobot's own dtype: bfloat16
                tensors[key] = tensor.to(dtype)

    folder = copy(halve)
    convert(source=folder, target=tmp_path / "ours")
    convert(source=tmp_path / "ours", target=tmp_path / "back", format="lerobot")
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
    convert(source=tmp_path / "trained", target=tmp_path / "out", format="lerobot")
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
    convert(source=tmp_path / "trained", target=tmp_path / "out", format="lerobot")
    predict = between_processors(
        tmp_path / "out", overrides={"tokenizer_processor": {"tokenizer_name": str(tokenizer)}}
    )
    observation = {
        "image": {"top": torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8)},
        "state": torch.tensor([0.2, 0.3, -0.4, 1.5]),
        "task": "open the_drawer",
    }
    noise = torch.randn(CONFIG.horizon, CONFIG.action_dim)
    _, expected = predict(observation, noise)
    found = policy.predict_chunk(observation, noise)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


# --- the whole policy


OBSERVATIONS = {
    "both_cameras": ({"top": (28, 28), "wrist": (28, 28)}, [0.1, -0.2, 0.9, 0.4], "Put the_cup\non the plate "),
    "other_sizes": ({"top": (60, 80), "wrist": (37, 5)}, [0.1, -0.2, 0.9, 0.4], "open"),
    "no_top_and_a_single_pixel": ({"wrist": (1, 1)}, [9.0, -9.0, 0.0, 1.0], ""),
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
    policy = Pi05Policy.from_pretrained(ours)
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
    observation = {"image": torch.zeros(3, 9, 9), "state": torch.zeros(STATE_DIM), "task": "open"}
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
    convert(source=tmp_path / "ours", target=tmp_path / "back", format="lerobot")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


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

    config, tensors = load_lerobot(folder)
    expected = load_lerobot(source)
    assert config == expected[0]
    assert tensors.keys() == expected[1].keys()
    assert all(torch.equal(tensors[key], expected[1][key]) for key in tensors)
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
    found, expected = load_lerobot(folder)[1], load_lerobot(source)[1]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    convert(source=folder, target=tmp_path / "ours")
    convert(source=tmp_path / "ours", target=tmp_path / "back", format="lerobot")
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
        load_lerobot(folder)


def test_an_index_that_points_elsewhere_is_refused(copy: Copy, tmp_path: Path) -> None:
    folder = split(copy(lambda tensors: None))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
    with pytest.raises(ValueError, match="has no weight_map of tensors to files beside it"):
        load_lerobot(folder)


def test_pi0s_names_of_the_time_mlp_are_understood(source: Path, copy: Copy) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if "time_mlp" in key]:
            tensors[key.replace("time_mlp", "action_time_mlp")] = tensors.pop(key)
        tensors["model.state_proj.weight"] = torch.zeros(3, 3)

    folder = copy(rename)
    found, expected = load_lerobot(folder)[1], load_lerobot(source)[1]
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert re.search(r"state_proj\.weight \[3, 3\] .*dropped", map_foreign(folder).report())


def test_pi0s_state_projection_is_not_exported_where_lerobot_would_stumble_on_it(
    source: Path, copy: Copy, tmp_path: Path
) -> None:
    folder = copy(lambda tensors: tensors.update({"state_proj.weight": torch.zeros(3, 3)}))
    convert(source=folder, target=tmp_path / "ours")
    convert(source=tmp_path / "ours", target=tmp_path / "back", format="lerobot")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_bf16_checkpoint_with_fp32_parts_predicts_in_every_dtype(source: Path, copy: Copy) -> None:
    """LeRobot keeps norms, projections and vision in fp32."""

    def halve(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if "paligemma_with_expert" in key and not re.search(r"vision|projector|layernorm|model\.norm", key):
                tensors[key] = tensor.bfloat16()

    folder = copy(halve)
    observation = {"image": torch.zeros(3, 9, 9), "state": torch.zeros(STATE_DIM), "task": "open"}
    noise = torch.randn(CONFIG.horizon, CONFIG.action_dim)
    expected = Pi05Policy.from_pretrained(source).predict_chunk(observation, noise)
    for dtype in (None, torch.float32, torch.bfloat16):
        found = Pi05Policy.from_pretrained(folder, dtype=dtype).predict_chunk(observation, noise)
        torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected), rtol=0.05, atol=0.05)


# --- what is wrong is said


def test_missing_unexpected_and_misshaped_keys_are_listed_by_lerobots_names(copy: Copy) -> None:
    layer = "model.paligemma_with_expert.paligemma.model.language_model.layers"

    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{layer}.1.mlp.up_proj.weight"]
        del tensors["model.paligemma_with_expert.gemma_expert.model.norm.dense.bias"]
        tensors[f"{layer}.0.self_attn.v_proj.weight"] = torch.zeros(8, 48)
        tensors["model.paligemma_with_expert.lora_A.weight"] = torch.zeros(2)

    with pytest.raises(ValueError, match="4 keys do not fit") as error:
        load_lerobot(copy(damage))
    for expected in (
        f"missing: {layer}.1.mlp.up_proj.weight [64, 48]",
        "missing: model.paligemma_with_expert.gemma_expert.model.norm.dense.bias [96]",
        f"misshaped: {layer}.0.self_attn.v_proj.weight is [8, 48], expected [16, 48]",
        "unexpected: model.paligemma_with_expert.lora_A.weight [2]",
    ):
        assert expected in str(error.value)


def test_every_key_of_a_missing_layer_is_listed(copy: Copy) -> None:
    last = "model.paligemma_with_expert.gemma_expert.model.layers.1."

    def cut(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(last)]:
            del tensors[key]

    with pytest.raises(ValueError, match="11 keys do not fit") as error:
        load_lerobot(copy(cut))
    assert str(error.value).count(f"missing: {last}") == 11


def test_a_key_with_and_without_its_prefix_is_listed(copy: Copy) -> None:
    with pytest.raises(ValueError, match=r"unexpected: .*time_mlp_in\.bias"):
        load_lerobot(copy(lambda tensors: tensors.update({"time_mlp_in.bias": torch.zeros(32)})))


def test_a_misshaped_head_is_listed_though_nothing_reads_it(copy: Copy) -> None:
    with pytest.raises(ValueError, match=r"lm_head\.weight is \[7, 32\], expected \[4096, 32\]"):
        load_lerobot(copy(lambda tensors: tensors.update({PREFIX + EXPERT_LM_HEAD: torch.zeros(7, 32)})))


def test_a_missing_tensor_that_tells_a_dimension_is_listed(copy: Copy) -> None:
    key = "model.action_in_proj.weight"
    with pytest.raises(ValueError, match=key):
        load_lerobot(copy(lambda tensors: tensors.pop(key)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_action_dim", 32, "max_action_dim is 32, but action_in_proj takes 5"),
        ("image_resolution", [224, 224], "there are 4 position embeddings"),
        ("image_resolution", [28, 56], "a square's"),
        ("type", "pi0", "type is 'pi0'"),
        ("min_period", 0.01, "min_period is 0.01"),
        ("action_expert_variant", "gemma_2b", "both gemma_2b"),
        ("output_features", {"action": {"type": "ACTION", "shape": [9]}}, "9 action dimensions"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(copy: Copy, name: str, value: object, message: str) -> None:
    folder = copy(lambda tensors: None)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, name: value}))
    with pytest.raises(ValueError, match=message):
        load_lerobot(folder)


def test_a_truncated_checkpoint_leaves_no_target(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "truncated"
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        convert(source=folder, target=tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["truncated"]


def test_an_existing_target_is_left_alone(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="already exists"):
        convert(source=source, target=tmp_path)


def test_relative_actions_are_refused(copy: Copy, tmp_path: Path) -> None:
    folder = copy(lambda tensors: None)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "use_relative_actions": True}))
    with pytest.raises(ValueError, match="relative"):
        convert(source=folder, target=tmp_path / "ours")


def test_a_policy_of_relative_actions_is_not_exported(ours: Path, tmp_path: Path) -> None:
    policy = Pi05Policy.from_pretrained(ours)
    robots = policy.processor.robots
    robots[policy.robot] = replace(robots[policy.robot], relative=RelativeActions((0,), (0,)))
    policy.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"relative actions \(relative_dims\)"):
        convert(source=tmp_path / "trained", target=tmp_path / "out", format="lerobot")
    assert not (tmp_path / "out").exists()


def test_a_keypoint_backbone_has_no_place_in_lerobot() -> None:
    with pytest.raises(ValueError, match="siglip_gemma"):
        to_lerobot("backbone.vision.convs.0.weight")


def test_a_loaded_model_is_ready_to_train(source: Path) -> None:
    model = build(*load_lerobot(source))
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in model.parameters())
