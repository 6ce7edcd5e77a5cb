"""The other parts of `benchmarks.gpu`: what the device reaches, action chunks, tests, and LeRobot beside ours."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu_figures import GIB, Figure, Place
from benchmarks.harness import check_equal
from benchmarks.sizes import ONE_ROBOT, Work
from pi05_lightning.models.capture import CapturedChunk
from pi05_lightning.models.parallelize import checkpoint_blocks, compile_blocks
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.profiling.rate import matmul_rate
from pi05_lightning.profiling.step import StepShape

ROOT = Path(__file__).parents[1]
CHUNK_TOLERANCE = 2**-6  # of the largest action, in bf16: some of its own steps
PEER_BATCH = 8


# --- what it all stands on


def ceilings(place: Place) -> list[Figure]:
    """What this device reaches at best: a large bf16 product, and a large copy (bytes read and written)."""
    size = 1 << (16 if place.quick else 31)
    source, target = (torch.empty(size, dtype=torch.uint8, device=place.device) for _ in range(2))
    seconds = place.seconds(lambda: target.copy_(source), repeats=20)
    return [
        Figure(
            "bf16 product", matmul_rate(torch.bfloat16, place.device, 256 if place.quick else None) / 1e12, "TFLOP/s"
        ),
        Figure("copy", 2 * size / seconds / 1e12, "TB/s"),
    ]


def tests(place: Place) -> list[Figure]:
    """The tests marked `gpu`."""
    start = time.perf_counter()
    brief = ["-q", "--tb=short", "--disable-warnings", "--durations=0"]
    command = [sys.executable, "-m", "pytest", *brief, "-m", "gpu", "tests/gpu", "-n", "4", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout[-6000:], flush=True)
    if done.returncode:
        raise AssertionError(f"pytest ended with {done.returncode}")
    return [Figure("tests marked gpu, all passed", time.perf_counter() - start, "s")]


# --- action chunks


def random_model(place: Place) -> Pi05:
    model = Pi05.without_memory(place.config)
    model.to(torch.bfloat16).to_empty(device=place.device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # adaRMS too, which begins as zero
            parameter.normal_(0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return model.eval()


def chunks(place: Place) -> list[Figure]:
    """One robot's chunk of ten Euler steps, in bf16: launched kernel by kernel, and as one CUDA graph."""
    figures, model, config = [], random_model(place), place.config
    ways: dict[str, Callable[..., Tensor]] = {"eager": model.chunk}
    if place.device.type == "cuda":
        ways |= {"CUDA graph": CapturedChunk(model), "compiled CUDA graph": CapturedChunk(model, compile=True)}
    noise = torch.randn(1, config.horizon, config.action_dim).to(place.device)
    for cameras in (2, 3):
        shape = StepShape(cameras=cameras, prompt_tokens=64)
        batch = replace(shape.batch(config), actions=torch.zeros(0, config.horizon, config.action_dim)).to(place.device)
        expected = model.chunk(batch, noise)
        for way, chunk in ways.items():
            name = f"one chunk, {way}, {cameras} cameras"
            start = time.perf_counter()
            check_equal(name, chunk(batch, noise), expected, CHUNK_TOLERANCE)
            if way != "eager":
                figures.append(Figure(f"{name}: first", time.perf_counter() - start, "s"))
            seconds = place.seconds(lambda c=chunk, b=batch: c(b, noise), repeats=30)
            figures.append(Figure(name, 1e3 * seconds, "ms", "<= 40" if way.startswith("compiled") else ""))
    if place.device.type == "cuda":
        figures.append(Figure("chunks: peak memory", torch.cuda.max_memory_allocated() / GIB, "GiB"))
    return figures


# --- against LeRobot


def peer(place: Place) -> list[Figure]:
    """The same weights and inputs, in LeRobot's own bf16: a chunk, and forward and backward with checkpointing."""
    from benchmarks.peer import build_lerobot, make_inputs, randomize, with_weights_of

    config, device = place.config, place.device
    with torch.device(device):
        lerobot = build_lerobot(config, dtype="bfloat16")
    randomize(lerobot)
    ours = with_weights_of(lerobot, config)
    figures = []
    for cameras, work in ((2, ONE_ROBOT), (3, Work(batch=1, present=(True, True, True), tokens=200))):
        inputs = make_inputs(config, work, str(device))
        lerobot.eval()
        ours.eval()
        with torch.no_grad():
            check_equal("chunk", inputs.our_chunk(ours), inputs.lerobot_chunk(lerobot), CHUNK_TOLERANCE)
            assert inputs.batch.noise is not None
            ways = {
                "LeRobot": partial(inputs.lerobot_chunk, lerobot),
                "ours, eager": partial(inputs.our_chunk, ours),
            }
            if device.type == "cuda":
                ways["ours, compiled CUDA graph"] = partial(
                    CapturedChunk(ours, compile=True), inputs.batch, inputs.batch.noise[:, 0]
                )
            seconds = {way: place.seconds(chunk, repeats=10) for way, chunk in ways.items()}
        figures += compared(f"one chunk, {cameras} of 3 cameras", seconds)
    lerobot.train()
    ours.train()
    lerobot.gradient_checkpointing_enable()
    compiled = with_weights_of(lerobot, config).train()
    compile_blocks(compiled)
    for model in (ours, compiled):
        checkpoint_blocks(model)
    inputs = make_inputs(config, Work(batch=2 if place.quick else PEER_BATCH), str(device))

    def step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            value = loss().mean()
            value.backward()
            model.zero_grad(set_to_none=True)
            return value.detach()

        return run

    steps = {
        "LeRobot": step(lerobot, lambda: inputs.lerobot_loss(lerobot)),
        "ours, eager": step(ours, lambda: inputs.our_loss(ours)),
        "ours, compiled": step(compiled, lambda: inputs.our_loss(compiled)),
    }
    expected, *losses = (run() for run in steps.values())
    for loss in losses:
        check_equal("loss", loss, expected, CHUNK_TOLERANCE)
    seconds = {way: place.seconds(run, repeats=5) for way, run in steps.items()}
    name = f"forward and backward with checkpointing, batch {PEER_BATCH}, 2 of 3 cameras, 60 of 200 tokens"
    return [*figures, *compared(name, seconds)]


def compared(name: str, seconds: dict[str, float]) -> list[Figure]:
    """Of each way its time, and how many times faster than LeRobot each of ours is; the fastest has the goal."""
    fastest = min(seconds, key=seconds.__getitem__)
    times = [Figure(f"{name}: {way}", 1e3 * value, "ms") for way, value in seconds.items()]
    ratios = [
        Figure(f"{name}: LeRobot over {way}", seconds["LeRobot"] / value, "×", ">= 2" if way == fastest else "")
        for way, value in seconds.items()
        if way != "LeRobot"
    ]
    return [*times, *ratios]
