"""Slices of tensors on disk, by torch.distributed.checkpoint: read without executing what a file may contain."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, Metadata, StorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.futures import Future

from pi05_lightning.files.local import first_line

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


class MappedReader(StorageReader):
    """Of tensors that are mapped from files: of each, the slices that are wanted are read, and no more."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def rows(self, key: str) -> list[range]:
        """As `ShardReader.rows`."""
        return [range(self.tensors[key].shape[0])]

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(tensor.dtype),
                    tensor.shape,
                    [ChunkStorageMetadata(torch.Size([0] * tensor.ndim), tensor.shape)],
                )
                for name, tensor in self.tensors.items()
            }
        )

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            found = self.tensors[item.storage_index.fqn]
            for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                found = found.narrow(dim, offset, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(found)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def fill_slices(targets: Mapping[str, Tensor], reader: StorageReader) -> None:
    """Read tensors into those of the same names, which may have another dtype; of a DTensor, this rank's slice alone.

    Each rank reads by itself.  ValueError for one that is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable")
            dcp.load(dict(targets), storage_reader=reader, no_dist=True)
    except dcp.CheckpointException as error:
        raise ValueError(first_failure(error)) from error


def first_failure(error: dcp.CheckpointException) -> str:
    """What went wrong on the first of the ranks on which anything did."""
    return first_line(error.failures[min(error.failures)][0])
