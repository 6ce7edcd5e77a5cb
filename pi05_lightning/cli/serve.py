"""`pi05 serve`: a policy behind a websocket."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from pi05_lightning.acting import Acting, measured
from pi05_lightning.acting.device import Dtype
from pi05_lightning.files.ranges import check_range
from pi05_lightning.policy import CudaGraph, Pi05Policy
from pi05_lightning.serving.access import Access
from pi05_lightning.serving.address import check_address
from pi05_lightning.serving.batches import Batching
from pi05_lightning.serving.limits import Limits
from pi05_lightning.serving.reader import Reader
from pi05_lightning.serving.server import PolicyServer
from pi05_lightning.serving.until_signal import serve_until_signal
from pi05_lightning.sim.modes import PolicyMode
from pi05_lightning.weights.locate import pinned

log = logging.getLogger(__name__)


def serve(
    checkpoint: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    cameras: dict[str, str] | None = None,
    state_keys: list[str] | None = None,
    ignored_keys: list[str] | None = None,
    device: str = "cpu",
    dtype: Dtype | None = None,
    cuda_graph: CudaGraph | None = None,
    base: str | None = None,
    tokenizer: str | None = None,
    seed: int = 0,
    max_batch: int | None = None,
    batch_wait: float = 0.03,
    max_waiting: int = 256,
    token: str | None = None,
    token_file: Path | None = None,
    allowed_hosts: list[str] | None = None,
    max_clients: int = 64,
    client_timeout: float = 20.0,
    max_message_bytes: int = 33_554_432,
    max_image_bytes: int = 16_777_216,
    max_values: int = 10_000,
    drain_timeout: float = 30.0,
    as_measured: bool | PolicyMode = False,
    **acting: Any,
) -> None:
    """Serve a checkpoint to openpi's clients until it is interrupted.

    An observation is a dictionary with images uint8[H W 3] or [3 H W], a state, and the instruction under `prompt` or
    `task`. Images and state are found by the last part of their key: `observation/image` is the camera `image`,
    `observation/state` the state; a dictionary `images` names its cameras itself. `reset: true` begins a new episode,
    as a new connection does.

    Args:
        checkpoint: a .ckpt, a run's directory, an exported folder, LeRobot's or openpi's.
        host: address to listen at; 0.0.0.0 listens to the network, which needs a token.
        port: 0 takes a free one.
        cameras: the policy's cameras, each with its key in the observation, where that has another name.
        state_keys: keys that make up the state, in their order.
        ignored_keys: keys, or their last parts, that are not for the policy; others that nothing reads are an error.
        device: where the model runs.
        dtype: what the weights are cast to; by default none. With int8, layers compute in 8 bits where actions allow.
        cuda_graph: chunks are CUDA graphs: `plain`, or `compiled`, which is faster and starts slowly.
        base: of a checkpoint of adapters: a path or Hub id of the weights that they stand beside, if they moved.
        tokenizer: of a LeRobot or openpi folder: the local folder of PaliGemma's tokenizer.
        seed: of every client's noise.
        max_batch: requests computed together; by default 32, with cuda_graph 1.
        batch_wait: seconds to wait for clients who are about to ask.
        max_waiting: requests that may wait for the model.
        token: what clients give as api_key. Others can read it here: set PI05_TOKEN.
        token_file: a file that holds the token.
        allowed_hosts: more names by which clients and pages may reach this machine.
        max_clients: clients at a time; one more is told so.
        client_timeout: seconds until a client that is too slow is ended.
        max_message_bytes: of one observation.
        max_image_bytes: of one image, or of any other array.
        max_values: keys, numbers, texts and arrays in one message.
        drain_timeout: seconds to answer what waits, after SIGTERM.
        as_measured: act as in the run's rollout, in its first mode or the one that is named; options of `acting` that
            say otherwise are refused.
        acting: how the policy acts, see `Acting`; execution_horizon is how many actions of a chunk are sent, beyond
            those of inference_delay.

    Raises ValueError when there is no policy at `checkpoint`, and before that is read for a network without a token,
    and OSError when the port is taken.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    how = Acting(**acting)
    check_range("drain_timeout", drain_timeout, 0)
    batching = Batching((1 if cuda_graph else 32) if max_batch is None else max_batch, batch_wait, max_waiting)
    limits = Limits(
        max_message_bytes, max_image_bytes, max_values, max_clients=max_clients, client_timeout=client_timeout
    )
    asyncio.run(check_address(host, port))  # reading a checkpoint may take minutes
    access = Access.of(host, token, token_file, allowed_hosts or ())
    weights = checkpoint
    if as_measured:
        weights = pinned(checkpoint)  # a run that trains may have others in a moment
        how, dtype = acting_as_measured(checkpoint, None if as_measured is True else as_measured, how, dtype)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "base": base, "tokenizer": tokenizer}
    policy = Pi05Policy.from_pretrained(weights, cuda_graph=cuda_graph, **options, **asdict(how))
    states = state_keys if policy.inputs.robot.state_dim else []
    read = Reader(policy.inputs.cameras, cameras or {}, states, ignored_keys or (), how.missing_cameras)
    log.info("acting with %s", ", ".join(f"{name} {value}" for name, value in asdict(policy.resolved).items()))
    server = PolicyServer(policy, read, seed, str(checkpoint), batching, limits, access)
    server.warm_up()
    asyncio.run(serve_until_signal(server, host, port, drain_timeout))


def acting_as_measured(
    checkpoint: Path, wanted: PolicyMode | None, given: Acting, dtype: Dtype | None
) -> tuple[Acting, Dtype | None]:
    """How the policy acted in its rollout, and in which dtype.

    ValueError as `measured`, and for given options that would change it.
    """
    how, mode, kind = measured(checkpoint, wanted)
    then, default = asdict(how) | {"dtype": kind}, asdict(Acting()) | {"dtype": None}
    for name, value in (asdict(given) | {"dtype": dtype}).items():
        if value != default[name] and value != then[name]:
            raise ValueError(
                f"{name}: as_measured serves the mode {mode} of the rollout, which had {name} {then[name]}, not"
                f" {value}: leave out one of the two"
            )
    return how, cast("Dtype | None", kind)
