"""What the makers of accelerators publish of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Accelerator:
    """Published peak rates, dense (no sparsity): matrix products in FLOP/s, memory in bytes/s, capacity in bytes."""

    bf16: float
    fp32: float
    """Of plain fp32, as PyTorch computes by default: it leaves TF32 to those who ask for it."""
    bandwidth: float
    memory: float
    source: str

    def rate(self, dtype: torch.dtype) -> float:
        return self.bf16 if dtype == torch.bfloat16 else self.fp32


ACCELERATORS = {
    "rtx4090": Accelerator(165e12, 82.6e12, 1.008e12, 24e9, "NVIDIA Ada GPU Architecture whitepaper, appendix A"),
    "l40s": Accelerator(362e12, 91.6e12, 0.864e12, 48e9, "NVIDIA L40S datasheet"),
    "a100": Accelerator(312e12, 19.5e12, 2.039e12, 80e9, "NVIDIA A100 datasheet, 80 GB SXM"),
    "h100": Accelerator(989e12, 67e12, 3.35e12, 80e9, "NVIDIA H100 datasheet, SXM"),
    "h200": Accelerator(989e12, 67e12, 4.8e12, 141e9, "NVIDIA H200 datasheet, SXM"),
}
