"""FAST tokens of many chunks at once, against the public processor, which LeRobot carries a copy of."""

from __future__ import annotations

import tempfile

import numpy as np
from lerobot.policies.molmoact2.molmoact2_hf_model.action_tokenizer import UniversalActionProcessor

from benchmarks.harness import Options, Row, alternate, run_part, speed_up
from pi05_lightning.data.fast import FastTokenizer

HORIZON, DIM, SCALE = 50, 14, 10


def fast(options: Options) -> list[Row]:
    """Batched FAST encoding of chunks of 50 steps and 14 dims against the public processor."""
    count = 200 if options.quick else 20_000
    rows = []
    for what, noise in (("smooth", 0.0), ("noisy", 0.02)):
        fitted_on, chunks = make_chunks(1000, noise, seed=0), make_chunks(count, noise, seed=1)
        fitted = UniversalActionProcessor.fit(list(fitted_on), SCALE, 2048, time_horizon=HORIZON, action_dim=DIM)
        with tempfile.TemporaryDirectory() as folder:
            fitted.save_pretrained(folder)
            peer, ours = UniversalActionProcessor.from_pretrained_local(folder), FastTokenizer.load(folder)
        theirs = peer(chunks)
        found = ours.encode(chunks)
        # where a coefficient is outside the vocabulary the public one drops it, and loses the chunk; ours moves it
        spelled = ~ours.quantize(chunks)[1].any((1, 2))
        assert spelled.mean() > 0.9, "most chunks must be comparable"
        assert all(list(a) == list(b) for a, b, s in zip(found, theirs, spelled, strict=True) if s), "tokens differ"
        tokens = np.mean([len(row) for row in found])
        print(f"  {what}: {spelled.sum()} chunks with identical tokens, {tokens:.0f} tokens each", flush=True)
        seconds = alternate(lambda p=peer, c=chunks: p(c), lambda o=ours, c=chunks: o.encode(c), options.pairs)
        rows.append(speed_up(f"FAST encode, {count} {what} chunks of {HORIZON} × {DIM}", ">= 1", seconds))
    return rows


def make_chunks(count: int, noise: float, seed: int) -> np.ndarray:
    """Normalised motions f32[N T A]: a few low frequencies, and white noise."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, np.pi, HORIZON)
    waves = np.stack([np.cos(k * time) / (1 + k) ** 1.5 for k in range(6)], axis=1)
    motions = np.einsum("tk,nka->nta", waves, rng.normal(size=(count, 6, DIM)) / 2)
    return (motions + noise * rng.normal(size=motions.shape)).clip(-1.2, 1.2).astype(np.float32)


if __name__ == "__main__":
    run_part(fast)
