"""What the plugin's policy does, beside `Pi05Policy` over the folder that LeRobot saved it in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies import get_policy_class, make_pre_post_processors

from lerobot_policy_pi05_lightning.modeling_pi05_lightning import Pi05LightningPolicy
from pi05_lightning import Pi05Policy
from pi05_lightning.acting import Acting
from pi05_lightning.cli.convert import convert
from pi05_lightning.data.fast import FastDecodeError
from pi05_lightning.weights.abilities import Trained
from pi05_lightning.weights.lerobot_plugin import save_for_plugin

from .conftest import Batch, Make

TRAINED = Trained({"posttrain": 1}, {"flow": 1, "subtask": 1}, complete=True)


@pytest.fixture
def saved(make: Make, tmp_path: Path) -> Path:
    """A policy as `lerobot-train` saves it, with both processors."""
    policy = make()
    policy.trained = TRAINED
    folder = tmp_path / "pretrained_model"
    policy.save_pretrained(folder)
    for processor in make_pre_post_processors(policy.config):
        processor.save_pretrained(folder)
    return folder


def opened(folder: Path, **options: str) -> tuple[Pi05LightningPolicy, Callable[[Batch], Batch], Callable]:
    """As `lerobot-eval` opens a folder."""
    config = PreTrainedConfig.from_pretrained(folder, cli_overrides=[f"--{k}={v}" for k, v in options.items()])
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    assert isinstance(policy, Pi05LightningPolicy)
    return policy, *make_pre_post_processors(config, str(folder))


def observations(count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": {name: rng.integers(0, 256, (3, 48, 64), dtype=np.uint8) for name in ("top", "wrist")},
            "state": rng.normal(size=3).astype(np.float32),
            "task": "open the drawer" if i % 2 else "close the drawer",
        }
        for i in range(count)
    ]


def as_lerobot(several: list[dict]) -> Batch:
    """The same as LeRobot hands it over: a batch, with images in 0..1."""
    images = {
        f"observation.images.{name}": torch.from_numpy(np.stack([o["image"][name] for o in several])).float() / 255
        for name in ("top", "wrist")
    }
    state = torch.from_numpy(np.stack([o["state"] for o in several]))
    return {**images, "observation.state": state, "task": [o["task"] for o in several]}


def test_actions_and_subtasks_are_those_of_our_policy(saved: Path) -> None:
    policy, before, after = opened(saved, **{"acting.execution_horizon": "2", "acting.replan_subtask_every": "2"})
    ours = [Pi05Policy(saved, execution_horizon=2, replan_subtask_every=2) for _ in range(3)]
    for seen in zip(*[iter(observations(15))] * 3, strict=True):
        several = [{**o, "task": "open the drawer"} for o in seen]
        action = after(policy.select_action(before(as_lerobot(several)))).numpy()
        expected = np.stack([one.predict(o) for one, o in zip(ours, several, strict=True)])
        np.testing.assert_allclose(action, expected, rtol=1e-4, atol=1e-5)
        assert policy.subtasks == [one.subtask for one in ours]
    assert policy.generate_text(before(as_lerobot(several))) == [ours[0].predict_subtask(o) for o in several]
    assert policy.supports_text_generation()


def test_other_tasks_and_a_reset_begin_anew(saved: Path) -> None:
    policy, before, _ = opened(saved, n_action_steps="4")
    first, second = observations(2)
    alone = policy.select_action(before(as_lerobot([second])))
    policy.reset()
    policy.select_action(before(as_lerobot([first])))  # three actions of its chunk are left
    torch.testing.assert_close(policy.select_action(before(as_lerobot([second]))), alone)


def test_chunk_from_given_noise_is_our_policys(saved: Path) -> None:
    policy, before, _ = opened(saved)
    (observation,) = observations(1)
    noise = torch.randn(policy.config.sizes.horizon, policy.config.sizes.action_dim)
    chunk = policy.predict_action_chunk(before(as_lerobot([observation])), noise=noise[None])
    np.testing.assert_allclose(
        chunk[0], Pi05Policy(saved).predict_chunk(observation, noise=noise), rtol=1e-4, atol=1e-5
    )


def test_fast_tokens_that_are_no_chunk_give_no_action_also_where_they_are_counted(make: Make, fast: Path) -> None:
    acting = Acting(actions="fast", constrain_fast=False, temperature=3.0, on_failed_decode="count")
    policy = make(fast=str(fast), acting=acting)
    policy.trained = Trained({"posttrain": 1}, {"fast": 1}, complete=True)
    with pytest.raises(FastDecodeError, match="are no chunk"):
        policy.select_action(as_lerobot(observations(1)))
    assert policy.inference.failed_decodes == 1


def test_export_of_ours_acts_in_lerobot(make: Make, tmp_path: Path, saved: Path) -> None:
    target = tmp_path / "for_lerobot"
    convert(source=saved, target=target, format="plugin")
    policy, before, after = opened(target)
    (observation,) = observations(1)
    action = after(policy.select_action(before(as_lerobot([observation]))))
    np.testing.assert_allclose(action[0], Pi05Policy(saved).predict(observation), rtol=1e-4, atol=1e-5)
    again = tmp_path / "ours"
    convert(source=target, target=again)
    assert Pi05Policy(again).predict(observation).tolist() == Pi05Policy(saved).predict(observation).tolist()


def test_training_goes_on_with_the_weights_of_a_folder_and_the_statistics_of_the_dataset(
    saved: Path, make: Make
) -> None:
    policy = make(init_from=str(saved), preset=None)
    before = Pi05Policy(saved)
    assert all(torch.equal(v, policy.model.state_dict()[k]) for k, v in before.model.state_dict().items())
    assert policy.trained == TRAINED
    assert policy.config.sizes == before.model.config


def test_folder_needs_nothing_that_lies_elsewhere(make: Make, fast: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(fast, tmp_path / "fast"))
    make(fast=str(own)).save_pretrained(tmp_path / "saved")
    shutil.rmtree(own)
    policy = make(preset=None, init_from=str(tmp_path / "saved"))
    assert policy.processor.fast is not None
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert [config[name] for name in ("fast", "tokenizer", "init_from")] == [None] * 3


def test_export_keeps_that_actions_are_relative(make: Make, tmp_path: Path) -> None:
    policy = make(relative_dims=[0])
    save_for_plugin(tmp_path, policy.model, policy.processor, "robot", TRAINED)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    assert (config.relative_dims, config.relative_state_dims) == ([0], [0])


def test_options_that_contradict_are_named(make: Make, saved: Path) -> None:
    with pytest.raises(ValueError, match="preset tiny: the weights are of other sizes"):
        make(init_from=str(saved), preset="tiny")
    with pytest.raises(ValueError, match=r"acting\.inference_delay: LeRobot waits for every chunk"):
        make(acting=Acting(inference_delay=1))
    config = json.loads((saved / "config.json").read_text())
    assert {config["type"], *config["normalization_mapping"].values()} == {"pi05_lightning", "IDENTITY"}


def test_what_another_stage_was_trained_by_is_not_taken_over(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make(losses={"subtask": 1.0}, flow_alpha=1.0)
    policy.save_pretrained(tmp_path)
    for processor in make_pre_post_processors(policy.config):
        processor.save_pretrained(tmp_path)
    assert opened(tmp_path)[0].stage.weights == {"subtask": 1.0}
    for given in ({}, {"losses": "null"}, {"flow_alpha": "2"}):
        with pytest.raises(ValueError, match="took over from the stage posttrain: give --policy") as refused:
            opened(tmp_path, stage="pretrain", **given)
        assert str(refused.value).startswith("flow_alpha is 1.0" if "losses" in given else "losses is {'subtask': 1.0}")
    weights = opened(tmp_path, stage="pretrain", losses="null", flow_alpha="null")[0].stage.weights
    assert weights == {"text": 1.0, "subtask": 1.0, "fast": 1.0}
    monkeypatch.setattr("sys.argv", ["lerobot-train", "--policy.flow_alpha=1", "--policy.losses=null"])
    same = opened(tmp_path, stage="pretrain", losses="null", flow_alpha="1")[0]  # which was given, not taken over
    assert (same.stage.weights, same.config.flow_alpha) == (weights, 1.0)


def test_weights_to_begin_with_are_named_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lerobot-train", "--resume=true", "--config_path=run/train_config.json"])
    opened(saved, init_from=str(saved))  # as the resumed run's train_config.json has it
    monkeypatch.setattr("sys.argv", ["lerobot-train", f"--policy.path={saved}", f"--policy.init_from={saved}"])
    with pytest.raises(ValueError, match=r"init_from: --policy\.path says what weights .* leave out one of them"):
        opened(saved, init_from=str(saved))


def test_chunks_may_be_shorter_than_trained_and_not_longer(make: Make, saved: Path) -> None:
    trained = Pi05Policy(saved).model.config.horizon
    policy, before, _ = opened(saved, chunk_size=str(trained - 2))
    assert policy.predict_action_chunk(before(as_lerobot(observations(1)))).shape[1] == trained - 2
    with pytest.raises(ValueError, match=rf"chunk_size is {trained + 1}, and the weights .* of {trained} actions"):
        opened(saved, chunk_size=str(trained + 1))
    assert make(init_from=str(saved), preset=None, chunk_size=trained + 1).config.sizes.horizon == trained + 1
