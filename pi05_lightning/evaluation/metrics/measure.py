"""What is measured on a batch of each modality: values with their weights, and what to show of single samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pi05_lightning.acting.inference import generate_fast, generate_texts
from pi05_lightning.data.places import to_picture
from pi05_lightning.data.processor import Processor
from pi05_lightning.evaluation.examples import Example
from pi05_lightning.evaluation.metrics.chunk import chunk_errors
from pi05_lightning.evaluation.metrics.text import box_iou
from pi05_lightning.models.flow_noise import draw_noise, flow_time_quantile
from pi05_lightning.models.heads.base import Head, Term, Terms
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Letterbox, Modality, Prefix, Subset, Target, text_to_boxes

NOISE_SEED = 0  # not the run's: runs of any seed are measured with the same noise
FLOW_TIMES = tuple(flow_time_quantile((k + 0.5) / 8) for k in range(8))
"""Flow times of the flow loss: middles of eight equally likely parts of what training draws. The loss that is trained
also counts the dims that the robot has not, which are soon learned."""
SHOWN_DRAWS = 8
EXTRA_TOKENS = 4  # that a generated text may be longer than the true one


@dataclass
class Measured:
    """A batch, measured.

    values: per metric.  error: f32[B], by which the worst samples are found.  examples: rows of the batch as something
    to look at.  questions: what each row of answers was asked; none of other modalities.
    """

    values: Terms
    error: Tensor
    examples: Callable[[Sequence[int]], list[Example]]
    questions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluator:
    """Measures batches of one modality each; deterministic, and draws nothing from any global generator."""

    model: Pi05
    processor: Processor
    num_steps: int = 10
    """Euler steps of a sampled chunk."""
    accuracy_threshold: float = 0.1
    """Largest error of an action value that counts as right, as a share of the normalised range [-1, 1]."""

    @torch.no_grad()
    def measure(self, batch: Batch, subset: Subset) -> Measured:
        """Measure a batch of a subset, on the model's device."""
        match subset.modality:
            case Modality.CONTINUOUS:
                return self._chunks(batch, subset)
            case Modality.FAST:
                return self._fast(batch, subset)
            case _:
                return self._text(batch, subset)

    def _measures(self, head: Head, subset: Subset) -> bool:
        """Whether a head has a metric of this modality."""
        return any(subset.modality in modalities for modalities in head.metrics.values())

    def _of_heads(self, batch: Batch, subset: Subset, prefix: Prefix) -> Terms:
        """What the heads themselves measure."""
        found: Terms = {}
        for head in self.model.heads.values():
            if self._measures(head, subset) and head.has_targets(batch):
                found |= head.measure(batch, prefix, self.model.backbone)
        return found

    # --- text: captions, answers, boxes, subtasks

    def _text(self, batch: Batch, subset: Subset) -> Measured:
        kind = Target.SUBTASK if subset.modality is Modality.HL_SUBTASK else Target.TEXT
        whole = self.model.backbone(batch)
        values = self._of_heads(batch, subset, whole)
        nll = self._mean_nll(batch, whole, kind)
        tokenizer, model = self.processor.tokenizer, self.model
        longest = int((batch.target_kind == kind).sum(1).max())
        predicted = generate_texts(
            model,
            self.processor,
            without_targets(batch),
            max_tokens=longest + EXTRA_TOKENS,
            is_subtask=kind == Target.SUBTASK,
        )
        truth = [
            tokenizer.decode(row[k == kind].tolist()) for row, k in zip(batch.tokens, batch.target_kind, strict=True)
        ]
        exact = torch.tensor([a == b for a, b in zip(predicted, truth, strict=True)], device=nll.device)
        places = torch.tensor(["<loc" in text for text in truth], device=nll.device)  # near is right, exact is chance
        values["exact_match"] = Term(exact, ~places)
        boxes = [(text_to_boxes(a), text_to_boxes(b)) for a, b in zip(predicted, truth, strict=True)]
        ious = torch.tensor([box_iou(*pair) if pair[1] else 0.0 for pair in boxes], device=nll.device)
        values["box_iou"] = Term(ious, torch.tensor([bool(true) for _, true in boxes], device=nll.device))
        # wrong before right, boxes by how wrong they are, then by how unlikely the model found the truth
        error = nll + 1e3 * (1 - torch.where(values["box_iou"].mask, ious, exact.float()))

        def examples(rows: Sequence[int]) -> list[Example]:
            return [
                replace(
                    self._example(batch, row, subset, error),
                    predicted=to_picture(predicted[row], letterboxes_of(batch, row)),
                    truth=to_picture(truth[row], letterboxes_of(batch, row)),
                )
                for row in rows
            ]

        asked = range(len(batch)) if subset.modality is Modality.QA else ()
        return Measured(values, error, examples, [self._prompt(batch, row, subset) for row in asked])

    def _mean_nll(self, batch: Batch, prefix: Prefix, kind: Target) -> Tensor:
        """Mean cross-entropy of each row's tokens of a kind, f32[B]."""
        scores = self.model.subtask_head.score(batch, prefix, self.model.backbone, kind)
        row = batch.target_index[kind] // batch.tokens.shape[1]
        zeros = scores.nll.new_zeros(len(batch))
        count = zeros.index_add(0, row, torch.ones_like(scores.nll))
        return zeros.index_add(0, row, scores.nll) / count.clamp(min=1)

    # --- actions as FAST tokens

    def _fast(self, batch: Batch, subset: Subset) -> Measured:
        values = self._of_heads(batch, subset, self.model.backbone(batch))
        chunk, decoded = self.decode_fast(batch, subset.source)
        values["decode_success"] = Term(decoded, torch.ones_like(decoded))
        mask = batch.fast_action_mask
        values["chunk"] = self._chunk_errors(chunk, batch.fast_actions, mask, subset.source)
        error = row_mean((chunk - batch.fast_actions).abs(), mask)

        def examples(rows: Sequence[int]) -> list[Example]:
            return [
                self._chunk_example(batch, row, subset, error, batch.fast_actions, mask, chunk[row][None])
                for row in rows
            ]

        return Measured(values, error, examples)

    def decode_fast(self, batch: Batch, source: str) -> tuple[Tensor, Tensor]:
        """Chunks f32[B T D] that a policy would run, and whether the tokens decode by themselves, bool[B].

        First the model writes freely. Rows that are no chunk then are written again as the policy does it, held to
        tokens that fit; where the free ones fit, both are the same.
        """
        model, processor, fast = self.model, self.processor, self.processor.fast
        assert fast is not None
        horizon, dims = processor.shapes.horizon, self._dims(source)
        device = batch.tokens.device
        prefix = model.backbone(without_targets(batch))

        def write(constrain: bool) -> tuple[np.ndarray, np.ndarray]:
            return fast.decode_batch(generate_fast(model, processor, prefix, dims, constrain=constrain), horizon, dims)

        chunk, decoded = write(constrain=False)
        if not decoded.all():
            chunk = np.where(decoded[:, None, None], chunk, write(constrain=True)[0])
        padded = np.zeros((len(batch), horizon, processor.shapes.action_dim), dtype=np.float32)
        padded[..., :dims] = chunk
        return torch.from_numpy(padded).to(device), torch.from_numpy(decoded).to(device)

    # --- actions by flow matching

    def _chunks(self, batch: Batch, subset: Subset) -> Measured:
        mask = batch.action_mask
        measuring = [head for head in self.model.heads.values() if self._measures(head, subset)]
        prefix = self.model.backbone(batch, need_hidden=any(head.reads_hidden for head in measuring))
        noise = self._noise(batch, len(FLOW_TIMES))
        times = torch.tensor(FLOW_TIMES, device=noise.device).expand(len(noise), -1)
        flow_head = self.model.flow_head
        flow = flow_head.squared_error(prefix, batch.actions, noise, times, mask.any(-1)).permute(0, 2, 3, 1)
        steps = self._steps(subset.source)
        chunk = self._sampled(prefix, noise[:, :1], steps)[:, 0]
        values = self._of_heads(batch, subset, prefix) | {
            "flow_loss": Term(flow, mask[..., None].expand_as(flow)),
            "chunk": self._chunk_errors(chunk, batch.actions, mask, subset.source),
        }
        error = row_mean((chunk - batch.actions).abs(), mask)

        def examples(rows: Sequence[int]) -> list[Example]:
            chosen = torch.tensor(rows, dtype=torch.long, device=noise.device)
            draws = self._sampled(prefix.rows(chosen), noise[chosen, :SHOWN_DRAWS], steps)
            return [
                self._chunk_example(batch, row, subset, error, batch.actions, mask, draws[i])
                for i, row in enumerate(rows)
            ]

        return Measured(values, error, examples)

    def _sampled(self, prefix: Prefix, noise: Tensor, steps: int) -> Tensor:
        """Chunks f32[R K T D] from noise f32[R K T D], as a policy computes them; 0 behind its steps."""
        chunks = self.model.flow_head.sample(prefix, noise[:, :, :steps], self.num_steps)
        return F.pad(chunks, (0, 0, 0, noise.shape[2] - steps))

    def _noise(self, batch: Batch, draws: int) -> Tensor:
        """Noise f32[R K T D] that depends on each sample's key alone."""
        rows, horizon, dims = batch.actions.shape
        noise, _ = draw_noise(batch.key[:rows].cpu(), NOISE_SEED, draws, horizon, dims)
        return noise.to(batch.actions.device)

    # --- what both kinds of actions share

    def _dims(self, source: str) -> int:
        return self.processor.robots[source].action_dim

    def _steps(self, source: str) -> int:
        return self.processor.robots[source].horizon or self.processor.shapes.horizon

    def _chunk_errors(self, chunk: Tensor, truth: Tensor, mask: Tensor, source: str) -> Term:
        quantiles = self.processor.robots[source].normalize.action
        return Term(*chunk_errors(chunk, truth, mask, quantiles, self.accuracy_threshold))

    def _real(self, chunk: Tensor, source: str) -> np.ndarray:
        """Actions of a source in its own units and dimensions."""
        quantiles = self.processor.robots[source].normalize.action
        return quantiles.unnormalize(chunk[..., : self._dims(source)].cpu().numpy())

    def _chunk_example(
        self, batch: Batch, row: int, subset: Subset, error: Tensor, truth: Tensor, mask: Tensor, draws: Tensor
    ) -> Example:
        steps = int(mask[row].any(-1).sum())  # the others are after the episode's end
        return replace(
            self._example(batch, row, subset, error),
            actions=self._real(truth[row, :steps], subset.source),
            draws=self._real(draws[:, :steps], subset.source),
        )

    def _example(self, batch: Batch, row: int, subset: Subset, error: Tensor) -> Example:
        """What the model was given in a row: the cameras' pictures, and its prompt."""
        assert batch.letterboxes is not None
        images = {}
        for place in images_of(batch, row):
            inner = batch.letterboxes[place]
            picture = batch.pixels[place][:, inner.rows, inner.columns].permute(1, 2, 0)
            images[self.processor.cameras[int(batch.camera[place])]] = picture.cpu().numpy()
        shown = to_picture(self._prompt(batch, row, subset), letterboxes_of(batch, row))
        return Example(subset, int(batch.key[row]), float(error[row]), images, shown)

    def _prompt(self, batch: Batch, row: int, subset: Subset) -> str:
        """What the model is told in a row; a subtask that actions are conditioned on too."""
        given = (
            batch.token_mask[row] & (batch.target_kind[row] != Target.FAST) & (batch.target_kind[row] != Target.TEXT)
        )
        if subset.modality is Modality.HL_SUBTASK:
            given = given & (batch.target_kind[row] == Target.NONE)
        return self.processor.tokenizer.decode(batch.tokens[row][given].tolist()).strip()


def images_of(batch: Batch, row: int) -> list[int]:
    """A row's images, by their number in the batch."""
    slots = batch.image_mask.shape[1]
    return [number for number, index in enumerate(batch.image_index.tolist()) if index // slots == row]


def letterboxes_of(batch: Batch, row: int) -> list[Letterbox]:
    """Where the pictures are in a row's images."""
    assert batch.letterboxes is not None
    return [batch.letterboxes[number] for number in images_of(batch, row)]


def without_targets(batch: Batch) -> Batch:
    """The batch with what has to be predicted masked out: what the model sees before it speaks.

    A subtask that actions are conditioned on stays.
    """
    last = batch.target_kind.amax(1, keepdim=True)  # FAST follows a subtask
    return replace(
        batch, token_mask=batch.token_mask & ((batch.target_kind != last) | (batch.target_kind == Target.NONE))
    )


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over all but the first axis, where mask."""
    axes = tuple(range(1, values.ndim))
    return torch.where(mask, values, 0).sum(axes) / mask.sum(axes).clamp(min=1)
