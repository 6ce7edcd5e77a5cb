"""How far off a keypoint stem points, trained to do nothing else: with `named_maps`, which also let it see further.

It learns places of things alone, from the frames of `pi05 collect --env MT50 --image_size 120 --answers_every 1`, and
is measured on the validation episodes.

    python experiments/008_mt50/pointing.py runs/mt50_20/data/robot --steps 800
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pi05_lightning.data.columns import evenly_spaced
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.data.split import Split
from pi05_lightning.data.tokenizer import SHIPPED, TextTokenizer
from pi05_lightning.models.config import ModelConfig, VisionConfig
from pi05_lightning.models.heads.location import Points
from pi05_lightning.models.keypoints import KeypointStem
from pi05_lightning.types import Frame, Modality

WIDTH, BATCH, SIZE = 192, 32, 120
TRAINED_ON, MEASURED_ON = 24_000, 1_000  # frames


def vision(named_maps: int) -> VisionConfig:
    return VisionConfig(
        SIZE, width=48, num_heads=1, num_keypoints=96, keypoints_per_token=8, max_cameras=1, named_maps=named_maps
    )


class Pointer(nn.Module):
    """A stem, and the words that it is asked with."""

    def __init__(self, named_maps: int, vocab_size: int) -> None:
        super().__init__()
        self.stem = KeypointStem(vision(named_maps), WIDTH)
        self.stem.reset_parameters()
        self.words = nn.Embedding(vocab_size, WIDTH)

    def forward(self, pixels: Tensor, asked: dict[str, Tensor]) -> Tensor:
        """The distance of each of Q points from the truth, in pixels, a mean of both axes."""
        words = self.words(asked["tokens"]) * asked["token_mask"][..., None]
        query = words.sum(1) / asked["token_mask"].sum(1, keepdim=True)
        image = asked["image"]
        seen = self.stem.look(pixels.float() / 127.5 - 1, torch.zeros(len(pixels), dtype=torch.long))
        camera = torch.zeros(len(image), dtype=torch.long)
        pointed, _ = self.stem.point(query, {name: found[image] for name, found in seen.items()}, camera)
        return SIZE * (pointed - asked["centre"]).abs().mean(-1)


def frames(path: str, split: Split, number: int) -> list[Frame]:
    """Evenly spaced ones that show what their instruction is about."""
    config, model = LeRobotConfig(path, image_cache=True), replace(ModelConfig.preset("tiny"), vision=vision(0))
    source = config.open("robot", split, model.shapes)
    if any(look.size != (SIZE, SIZE) for look in source.looks().values()):
        raise SystemExit(f"{path} has images of other than {SIZE} pixels: collect it with --image_size {SIZE}")
    source.prepare()
    places = source.indices(Modality.QA)
    found = (source[int(places[i])] for i in evenly_spaced(len(places), number))
    return [frame for frame in found if any(point.told for point in Points().make(frame))]


def batches(some: Sequence[Frame], tokenizer: TextTokenizer) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Images u8[B 3 H W] and what is asked about each: the thing that its instruction is about."""
    maker = Points()
    for start in range(0, len(some), BATCH):
        batch = some[start : start + BATCH]
        (camera,) = batch[0].images
        pixels = torch.stack([torch.from_numpy(frame.images[camera]) for frame in batch])
        numbers = [{camera: number} for number in range(len(batch))]
        yield pixels, maker.collate([maker.make(frame) for frame in batch], numbers, tokenizer.encode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a LeRobot dataset of MT50 with places in every frame")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--named_maps", type=int, nargs="+", default=[0, 4])
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # as in training: without it each step takes longer than the one before
    tokenizer = TextTokenizer.load(SHIPPED)
    shown, held_out = frames(args.dataset, "train", TRAINED_ON), frames(args.dataset, "val", MEASURED_ON)
    for named_maps in args.named_maps:
        torch.manual_seed(0)
        pointer = Pointer(named_maps, tokenizer.tokenizer.get_vocab_size())
        optimizer = torch.optim.AdamW(pointer.parameters(), lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
        dice = torch.Generator().manual_seed(0)
        drawn = [[shown[i] for i in torch.randperm(len(shown), generator=dice)[:BATCH]] for _ in range(args.steps)]
        for batch in tqdm(drawn, desc=f"named_maps {named_maps}"):
            ((pixels, asked),) = batches(batch, tokenizer)
            loss = pointer(pixels, asked).mean()
            optimizer.zero_grad()
            (100 / SIZE * loss).backward()
            nn.utils.clip_grad_norm_(pointer.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            off = torch.cat([pointer(pixels, asked) for pixels, asked in batches(held_out, tokenizer)])
        print(f"named_maps {named_maps}: {off.mean():.2f} px, median {off.median():.2f}")


if __name__ == "__main__":
    main()
