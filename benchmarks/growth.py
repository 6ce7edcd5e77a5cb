"""Our training step at `mid` against horizon, cameras, tokens, batch and draws: a look for surprises."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.harness import Options, Row, flops_of, run_part
from benchmarks.peer import make_inputs, randomize
from benchmarks.sizes import DEBUG, MID, Work
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05

REPEATS = 3


@dataclass(frozen=True)
class Point:
    """One measured step: what was varied to which value, seconds, FLOPs."""

    value: int
    seconds: float
    flops: int


def growth(options: Options) -> list[Row]:
    """Seconds per FLOP at the largest value of each knob over those at the smallest; above 1 is super-linear."""
    config = DEBUG if options.quick else MID
    work = Work(batch=1)
    knobs: dict[str, tuple[Sequence[int], Callable[[int], tuple[float, int]]]] = {
        "horizon": ((25, 50, 100, 200), lambda n: measure(replace(config, horizon=n), work)),
        "cameras": ((1, 2, 3, 4), lambda n: measure(config, replace(work, present=(True,) * n))),
        "tokens": ((50, 100, 200, 400), lambda n: measure(config, replace(work, tokens=n, padded=n))),
        "batch": ((1, 2, 4, 8), lambda n: measure(config, replace(work, batch=n))),
        "draws": ((1, 2, 4, 8), lambda n: measure(config, work, draws=n)),
    }
    curves = {name: [Point(value, *point(value)) for value in values] for name, (values, point) in knobs.items()}
    rows = []
    for name, points in curves.items():
        first, last = points[0], points[-1]
        per_flop = [point.seconds / point.flops for point in (first, last)]
        ratio = per_flop[1] / per_flop[0]
        label = f"growth with {name}, {first.value} to {last.value}: seconds per TFLOP"
        rows.append(Row(label, "", ratio, ratio, ratio, 1e12 * per_flop[0], 1e12 * per_flop[1], "s/TFLOP"))
    return rows


def measure(config: ModelConfig, work: Work, draws: int = 1) -> tuple[float, int]:
    """Seconds, the median of a few, and FLOPs of forward and backward of the flow loss."""
    model = Pi05(config)
    randomize(model)
    batch = make_inputs(config, work).batch
    assert batch.noise is not None
    assert batch.time is not None
    batch = replace(batch, noise=batch.noise.repeat(1, draws, 1, 1), time=batch.time.repeat(1, draws))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        flow = model(batch, ["flow"])["flow"].values
        assert flow is not None
        flow.mean().backward()

    flops = flops_of(step)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), flops


if __name__ == "__main__":
    run_part(growth)
