"""Norms of the gradients by part of the model, before clipping."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

PARTS = {
    "vision": r"^backbone\.vision\.",
    "language": r"^backbone\.(?!vision\.)",
    "flow": r"^flow_head\.",
    "auxiliary": r"^auxiliary\.",
}
"""What gradient norms are told apart by; the subtask and FAST heads have no parameters of their own."""


def gradient_norms(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """L2 norm of the gradient of each part that has one, and of all, as scalars on the device."""
    gradients = {name: parameter.grad for name, parameter in named_parameters if parameter.grad is not None}
    parts = {part: [g for name, g in gradients.items() if re.search(pattern, name)] for part, pattern in PARTS.items()}
    parts["total"] = list(gradients.values())
    norms = {part: nn.utils.get_total_norm(own) for part, own in parts.items() if own}
    return {part: norm.full_tensor() if isinstance(norm, DTensor) else norm for part, norm in norms.items()}
