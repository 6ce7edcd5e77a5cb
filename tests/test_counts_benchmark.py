"""`python -m benchmarks.counts` at debug size: both sides are counted without memory, and the goals hold."""

from __future__ import annotations

import pytest

from benchmarks.counts import counts
from benchmarks.harness import Options


@pytest.mark.slow
def test_work_and_memory_of_both_sides_are_counted() -> None:
    rows = counts(Options(quick=True))
    assert [row.name.partition(",")[0] for row in rows] == [
        "FLOPs of a training step with checkpointing",
        "FLOPs of a training step",
        "FLOPs of one chunk",
        "peak activation memory of a training step with checkpointing",
        "peak activation memory of a training step",
        "sharded",
        "sharded",
    ]
    assert all(row.ours > 0 and row.peer > 0 and row.met for row in rows)
