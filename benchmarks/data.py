"""Loader throughput on a two-camera video dataset, two workers: from files to what the model gets, on both sides."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy, pad_vector
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import PolicyProcessorPipeline, TokenizerProcessorStep, make_default_policy_processor_steps
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from benchmarks.harness import Options, Row, alternate, run_part, speed_up
from pi05_lightning.data.datamodule import Pi05DataModule
from pi05_lightning.data.processor import Language
from pi05_lightning.data.prompt import Prompts
from pi05_lightning.data.samples import Samples
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.data.tokenizer import TextTokenizer
from pi05_lightning.types import Batch, Modality, Shapes, Subset

FPS, SIDE, DIM, HORIZON, BATCH, WORKERS = 30, 256, 7, 50, 8, 2
CAMERAS = ("top", "wrist")
SHAPES = Shapes(224, HORIZON, 32, 4096, 1024, 1152)


def data(options: Options) -> list[Row]:
    """Samples per second of our loader against LeRobot's dataset and preprocessing, the same samples in one order."""
    episodes, length = (2, 60) if options.quick else (4, 200)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "dataset"
        record(root, episodes, length)
        order = np.random.default_rng(0).permutation(episodes * length)[: 400 if not options.quick else 32].tolist()
        module = Pi05DataModule(
            {"robot": LeRobotConfig(str(root), val_fraction=0)},
            language=Language(Prompts(clip_state=False), condition_on="task"),
            shapes=SHAPES,
        )
        peer, ours = Peer(root, order, Path(folder), module), our_loader(module, order)
        compare(peer, ours)
        seconds = alternate(lambda: list(peer), lambda: list(ours), options.pairs)
    name = f"loader, {len(CAMERAS)} cameras of {SIDE}² as video, {WORKERS} workers, {len(order)} samples"
    return [speed_up(name, ">= 3", seconds)]


class Peer:
    """LeRobot's dataset in a DataLoader, its processor steps, and what its policy does before its model."""

    def __init__(self, root: Path, order: list[int], folder: Path, module: Pi05DataModule) -> None:
        deltas = {"action": [step / FPS for step in range(HORIZON)]}
        dataset = LeRobotDataset("bench/data", root=root, delta_timestamps=deltas, return_uint8=True)
        self.loader: DataLoader[Any] = DataLoader(
            dataset, batch_size=BATCH, sampler=order, num_workers=WORKERS, persistent_workers=True
        )
        image = PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE))
        self.config = PI05Config(
            device="cpu",
            input_features={
                **{f"observation.images.{camera}": image for camera in CAMERAS},
                "observation.state": PolicyFeature(FeatureType.STATE, (DIM,)),
            },
            output_features={"action": PolicyFeature(FeatureType.ACTION, (DIM,))},
        )
        normalize = module.processor.robots["robot"].normalize
        stats = {
            key: {"q01": torch.tensor(part.q01), "q99": torch.tensor(part.q99)}
            for key, part in (("observation.state", normalize.state), ("action", normalize.action))
        }
        steps = make_default_policy_processor_steps(self.config, stats)
        tokenize = TokenizerProcessorStep(
            tokenizer_name=str(save_tokenizer(folder / "tokenizer")), max_length=200, padding="max_length"
        )
        self.pipeline = PolicyProcessorPipeline(
            [
                steps.rename_observations,
                steps.add_batch_dim,
                steps.normalize,
                Pi05PrepareStateTokenizerProcessorStep(),
                tokenize,
            ]
        )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.loader:
            # as its training script does it
            for camera in self.config.image_features:
                batch[camera] = batch[camera].float() / 255
            ready = self.pipeline(batch)
            images, _ = PI05Policy._preprocess_images(self, ready)  # type: ignore[arg-type]
            yield {
                "images": torch.stack(images, 1),
                "tokens": ready["observation.language.tokens"],
                "mask": ready["observation.language.attention_mask"],
                "actions": pad_vector(ready["action"], SHAPES.action_dim),
            }

    def parameters(self) -> Iterator[torch.Tensor]:
        """For `_preprocess_images`, which asks its policy for the device."""
        yield torch.zeros(1)


def our_loader(module: Pi05DataModule, order: list[int]) -> DataLoader[Any]:
    """Our samples of the same frames in the same order."""
    samples = Samples(module.sources("train"), module.processor)
    entry = samples.subsets.index(Subset("robot", Modality.CONTINUOUS))
    draws = [(entry, index, index) for index in order]
    return DataLoader(
        samples,
        batch_size=BATCH,
        sampler=draws,
        num_workers=WORKERS,
        persistent_workers=True,
        collate_fn=module.processor.collate,
    )


def compare(peer: Peer, ours: DataLoader[Any]) -> None:
    """The same images to half a grey level (ours stay uint8), the same tokens, the same actions."""
    for theirs, batch in zip(peer, ours, strict=True):
        assert isinstance(batch, Batch)
        pixels = batch.pixels.float().view_as(theirs["images"]) / 127.5 - 1
        assert (pixels - theirs["images"]).abs().max() <= 0.501 / 127.5, "images differ"
        for row, (tokens, mask) in enumerate(zip(theirs["tokens"], theirs["mask"].bool(), strict=True)):
            assert batch.tokens[row][batch.token_mask[row]].tolist() == tokens[mask].tolist(), "tokens differ"
        torch.testing.assert_close(batch.actions, theirs["actions"].float(), rtol=1e-5, atol=1e-5)
    print("  same images to half a grey level, same tokens, same actions", flush=True)


def save_tokenizer(folder: Path) -> Path:
    """The shipped tokenizer as LeRobot opens it; as PaliGemma's it begins a text with <bos>."""
    shipped = TextTokenizer.load("tiny").tokenizer
    bos = shipped.token_to_id("<bos>")
    shipped.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=shipped, **names).save_pretrained(folder)
    return folder


def record(root: Path, episodes: int, length: int) -> None:
    """A LeRobot v3 dataset of a moving square on a gradient, written and encoded by LeRobot."""
    features: dict[str, dict[str, Any]] = {
        f"observation.images.{camera}": {
            "dtype": "video",
            "shape": (SIDE, SIDE, 3),
            "names": ["height", "width", "channels"],
        }
        for camera in CAMERAS
    }
    features |= {key: {"dtype": "float32", "shape": (DIM,), "names": None} for key in ("observation.state", "action")}
    dataset = LeRobotDataset.create("bench/data", FPS, features, root=root)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE]
    for episode in range(episodes):
        for frame in range(length):
            row: dict[str, Any] = {"task": "move the square"}
            for number, camera in enumerate(CAMERAS):
                image = np.stack([x, y, np.full_like(x, 90 * number + 10 * episode)], -1).astype(np.uint8)
                left, top = (3 * frame + 40 * number) % (SIDE - 32), (5 * frame) % (SIDE - 32)
                image[top : top + 32, left : left + 32] = rng.integers(0, 255, (32, 32, 3))
                row[f"observation.images.{camera}"] = image
            numbers = rng.normal(size=(2, DIM)).astype(np.float32)
            dataset.add_frame({**row, "observation.state": numbers[0], "action": numbers[1]})
        dataset.save_episode()
    dataset.finalize()


if __name__ == "__main__":
    run_part(data)
