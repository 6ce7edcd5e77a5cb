"""Where a policy computes, and in which numbers: what can be asked of this machine."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from pi05_lightning.files.local import first_line

Dtype = Literal["float32", "bfloat16", "int8"]


def check_device(device: str | torch.device) -> None:
    """Raises ValueError for a device that this machine does not have, or that lacks float64, as Apple's does."""
    try:
        torch.empty(0, device=device, dtype=torch.float64)  # what flow time is computed in
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {first_line(error)}") from error


def check_dtype(dtype: torch.dtype | str | None, device: str | torch.device) -> None:
    """Raises ValueError for a dtype that no policy computes in, or not on this device."""
    if dtype == "int4":
        raise ValueError("dtype int4: PyTorch computes in 8 bits at least; for 4 use `pi05 export --dtype int4`")
    if isinstance(dtype, str) and dtype not in get_args(Dtype):
        raise ValueError(f"dtype is {dtype!r}: expected {', '.join(get_args(Dtype))}, or a torch.dtype")
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}: weights are cast to floats alone; to compute in 8 bits give 'int8'")
    if dtype == "int8" and torch.device(device).type != "cpu":
        raise ValueError(f"dtype int8 computes on a CPU alone, and device is {device}: leave out one of the two")
