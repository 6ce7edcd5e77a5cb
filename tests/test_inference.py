"""How a policy acts: one set of defaults wherever it does, and FAST tokens written in one way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from pi05_lightning import Pi05DataModule, Pi05Policy
from pi05_lightning.acting import Acting
from pi05_lightning.acting.frames import made_up_frames
from pi05_lightning.acting.inference import Inference
from pi05_lightning.cli.rollout import rollout
from pi05_lightning.cli.serve import serve
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.prompt import Prompts
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.evaluation.metrics import Evaluator
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.serving.reader import Reader
from pi05_lightning.serving.server import PolicyServer
from pi05_lightning.training.callbacks.rollout import PeriodicRollout
from pi05_lightning.types import Modality, Subset
from pi05_lightning.weights.abilities import Trained
from tests.random_fast import random_fast
from tests.untrained import seeing, untrained_model

CONFIG = ModelConfig.preset("debug")


@pytest.fixture
def data(videos: Path, tmp_path: Path) -> Pi05DataModule:
    random_fast(CONFIG).save(tmp_path)
    robot = LeRobotConfig(str(videos), val_fraction=0.2)
    return Pi05DataModule({"robot": robot}, batch_size=2, num_workers=0, fast=tmp_path, shapes=CONFIG.shapes)


@pytest.fixture
def policy(data: Pi05DataModule) -> Pi05Policy:
    return Pi05Policy((seeing(untrained_model()), data.processor))


# --- defaults


def test_a_new_chunk_for_every_action_without_noise_is_the_default(policy: Pi05Policy) -> None:
    server = PolicyServer(policy, Reader(policy.processor.cameras, {}, None))
    assert policy.execution_horizon == server.metadata["action_horizon"] == 1
    assert policy.acting.noise_scale == 0


@pytest.mark.parametrize(("horizon", "delay", "executed"), [(8, 0, 1), (1, 0, 1), (8, 1, 1), (8, 3, 3), (8, 4, 4)])
def test_a_chunk_lasts_by_default_until_the_next_one_may_have_come(horizon: int, delay: int, executed: int) -> None:
    assert Acting(inference_delay=delay).executed(horizon) == executed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inference_delay": 5}, "inference_delay is 5, and a chunk has 8 actions: at most 4"),
        ({"inference_delay": 3, "execution_horizon": 2}, "execution_horizon: 2 .* within 3 and 5"),
        ({"inference_delay": 3, "execution_horizon": 6}, "execution_horizon: 6 .* within 3 and 5"),
    ],
)
def test_a_chunk_that_does_not_last_until_the_next_one_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Acting(**options).executed(8)


def test_only_actions_of_a_chunk_that_the_data_has_are_executed(videos: Path) -> None:
    short = LeRobotConfig(str(videos), horizon_steps=4)
    processor = Pi05DataModule({"robot": short}, shapes=CONFIG.shapes).processor
    processor = Processor.from_dict(processor.to_dict())
    model = untrained_model()
    assert Pi05Policy((model, processor), execution_horizon=4).execution_horizon == 4
    with pytest.raises(ValueError, match=r"execution_horizon: 5 .* within 1 and 4: a chunk's 4 actions"):
        Pi05Policy((model, processor), execution_horizon=5)


def test_a_chunk_is_as_long_as_those_of_the_data(policy: Pi05Policy, data: Pi05DataModule) -> None:
    frame = data.sources("val")["robot"][0]
    frame = replace(frame, actions=None, action_is_pad=None)
    noise = torch.randn(1, *policy.start(None, 1).shape[1:], generator=torch.Generator().manual_seed(0))
    whole = policy.predict_chunks([frame], [None], noise)[0]
    policy.processor.robots["robot"] = replace(policy.processor.robots["robot"], horizon=4)
    short = policy.acting_as(policy.acting)
    alone = short.predict_chunks([frame], [None], noise)[0]
    prefix = policy.model.backbone(policy.processor.collate([policy.processor.prompt(frame, "robot")]))
    expected = policy.model.flow_head.sample(prefix, noise[:, None, :4])[0, 0].detach().numpy()
    np.testing.assert_allclose(alone, policy.processor.real_actions(expected, frame, "robot"), rtol=1e-5, atol=1e-6)
    assert np.abs(alone - whole[:4]).max() > 1e-4  # no step sees one that nothing had trained
    with pytest.raises(ValueError, match=r"below the chunk's 4 steps"):
        short.prefix_actions_of(short.inputs(frame), whole[:4])


def test_a_chunk_goes_on_from_given_actions_in_the_models_units(policy: Pi05Policy, data: Pi05DataModule) -> None:
    frame = replace(data.sources("val")["robot"][0], actions=None, action_is_pad=None)
    noise = torch.randn(1, *policy.start(None, 1).shape[1:], generator=torch.Generator().manual_seed(0))
    past, given = np.array([[0.5, -0.5], [0.2, 0.9], [-0.4, 0.1]], np.float32), torch.zeros(1, *noise.shape[1:])
    given[0, :3, :2] = torch.from_numpy(past)
    real = policy.processor.robots["robot"].normalize.action.unnormalize(past)
    prefix = policy.model.backbone(policy.processor.collate([policy.processor.prompt(frame, "robot")]))
    sampled = policy.model.flow_head.sample(prefix, noise[:, None], given=given, num_given=torch.tensor([3]))
    expected = policy.processor.real_actions(sampled[0, 0].detach().numpy(), frame, "robot")
    found = policy.predict_chunks([frame], [None], noise, [real])[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(found - policy.predict_chunks([frame], [None], noise)[0])[3:].max() > 1e-4


def test_actions_of_the_delay_are_given_unless_rtc_is_off() -> None:
    assert (Acting(inference_delay=2).given, Acting(inference_delay=2, rtc=False).given) == (2, 0)
    assert Acting(actions="fast", inference_delay=2, rtc=False).executed(8) == 2
    with pytest.raises(ValueError, match="set rtc to false"):
        Acting(actions="fast", inference_delay=2)


@pytest.mark.parametrize("command", [serve, rollout])
def test_command_has_the_policys_defaults(command: Callable[..., Any]) -> None:
    parser = ArgumentParser()
    parser.add_function_arguments(command)
    found = {name: value for name, value in vars(parser.get_defaults()).items() if name in asdict(Acting())}
    assert found == asdict(Acting())


def test_rollout_during_training_has_the_policys_defaults() -> None:
    assert PeriodicRollout(every_n_steps=1).acting == Acting()


def test_policy_acts_as_its_keywords_say(policy: Pi05Policy) -> None:
    given = {"replan_subtask_every": 2, "num_steps": 3, "noise_scale": 0.5, "temperature": 1.0, "hierarchical": False}
    acting = Pi05Policy((policy.model, policy.processor), pred_horizon=5, **given).acting
    assert acting == Acting(execution_horizon=5, **given)


def test_unknown_keyword_is_named(policy: Pi05Policy) -> None:
    with pytest.raises(TypeError, match="noise_scales"):
        Pi05Policy((policy.model, policy.processor), noise_scales=0)


# --- precision


def test_pixels_are_rounded_once_for_weights_in_bf16(data: Pi05DataModule) -> None:
    seen: list[torch.Tensor] = []
    for dtype in (torch.float32, torch.bfloat16):
        policy = Inference(untrained_model().to(dtype), data.processor, Acting())
        policy.model.backbone.vision.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        policy.predict_chunks(made_up_frames(policy)[:1], [None])
    exact, rounded = seen
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, exact.bfloat16())


# --- FAST tokens


def test_free_fast_tokens_end_where_they_do_in_training(
    policy: Pi05Policy, data: Pi05DataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an empty `fast_closing` the segment's end of text closes it, for the policy and in validation alike."""
    processor, closings = data.processor, []
    processor.language = replace(processor.language, prompts=Prompts(fast_closing=""))
    frame = data.sources("val")["robot"][0]
    sample = processor.sample(frame, Subset("robot", Modality.FAST))
    original = policy.model.fast_head.generate

    def generate(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        closings.append(options["closing_id"])
        return original(*args, **options)

    monkeypatch.setattr(policy.model.fast_head, "generate", generate)
    free = {"actions": "fast", "constrain_fast": False, "on_failed_decode": "count"}
    Pi05Policy((policy.model, processor), **free).predict_chunks([frame], [None])
    Evaluator(policy.model, processor).decode_fast(processor.collate([sample]), "robot")
    assert closings[:2] == [sample.tokens[-1], sample.tokens[-1]]
    assert sample.tokens[-1] == processor.tokenizer.eos_id


# --- advantage


def told(data: Pi05DataModule, **acting: Any) -> Inference:
    """A policy that was trained on actions with their advantage, with weights that are always the same."""
    trained = Trained(terms={"flow": 3, "advantage": 3}, complete=True)
    return Inference(seeing(untrained_model()), data.processor, Acting(**acting), trained=trained)


def chunk(policy: Inference, data: Pi05DataModule) -> np.ndarray:
    frame = data.sources("train")["robot"][0]
    frame = replace(frame, subtask=None, answers=(), actions=None, action_is_pad=None, picture_sizes={})
    noise = np.random.default_rng(0).normal(size=(2, CONFIG.horizon, CONFIG.action_dim)).astype(np.float32)
    return policy.predict_chunks([frame, frame], [None, "pull"], noise)


def test_policy_that_learned_it_is_told_positive_and_says_so(data: Pi05DataModule) -> None:
    assert told(data).resolved.advantage == "positive"
    assert told(data, advantage="none").resolved.advantage == "none"
    np.testing.assert_array_equal(chunk(told(data), data), chunk(told(data, advantage="positive"), data))
    for other in ("negative", "none"):
        assert np.abs(chunk(told(data), data) - chunk(told(data, advantage=other), data)).max() > 1e-5


def test_without_guidance_the_flow_is_that_of_no_advantage(data: Pi05DataModule) -> None:
    free = chunk(told(data, advantage="none"), data)
    np.testing.assert_allclose(chunk(told(data, guidance=0.0), data), free, rtol=1e-4, atol=1e-5)
    led = chunk(told(data), data)
    assert np.abs(chunk(told(data, guidance=3.0), data) - led).max() > 1e-5


def test_policy_that_did_not_learn_it_is_told_nothing_and_refuses_to_be(policy: Pi05Policy) -> None:
    assert policy.resolved.advantage is None
    for acting in (Acting(advantage="positive"), Acting(guidance=2.0)):
        with pytest.raises(ValueError, match="was not trained on actions with their advantage"):
            policy.acting_as(acting)


def test_guidance_needs_training_that_left_the_advantage_out_and_the_flow(data: Pi05DataModule) -> None:
    policy = told(data)
    policy.processor.language = replace(policy.processor.language, advantage_omission=0.0)
    with pytest.raises(ValueError, match="advantage_omission was 0"):
        policy.acting_as(Acting(guidance=1.5))
    for wrong in ({"actions": "fast"}, {"advantage": "none"}):
        with pytest.raises(ValueError, match="guidance"):
            Acting(guidance=1.5, **wrong)
