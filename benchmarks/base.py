"""π0.5 in full size and bf16, each side a process of its own: from file to first chunk, more chunks, peak memory.

Random weights are written once, as LeRobot's own checkpoint. LeRobot needs 18 GB while it loads, so it loads alone;
for the timed chunks both are loaded and take turns. So do LeRobot's and ours in int8, once ours in bf16 has ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.harness import INT8_TOLERANCE, Options, Row, alternate, check_equal, run_part, share, speed_up
from benchmarks.limit import limit_seconds, share_of_limit
from benchmarks.sizes import BASE, DEBUG, ONE_ROBOT
from pi05_lightning.models.config import ModelConfig

CHUNK_TOLERANCE = 2**-7  # of the largest action: two of bf16's own steps, as both round to it, in another order
BLOCK = 16_777_213  # values drawn; a prime, so that no two rows of a matrix are alike when it is repeated


def base(options: Options) -> list[Row]:
    """π0.5 in full size, bf16, batch 1, against LeRobot's: time to the first chunk, per chunk, and peak memory."""
    config = DEBUG if options.quick else BASE
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config)
        with Side("peer", folder, options) as peer:
            with Side("ours", folder, options) as ours:
                theirs, found = (torch.load(Path(folder) / f"{name}.pt") for name in ("peer", "ours"))
                check_equal("chunk", found, theirs, CHUNK_TOLERANCE)
                seconds = alternate(peer.chunk, ours.chunk, options.pairs)
            with Side("int8", folder, options) as int8:
                check_equal("chunk, int8", torch.load(Path(folder) / "int8.pt"), found, INT8_TOLERANCE)
                int8_seconds = alternate(peer.chunk, int8.chunk, options.pairs)
    # loaded once: LeRobot's takes minutes
    to_first = [peer.report["first_chunk"]], [ours.report["first_chunk"]]
    memory = [peer.report["peak_gib"]], [ours.report["peak_gib"]]
    int8_memory = [peer.report["peak_gib"]], [int8.report["peak_gib"]]
    return [
        speed_up("one chunk, base, bf16, 2 of 3 cameras, 60 tokens", ">= 2.5", seconds),
        share_of_limit("one chunk, base, bf16", ">= 0.85", ours.report["limit"], seconds[1]),
        speed_up("from file to first chunk, base, bf16", ">= 10", to_first),
        share("peak resident memory, base, bf16 inference, loading included", "<= 0.5", "GiB", *memory),
        speed_up("one chunk, base, our int8 against bf16, 2 of 3 cameras, 60 tokens", ">= 3.5", int8_seconds),
        share("peak resident memory, base, our int8 against bf16 inference", "<= 0.28", "GiB", *int8_memory),
    ]


class Side:
    """A process that loads a checkpoint, says how long its first chunk took, and makes another when asked."""

    def __init__(self, name: str, folder: str, options: Options) -> None:
        command = [sys.executable, "-m", "benchmarks.base", "--side", name, folder]
        self.process = subprocess.Popen(
            [*command, "--quick"] if options.quick else command,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.report: dict[str, float] = json.loads(self._read())
        print(f"  {name}: {self.report}", flush=True)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def chunk(self) -> None:
        """Wait for one more chunk."""
        assert self.process.stdin is not None
        self.process.stdin.write("again\n")
        self.process.stdin.flush()
        self._read()

    def _read(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(">"):  # all else is what LeRobot prints
                return line[1:]
        raise RuntimeError(f"benchmarks.base ended with {self.process.wait()}")


# --- inside a side's process


def serve(name: str, folder: Path, config: ModelConfig) -> None:
    """Load, make a chunk, report, and make another for each line on stdin."""
    from benchmarks.peer import lerobot_sizes, make_inputs  # importing is not timed

    inputs = make_inputs(config, ONE_ROBOT)
    chunk: Callable[[], Tensor]
    if name == "peer":
        from lerobot.policies.pi05.modeling_pi05 import PI05Policy

        with torch.no_grad(), lerobot_sizes(config):
            start = time.perf_counter()
            lerobot = PI05Policy.from_pretrained(folder).model.eval()
            chunk = lambda: inputs.lerobot_chunk(lerobot)  # noqa: E731
            first = chunk()
    else:
        from pi05_lightning.weights.int8 import int8_model
        from pi05_lightning.weights.locate import locate

        start = time.perf_counter()
        weights = locate(folder)
        ours = (int8_model(weights) if name == "int8" else weights.model(torch.bfloat16)).eval()
        chunk = lambda: inputs.our_chunk(ours)  # noqa: E731
        first = chunk()
    report = {"first_chunk": time.perf_counter() - start}
    report["peak_gib"] = peak_resident_memory() / 2**30
    torch.save(first.float(), folder / f"{name}.pt")
    if name == "ours":
        report["limit"] = limit_seconds(chunk)
    print(">" + json.dumps(report), flush=True)
    for _ in sys.stdin:
        chunk()
        print(">", flush=True)


def peak_resident_memory() -> int:
    """Bytes, of this program alone: `getrusage` would include what the parent had when it started it."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def write_checkpoint(folder: Path, config: ModelConfig) -> None:
    """Random weights in LeRobot's format, the heads that nothing reads included, for without them it loads nothing."""
    from lerobot.configs import FeatureType, PolicyFeature

    from benchmarks.peer import build_lerobot, lerobot_config

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_lerobot(config).state_dict().items()}
    values = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = {}
    for name, shape in shapes.items():
        fan_in = shape[-1] if "embed_tokens" in name else shape[1:].numel()
        std = fan_in**-0.5 if len(shape) > 1 else 0.1
        count = shape.numel()
        tensors[f"model.{name}"] = (values.repeat(-(-count // BLOCK))[:count] * std).view(shape)
        values = values.roll(997)
    save_file(tensors, folder / "model.safetensors")
    image = PolicyFeature(FeatureType.VISUAL, (3, config.vision.image_size, config.vision.image_size))
    settings = lerobot_config(
        config,
        dtype="bfloat16",
        input_features={
            "observation.images.top": image,
            "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (config.action_dim,))},
    )
    settings.save_pretrained(folder)


if __name__ == "__main__":
    if "--side" in sys.argv:
        at = sys.argv.index("--side")
        serve(sys.argv[at + 1], Path(sys.argv[at + 2]), DEBUG if "--quick" in sys.argv else BASE)
    else:
        run_part(base)
