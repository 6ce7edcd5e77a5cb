"""`pi05 serve`: a policy behind a websocket."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from pi05_lightning.inference import Acting
from pi05_lightning.policy import CudaGraph, Pi05Policy
from pi05_lightning.serving.server import PolicyServer, Reader, check_address


def serve(
    checkpoint: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    cameras: dict[str, str] | None = None,
    state_keys: list[str] | None = None,
    ignored_keys: list[str] | None = None,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] | None = None,
    cuda_graph: CudaGraph | None = None,
    base: str | None = None,
    seed: int = 0,
    **acting: Any,
) -> None:
    """Serve a checkpoint to openpi's clients until it is interrupted.

    An observation is a dictionary with images uint8[H W 3] or [3 H W], a state, and the instruction under `prompt` or
    `task`. Images and state are found by the last part of their key: `observation/image` is the camera `image`,
    `observation/state` the state; a dictionary `images` names its cameras itself. `reset: true` begins a new episode,
    as a new connection does.

    Args:
        checkpoint: a .ckpt, a run's directory or an exported folder.
        host: address to listen at; 0.0.0.0 listens to the network, where anybody may ask.
        port: 0 takes a free one.
        cameras: the policy's cameras, each with its key in the observation, where that has another name.
        state_keys: keys of the observation that are concatenated to the state.
        ignored_keys: keys of the observation, or their last parts, that are not for the policy; other arrays that
            nothing reads are an error.
        device: where the model runs.
        dtype: what the weights are cast to; by default they stay as they are.
        cuda_graph: with device cuda, sample chunks by CUDA graphs, see `Pi05Policy`: `plain` or, faster after a longer
            start, `compiled`.
        base: of a checkpoint of adapters: where the weights are that they stand beside, a path or Hub id, if not where
            they were.
        seed: of every client's noise.
        acting: how the policy acts, see `Acting`; execution_horizon is how many actions of a chunk are sent.

    Raises ValueError when there is no policy at `checkpoint`, and OSError, before that is read, when the port is taken.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    how = Acting(inference_delay=0, **acting)  # the client decides when it asks
    asyncio.run(check_address(host, port))  # loading a policy may take minutes
    cast = None if dtype is None else getattr(torch, dtype)
    options: dict[str, Any] = {"device": device, "dtype": cast, "base": base, "cuda_graph": cuda_graph}
    policy = Pi05Policy.from_pretrained(checkpoint, **options, **asdict(how))
    read = Reader(policy.inputs.cameras, cameras or {}, state_keys, ignored_keys or (), how.missing_cameras)
    server = PolicyServer(policy, read, seed, str(checkpoint))
    server.warm_up()
    with suppress(KeyboardInterrupt):
        asyncio.run(server.run(host, port))
