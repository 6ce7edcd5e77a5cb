"""How good the model is, per modality: sums and counts in torchmetrics, so that ranks and batch sizes do not matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from pi05_lightning.data.processor import Processor
from pi05_lightning.data.tokenizer import text_to_boxes
from pi05_lightning.models.keypoints import KeypointStem
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Box, Loss, Modality

Measured = dict[str, tuple[Tensor, Tensor]]
"""metric -> values and weights, of one shape."""

ACCURACY_THRESHOLD = 0.1 * 2  # a tenth of the normalised range [-1, 1]


class ModalityMetrics:
    """Metrics of one `source/modality`: `update` per batch, `compute` once."""

    def __init__(self, name: str) -> None:
        self.source, _, modality = name.rpartition("/")
        self.measure: Callable[[Pi05, Processor, Batch, str, int], Measured] = MEASURES[Modality(modality)]
        self.means: dict[str, MeanMetric] = {}

    @torch.no_grad()
    def update(self, model: Pi05, processor: Processor, batch: Batch, num_steps: int) -> None:
        for name, (values, weights) in self.measure(model, processor, batch, self.source, num_steps).items():
            if name not in self.means:
                self.means[name] = MeanMetric().to(values.device)
            self.means[name].update(values.float(), weights.float())

    def compute(self) -> dict[str, Tensor]:
        """Metric -> mean over all samples (tokens, action elements); `perplexity` from `cross_entropy`."""
        out = {name: mean.compute() for name, mean in self.means.items()}
        if "cross_entropy" in out:
            out["perplexity"] = out["cross_entropy"].exp()
        return out


def without_targets(batch: Batch, kind: Loss) -> Batch:
    """The batch with the targets of a kind masked out: what the model sees before it speaks."""
    return replace(batch, token_mask=batch.token_mask & (batch.loss_kind != kind))


def measure_tokens(model: Pi05, batch: Batch) -> Measured:
    """Cross-entropy and accuracy of the given next tokens (teacher forcing); the keypoints' pointing error if any."""
    points = isinstance(model.backbone.vision, KeypointStem)
    out = model(batch, actions=False, points=points)
    assert out.tokens is not None
    ones = torch.ones_like(out.tokens.nll)
    measured = {"cross_entropy": (out.tokens.nll, ones), "token_accuracy": (out.tokens.correct, ones)}
    if out.distance is not None:
        measured["pointing_error"] = (out.distance, torch.ones_like(out.distance))
    return measured


def measure_text(model: Pi05, processor: Processor, batch: Batch, source: str, num_steps: int) -> Measured:
    """`measure_tokens`, exact match of the generated text, and IoU where the truth is boxes."""
    kind = Loss.SUBTASK if (batch.loss_kind == Loss.SUBTASK).any() else Loss.TEXT
    measured = measure_tokens(model, batch)
    truth = [
        processor.tokenizer.decode(row[kinds == kind].tolist())
        for row, kinds in zip(batch.tokens, batch.loss_kind, strict=True)
    ]
    longest = int((batch.loss_kind == kind).sum(1).max())
    prefix = model.backbone(without_targets(batch, kind))
    tokens, valid, _ = model.subtask_head.generate(
        model.backbone, prefix, max_tokens=longest + 4, is_subtask=kind == Loss.SUBTASK
    )
    said = [processor.tokenizer.decode(row[mask].tolist()) for row, mask in zip(tokens, valid, strict=True)]
    exact = torch.tensor([a == b for a, b in zip(said, truth, strict=True)], device=tokens.device)
    measured["exact_match"] = (exact, torch.ones_like(exact))
    ious = [box_iou(text_to_boxes(a), text_to_boxes(b)) for a, b in zip(said, truth, strict=True) if text_to_boxes(b)]
    if ious:
        measured["box_iou"] = (torch.tensor(ious), torch.ones(len(ious)))
    return measured


def box_iou(said: Sequence[Box], truth: Sequence[Box]) -> float:
    """Mean over the true boxes of the IoU with the box said in the same place; 0 for one that was not said."""
    total = 0.0
    for a, b in zip(said, truth, strict=False):
        top, left, bottom, right = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
        inter = max(0.0, bottom - top) * max(0.0, right - left)
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
        total += inter / union if union > 0 else float(a == b)
    return total / len(truth)


def measure_fast(model: Pi05, processor: Processor, batch: Batch, source: str, num_steps: int) -> Measured:
    """`measure_tokens`, and what the tokens most likely at each place decode to."""
    return measure_tokens(model, batch)


def measure_actions(model: Pi05, processor: Processor, batch: Batch, source: str, num_steps: int) -> Measured:
    """Errors of a sampled chunk, normalised and in real units, and the flow loss at the batch's own noise and times."""
    assert batch.noise is not None
    assert batch.time is not None
    prefix = model.backbone(batch, need_hidden=False)
    flow = model.flow_head.loss(prefix, batch.actions, batch.noise, batch.time)
    chunk = model.flow_head.sample(prefix, batch.noise[:, :1], num_steps)[:, 0]
    mask = batch.action_mask
    error = chunk - batch.actions
    real_error = _real_error(processor, chunk, batch, source)
    return {
        "flow_loss": (flow.mean(1), mask),
        "action_mse": (error.square(), mask),
        "action_mae": (error.abs(), mask),
        "action_accuracy": (error.abs() < ACCURACY_THRESHOLD, mask),
        "action_mae_real": (real_error.abs(), mask[..., : real_error.shape[-1]]),
    }


def _real_error(processor: Processor, chunk: Tensor, batch: Batch, source: str) -> Tensor:
    quantiles = processor.robots[source].normalize.action
    dims = len(quantiles.q01)
    said, truth = (quantiles.unnormalize(x[..., :dims].cpu().numpy()) for x in (chunk, batch.actions))
    return torch.from_numpy(np.asarray(said - truth)).to(chunk.device)


MEASURES: dict[Modality, Callable[[Pi05, Processor, Batch, str, int], Measured]] = {
    Modality.WEB_CAPTION: measure_text,
    Modality.QA: measure_text,
    Modality.HL_SUBTASK: measure_text,
    Modality.FAST: measure_fast,
    Modality.CONTINUOUS: measure_actions,
}
