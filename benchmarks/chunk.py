"""One action chunk at `mid`, fp32 and int8, ten denoising steps, against LeRobot's fp32 on the same weights."""

from __future__ import annotations

import torch

from benchmarks.harness import (
    INT8_TOLERANCE,
    TOLERANCE,
    Options,
    Row,
    alternate,
    check_equal,
    run_part,
    speed_up,
)
from benchmarks.limit import limit_seconds, share_of_limit
from benchmarks.peer import build_lerobot, make_inputs, with_weights_of
from benchmarks.sizes import ALL_PRESENT, DEBUG, MID, PART_PRESENT, Work
from pi05_lightning.models.int8 import Int8Product, linear_layers


def chunk(options: Options) -> list[Row]:
    """One chunk of actions at `mid` against LeRobot's."""
    config = DEBUG if options.quick else MID
    lerobot = build_lerobot(config).eval()
    ours = with_weights_of(lerobot, config).eval()
    rows = []
    works: tuple[tuple[str, str, Work], ...] = (
        ("one chunk, mid, fp32, 2 of 3 cameras, 60 tokens", ">= 2.2", PART_PRESENT),
        ("one chunk, mid, fp32, all present", ">= 1.6", ALL_PRESENT),
    )
    for name, goal, work in works:
        inputs = make_inputs(config, work)
        print(f"{name}: {work}", flush=True)
        check_equal("chunk", inputs.our_chunk(ours), inputs.lerobot_chunk(lerobot), TOLERANCE[torch.float32])
        seconds = alternate(
            lambda x=inputs: x.lerobot_chunk(lerobot), lambda x=inputs: x.our_chunk(ours), options.pairs
        )
        rows.append(speed_up(name, goal, seconds))
        rows.append(share_of_limit(name, "", limit_seconds(lambda x=inputs: x.our_chunk(ours)), seconds[1]))
    for name, layer in linear_layers(ours).items():
        ours.set_submodule(name, Int8Product(layer.weight, layer.bias))
    inputs = make_inputs(config, PART_PRESENT)
    check_equal("chunk, int8", inputs.our_chunk(ours), inputs.lerobot_chunk(lerobot), INT8_TOLERANCE)
    seconds = alternate(lambda: inputs.lerobot_chunk(lerobot), lambda: inputs.our_chunk(ours), options.pairs)
    rows.append(speed_up("one chunk, mid, our int8 against fp32, 2 of 3 cameras, 60 tokens", "", seconds))
    return rows


if __name__ == "__main__":
    run_part(chunk)
