"""π0.5 in full size trained by `pi05 fit` with adapters: how much memory the process takes, by how its base is kept.

Random weights, a vocabulary of Gemma's size, made-up data of two cameras, one sample a step, activation checkpointing,
LoRA of rank 16, bf16. A run takes minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.harness import Options, Row, run_part, share

LIMITS = {"nf4": 7.0, "int8": 9.0}
STEPS, SIDE = 2, 256


def small_card(options: Options) -> list[Row]:
    """Peak resident memory of training adapters at full size beside an nf4 and an int8 base, against its limit."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = record(Path(folder))
        tokenizer, size = ("tiny", "debug") if options.quick else (str(save_tokenizer(Path(folder))), "base")
        for base, limit in LIMITS.items():
            name = f"peak memory of `pi05 fit`, base, LoRA: our {base} base against a limit of {limit:g} GB"
            rows.append(share(name, "<= 1", "GB", [limit], [peak(Path(folder), dataset, tokenizer, size, base)]))
    return rows


def peak(folder: Path, dataset: Path, tokenizer: str, size: str, base: str) -> float:
    """The most GB (10⁹ bytes) that a run had resident, from its start to its last checkpoint."""
    run = folder / f"run_{base}"
    options = {
        "model.config": size,
        "model.init_from": "null",
        "model.lora.rank": "16",
        "model.base": base,
        "data.sources.robot.path": str(dataset),
        "data.tokenizer": tokenizer,
        "data.batch_size": "1",
        "data.num_workers": "0",
        "stages.posttrain_steps": str(STEPS),
        "stages.posttrain.warmup_steps": "0",
        "trainer.precision": "bf16-true",
        "trainer.limit_val_batches": "0",
        "run": str(run),
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "pi05_lightning", "fit", "-c", "configs/finetune.yaml", *words]
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"pi05 fit ended with {process.returncode}")
    saved = sum(file.stat().st_size for file in run.glob("checkpoints/*.ckpt") if not file.is_symlink()) / 1e9
    gigabytes = used.ru_maxrss * 1024 / 1e9
    print(f"  {base} base: {gigabytes:.2f} GB resident, a checkpoint of {saved:.2f} GB", flush=True)
    shutil.rmtree(run)
    return gigabytes


def record(folder: Path) -> Path:
    """A dataset of two cameras."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    cameras = [f"observation.images.{name}" for name in ("top", "wrist")]
    vector = {"dtype": "float32", "shape": (6,), "names": [f"joint {i}" for i in range(6)]}
    image = {"dtype": "image", "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channels"]}
    features = {"observation.state": vector, "action": vector, **dict.fromkeys(cameras, image)}
    root, random = folder / "dataset", np.random.default_rng(0)
    dataset = LeRobotDataset.create("pi05/small_card", 10, features, root=root, use_videos=False)
    for _ in range(2):
        for _ in range(10):
            vectors = {name: random.normal(size=6).astype(np.float32) for name in ("observation.state", "action")}
            images = {name: random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for name in cameras}
            dataset.add_frame({**vectors, **images, "task": "fold the towel"})
        dataset.save_episode()
    dataset.finalize()
    return root


def save_tokenizer(folder: Path) -> Path:
    """A tokenizer of PaliGemma's kind and size that knows few words, as PaliGemma's own is gated."""
    from transformers import GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*"▁abcdefghijklmnopqrstuvwxyz0123456789:,;", "ab"]
    tokens += [f"<unused{i}>" for i in range(256_000 - len(tokens))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    GemmaTokenizer(vocab=vocabulary, merges=[("a", "b")]).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


if __name__ == "__main__":
    run_part(small_card)
