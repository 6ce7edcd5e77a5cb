"""Slices of tensors on disk, mapped or by torch.distributed.checkpoint: nothing that a file contains is executed."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pi05_lightning.files.local import first_line
from pi05_lightning.models.shards import own_part, slice_of
from pi05_lightning.weights.readable import gone

METADATA = ".metadata"
"""The file with names, shapes and places of a directory's tensors."""
Layout = Mapping[str, tuple[torch.Size, torch.dtype]]
_NAMED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath"},
}
"""Module: what of it the metadata of tensors are made of, beside dtypes."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _NAMED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """Names, shapes and places of the tensors in a directory that DCP wrote.

    ValueError where they are damaged or describe anything but tensors, and where a file is missing or too short.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        described = metadata.state_dict_metadata.values()
        if not all(isinstance(tensor, TensorStorageMetadata) for tensor in described):
            raise pickle.UnpicklingError("it holds more than tensors")
        ends: dict[str, int] = {}
        for place in metadata.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        short = [name for name, end in sorted(ends.items()) if (folder / name).stat().st_size < end]
    except (OSError, EOFError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        if not folder.exists():
            raise ValueError(gone(folder)) from error
        raise ValueError(f"{folder} is damaged, and cannot be read ({error}): use another checkpoint") from error
    if short:
        raise ValueError(f"{folder} is damaged: {', '.join(short)} is truncated. Use another checkpoint")
    return metadata


def read_layout(folder: Path) -> Layout:
    """The shape and dtype of every tensor in a directory that DCP wrote. ValueError as `read_metadata`."""
    described = read_metadata(folder).state_dict_metadata
    return {
        name: (tensor.size, tensor.properties.dtype)
        for name, tensor in described.items()
        if isinstance(tensor, TensorStorageMetadata)  # as all of them are
    }


class ShardReader(FileSystemReader):
    """Of a directory that DCP wrote; upstream's executes whatever the metadata's pickle says."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))

    def rows(self, key: str) -> list[range]:
        """Those of a tensor that are in each of its shards, in order."""
        described = self.read_metadata().state_dict_metadata[key]
        assert isinstance(described, TensorStorageMetadata)
        shards = sorted((chunk.offsets[0], chunk.sizes[0]) for chunk in described.chunks)
        return [range(first, first + number) for first, number in shards]

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Read tensors into those of the same names, which may have another dtype; of a DTensor this rank's slice.

        Each rank reads by itself.  ValueError for one that is damaged or gone.
        """
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable")
                dcp.load(dict(targets), storage_reader=self, no_dist=True)
        except dcp.CheckpointException as error:
            if not Path(self.path).exists():
                raise ValueError(gone(Path(self.path))) from error
            raise ValueError(first_failure(error)) from error


class MappedReader:
    """Of tensors that are mapped from files: of each, the slices that are wanted are read, and no more."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def rows(self, key: str) -> list[range]:
        """As `ShardReader.rows`."""
        return [range(self.tensors[key].shape[0])]

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """As `ShardReader.fill`, of tensors that have the targets' shapes."""
        for key, target in targets.items():
            own = own_part(target.detach())
            if own.numel():  # torchao's tensors cannot be empty
                own.copy_(slice_of(self.tensors[key], target))


def first_failure(error: dcp.CheckpointException) -> str:
    """What went wrong on the first of the ranks on which anything did."""
    return first_line(error.failures[min(error.failures)][0])
