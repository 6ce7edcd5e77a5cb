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
from pi05_lightning.cli.rollout import rollout
from pi05_lightning.cli.serve import serve
from pi05_lightning.data.fast import FastTokenizer
from pi05_lightning.data.prompt import Prompts
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.evaluation.metrics import Evaluator
from pi05_lightning.inference import Acting
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.serving.server import PolicyServer, Reader
from pi05_lightning.training.callbacks.rollout import PeriodicRollout
from pi05_lightning.types import Modality, Subset

CONFIG = ModelConfig.preset("debug")


@pytest.fixture
def data(videos: Path, tmp_path: Path) -> Pi05DataModule:
    chunks = np.random.default_rng(0).uniform(-1, 1, (200, CONFIG.horizon, 2)).astype(np.float32)
    FastTokenizer.fit(chunks, vocab_size=CONFIG.fast_vocab_size).save(tmp_path)
    robot = LeRobotConfig(str(videos), val_fraction=0.2)
    return Pi05DataModule({"robot": robot}, batch_size=2, num_workers=0, fast=tmp_path, shapes=CONFIG.shapes)


@pytest.fixture
def policy(data: Pi05DataModule) -> Pi05Policy:
    model = Pi05(CONFIG)
    model.reset_parameters()
    return Pi05Policy((model, data.processor))


# --- defaults


def test_half_of_a_chunk_is_executed_by_default(policy: Pi05Policy) -> None:
    server = PolicyServer(policy, Reader(policy.processor.cameras, {}, None))
    assert CONFIG.horizon == 8
    assert policy.execution_horizon == server.metadata["action_horizon"] == 4


@pytest.mark.parametrize(("horizon", "delay", "executed"), [(8, 0, 4), (7, 0, 3), (1, 0, 1), (8, 6, 2)])
def test_default_is_at_least_one_and_leaves_room_for_the_delay(horizon: int, delay: int, executed: int) -> None:
    assert Acting(inference_delay=delay).executed(horizon) == executed


@pytest.mark.parametrize("command", [serve, rollout])
def test_command_has_the_policys_defaults(command: Callable[..., Any]) -> None:
    parser = ArgumentParser()
    parser.add_function_arguments(command)
    found = {name: value for name, value in vars(parser.get_defaults()).items() if name in asdict(Acting())}
    assert found.keys() >= {"execution_horizon", "replan_subtask_every", "num_steps", "noise_scale"}
    assert Acting(**found) == Acting()


def test_rollout_during_training_has_the_policys_defaults() -> None:
    assert PeriodicRollout(every_n_steps=1).acting == Acting()


def test_policy_acts_as_its_keywords_say(policy: Pi05Policy) -> None:
    given = {"replan_subtask_every": 2, "num_steps": 3, "noise_scale": 0.5, "temperature": 1.0, "hierarchical": False}
    acting = Pi05Policy((policy.model, policy.processor), pred_horizon=5, **given).acting
    assert acting == Acting(execution_horizon=5, **given)


def test_unknown_keyword_is_named(policy: Pi05Policy) -> None:
    with pytest.raises(TypeError, match="noise_scales"):
        Pi05Policy((policy.model, policy.processor), noise_scales=0)


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
