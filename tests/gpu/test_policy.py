"""A policy on CUDA acts as it does on the CPU, eagerly and by graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from pi05_lightning import Pi05Policy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def test_policy_on_cuda_acts_as_on_the_cpu(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = fit("cuda")
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    frame = trainer.datamodule.sources("val")["robot"][0]
    observation = {"image": frame.images, "state": frame.state, "task": frame.task}
    policies = [Pi05Policy.from_pretrained(path, device=device) for device in ("cpu", "cuda")]
    policies += [Pi05Policy.from_pretrained(path, device="cuda", cuda_graph=how) for how in ("plain", "compiled")]
    config = policies[0].model.config
    noise = np.random.default_rng(0).normal(size=(config.horizon, config.action_dim)).astype(np.float32)
    expected, *others = (policy.predict_chunk(observation, noise) for policy in policies)
    for chunk in others:
        np.testing.assert_allclose(chunk, expected, rtol=1e-3, atol=1e-3)
    assert len({policy.predict_subtask(observation) for policy in policies}) == 1
    session = policies[2].session(1)
    assert session.predict(observation).shape == (policies[2].action_dim,)
