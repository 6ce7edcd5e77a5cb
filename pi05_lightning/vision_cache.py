"""Outputs of a frozen vision tower, computed once per image and kept on disk."""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from pi05_lightning.models.gemma import compute_dtype
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.models.siglip import Siglip
from pi05_lightning.types import Batch

_KEY_BYTES = 16


def cache_features(model: Pi05, folder: Path) -> None:
    """Look SigLIP's features up in a folder, by the image's bytes, and compute those that are not there yet.

    Only while the tower has nothing to learn; its projector is no part of it, and may learn. Weights and dtype have a
    folder of their own each. An image takes N x width values: 0.6 MB at full size in bf16.

    Raises ValueError for a model without SigLIP.
    """
    tower, encode = model.backbone.vision, model.backbone.encode_images
    if not isinstance(tower, Siglip):
        raise ValueError("vision_cache keeps SigLIP's features: leave it out, as this model has a keypoint stem")
    learned = [parameter for name, parameter in tower.named_parameters() if is_tower(f"backbone.vision.{name}")]
    store: FeatureStore | None = None

    @torch.compiler.disable
    def encode_images(batch: Batch) -> tuple[Tensor, Tensor | None]:
        nonlocal store
        if any(parameter.requires_grad for parameter in learned):
            store = None  # what it holds is of other weights than those that come out of this
        elif batch.pixels.dtype == torch.uint8:
            dtype = compute_dtype(learned[0])
            if store is None or store.dtype != dtype:
                store = FeatureStore(folder / fingerprint(learned, dtype), (tower.num_tokens, tower.width), dtype)
            return tower.projector(_features(tower, store, batch)), None
        return encode(batch)

    model.backbone.encode_images = encode_images  # type: ignore[method-assign]


def is_tower(name: str) -> bool:
    """Whether a parameter's name is one of the vision tower's, which is all of it but the projector."""
    return name.startswith("backbone.vision.") and not name.startswith("backbone.vision.projector.")


def fingerprint(weights: list[torch.nn.Parameter], dtype: torch.dtype) -> str:
    """Of the weights' values and the dtype that is computed in."""
    digest = hashlib.blake2b(str(dtype).encode(), digest_size=8)
    for weight in weights:
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def _features(tower: Siglip, store: FeatureStore, batch: Batch) -> Tensor:
    keys = [hashlib.blake2b(image, digest_size=_KEY_BYTES).digest() for image in batch.pixels.cpu().numpy()]
    new = {key: place for place, key in enumerate(keys) if key not in store}
    computed: dict[bytes, Tensor] = {}
    if new:
        images = batch.pixels[list(new.values())].to(tower.patch_embedding.weight.dtype) / 127.5 - 1
        computed = dict(zip(new, tower.features(images).to(store.dtype).cpu(), strict=True))
        store.add(computed)
    found = [computed[key] if key in computed else store[key] for key in keys]
    return torch.stack(found).to(batch.pixels.device, non_blocking=True)


class FeatureStore:
    """Tensors of one shape by key, in a folder: a file per process that added some, of records key + tensor.

    Several processes can use a folder at once: each finds what was there when it began, and what itself adds. What a
    killed process wrote of its last record is not read.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self._record = np.dtype([("key", f"V{_KEY_BYTES}"), ("tensor", f"V{dtype.itemsize * shape[0] * shape[1]}")])
        self._place: dict[bytes, tuple[BinaryIO, int]] = {}
        """File of a tensor, and the offset of its record."""
        self._out: BinaryIO | None = None
        self._full = False
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.features"):
            records = path.stat().st_size // self._record.itemsize
            if records:
                keys = np.memmap(path, self._record, "r", shape=records)["key"]
                self._note([key.tobytes() for key in keys], path.open("rb", buffering=0), 0)

    def __contains__(self, key: bytes) -> bool:
        return key in self._place

    def __getitem__(self, key: bytes) -> Tensor:
        """The tensor; OSError where its file is not what it was."""
        file, offset = self._place[key]
        read = os.pread(file.fileno(), self._record.itemsize, offset)
        if read[:_KEY_BYTES] != key or len(read) < self._record.itemsize:
            raise OSError(f"{file.name} was changed while it was in use: remove {self.folder}, and begin anew")
        return torch.frombuffer(bytearray(read), dtype=self.dtype, offset=_KEY_BYTES).view(self.shape)

    def add(self, tensors: Mapping[bytes, Tensor]) -> None:
        """Write tensors; where the disk has no room for them, it says so once and nothing is added any more."""
        if self._full:
            return
        if self._out is None:
            self._out = (self.folder / f"{uuid.uuid4().hex}.features").open("xb+", buffering=0)
        start = self._out.seek(0, os.SEEK_END)
        records = b"".join(key + x.contiguous().view(torch.uint8).numpy().tobytes() for key, x in tensors.items())
        try:
            if self._out.write(records) < len(records):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._full = True
            self._out.truncate(start)
            warnings.warn(f"vision_cache keeps no more features in {self.folder}: {error.strerror}", stacklevel=2)
            return
        self._note(list(tensors), self._out, start)

    def _note(self, keys: Sequence[bytes], file: BinaryIO, start: int) -> None:
        self._place |= {key: (file, start + place * self._record.itemsize) for place, key in enumerate(keys)}
