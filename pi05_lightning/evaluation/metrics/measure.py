"""What is measured on a batch of each modality: values with their weights, and what to show of single samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pi05_lightning.data.processor import Processor
from pi05_lightning.data.tokenizer import text_to_boxes
from pi05_lightning.evaluation.examples import Example
from pi05_lightning.evaluation.metrics.chunk import chunk_errors
from pi05_lightning.evaluation.metrics.text import box_iou
from pi05_lightning.losses import draw_noise
from pi05_lightning.models.keypoints import KeypointStem
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Modality, Prefix, Target

NOISE_SEED = 0  # not the run's: runs of any seed are measured with the same noise
FLOW_TIMES = tuple(0.999 * ((k + 0.5) / 8) ** (2 / 3) + 0.001 for k in range(8))
"""Flow times of the flow loss: middles of eight equally likely parts of 0.999 · Beta(1.5, 1) + 0.001, so that its mean
estimates the loss that is trained."""
SHOWN_DRAWS = 8
EXTRA_TOKENS = 4  # that a generated text may be longer than the true one

Values = dict[str, tuple[Tensor, Tensor]]
"""metric -> values and weights, of one shape."""


@dataclass
class Measured:
    """A batch, measured.

    values: per metric.  badness: f32[B], higher is worse.  examples: rows of the batch as something to look at.
    """

    values: Values
    badness: Tensor
    examples: Callable[[Sequence[int]], list[Example]]


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
    def measure(self, batch: Batch, name: str) -> Measured:
        """Measure a batch of `source/modality`, on the model's device."""
        source, _, modality = name.rpartition("/")
        if modality == Modality.CONTINUOUS:
            return self._chunks(batch, name, source)
        if modality == Modality.FAST:
            return self._fast(batch, name, source)
        return self._text(batch, name)

    # --- text: captions, answers, boxes, subtasks

    def _text(self, batch: Batch, name: str) -> Measured:
        kind = Target.SUBTASK if name.endswith(Modality.HL_SUBTASK) else Target.TEXT
        values, nll = self._tokens(batch)
        tokenizer, model = self.processor.tokenizer, self.model
        longest = int((batch.target_kind == kind).sum(1).max())
        tokens, valid, _ = model.subtask_head.generate(
            model.backbone,
            model.backbone(without_targets(batch)),
            max_tokens=longest + EXTRA_TOKENS,
            is_subtask=kind == Target.SUBTASK,
        )
        said = [tokenizer.decode(row[mask].tolist()) for row, mask in zip(tokens, valid, strict=True)]
        truth = [
            tokenizer.decode(row[k == kind].tolist()) for row, k in zip(batch.tokens, batch.target_kind, strict=True)
        ]
        exact = torch.tensor([a == b for a, b in zip(said, truth, strict=True)], device=nll.device)
        values["exact_match"] = (exact, torch.ones_like(exact))
        boxes = [(text_to_boxes(a), text_to_boxes(b)) for a, b in zip(said, truth, strict=True)]
        ious = torch.tensor([box_iou(*pair) if pair[1] else 0.0 for pair in boxes])
        values["box_iou"] = (ious, torch.tensor([bool(true) for _, true in boxes]))
        # wrong before right, then by how unlikely the model found the truth
        badness = nll + 1e3 * (~exact)

        def examples(rows: Sequence[int]) -> list[Example]:
            return [
                replace(
                    self._example(batch, row, name, badness),
                    said=said[row],
                    truth=truth[row],
                    said_boxes=tuple(boxes[row][0]),
                    true_boxes=tuple(boxes[row][1]),
                )
                for row in rows
            ]

        return Measured(values, badness, examples)

    def _tokens(self, batch: Batch) -> tuple[Values, Tensor]:
        """Cross-entropy and accuracy of next tokens given the true ones before, and each row's mean cross-entropy."""
        out = self.model(batch, actions=False, points=isinstance(self.model.backbone.vision, KeypointStem))
        assert out.tokens is not None
        ones = torch.ones_like(out.tokens.nll)
        values = {"cross_entropy": (out.tokens.nll, ones), "token_accuracy": (out.tokens.correct, ones)}
        if out.distance is not None:
            values["pointing_error"] = (out.distance, torch.ones_like(out.distance))
        row = batch.target_index // batch.tokens.shape[1]
        zeros = out.tokens.nll.new_zeros(len(batch))
        nll = zeros.index_add(0, row, out.tokens.nll) / zeros.index_add(0, row, ones).clamp(min=1)
        return values, nll

    # --- actions as FAST tokens

    def _fast(self, batch: Batch, name: str, source: str) -> Measured:
        values, _ = self._tokens(batch)
        chunk, decoded = self.decode_fast(batch, source)
        values["decode_success"] = (decoded, torch.ones_like(decoded))
        mask = batch.fast_action_mask
        values["chunk"] = self._chunk_errors(chunk, batch.fast_actions, mask, source)
        badness = row_mean((chunk - batch.fast_actions).abs(), mask)

        def examples(rows: Sequence[int]) -> list[Example]:
            return [
                self._chunk_example(batch, row, name, badness, batch.fast_actions, mask, chunk[row][None])
                for row in rows
            ]

        return Measured(values, badness, examples)

    def decode_fast(self, batch: Batch, source: str) -> tuple[Tensor, Tensor]:
        """Chunks f32[B T D] that a policy would run, and whether the tokens decode by themselves, bool[B].

        First the model writes freely. Rows that are no chunk then are written again as the policy does it, held to
        tokens that fit; where the free ones fit, both are the same.
        """
        model, processor, fast = self.model, self.processor, self.processor.fast
        assert fast is not None
        prompts, tokenizer = processor.language.prompts, processor.tokenizer
        horizon, dims = processor.shapes.horizon, self._dims(source)
        device = batch.tokens.device
        lengths = torch.from_numpy(fast.lengths).to(device)
        forced = torch.tensor(tokenizer.encode(prompts.fast_opening), dtype=torch.long, device=device)
        closing = [*tokenizer.encode(prompts.fast_closing), tokenizer.eos_id][0]
        prefix = model.backbone(without_targets(batch))

        def write(closing_id: int | None) -> tuple[np.ndarray, np.ndarray]:
            tokens, valid = model.fast_head.generate(
                model.backbone, prefix, lengths, horizon * dims, forced, closing_id=closing_id
            )
            rows = [row[mask].tolist() for row, mask in zip(tokens, valid, strict=True)]
            return fast.decode_batch(rows, horizon, dims)

        chunk, decoded = write(closing)
        if not decoded.all():
            chunk = np.where(decoded[:, None, None], chunk, write(None)[0])
        padded = np.zeros((len(batch), horizon, processor.shapes.action_dim), dtype=np.float32)
        padded[..., :dims] = chunk
        return torch.from_numpy(padded).to(device), torch.from_numpy(decoded).to(device)

    # --- actions by flow matching

    def _chunks(self, batch: Batch, name: str, source: str) -> Measured:
        mask = batch.action_mask
        prefix = self.model.backbone(batch, need_hidden=False)
        noise = self._noise(batch, len(FLOW_TIMES))
        times = torch.tensor(FLOW_TIMES, device=noise.device).expand(len(noise), -1)
        flow = self.model.flow_head.loss(prefix, batch.actions, noise, times).permute(0, 2, 3, 1)
        chunk = self.model.flow_head.sample(prefix, noise[:, :1], self.num_steps)[:, 0]
        values = {
            "flow_loss": (flow, mask[..., None].expand_as(flow)),
            "chunk": self._chunk_errors(chunk, batch.actions, mask, source),
        }
        badness = row_mean((chunk - batch.actions).abs(), mask)

        def examples(rows: Sequence[int]) -> list[Example]:
            chosen = torch.tensor(rows, device=noise.device)
            seen = Prefix(
                None, [(k[chosen], v[chosen]) for k, v in prefix.kv], prefix.mask[chosen], prefix.flow_mask[chosen]
            )
            draws = self.model.flow_head.sample(seen, noise[chosen, :SHOWN_DRAWS], self.num_steps)
            return [
                self._chunk_example(batch, row, name, badness, batch.actions, mask, draws[i])
                for i, row in enumerate(rows)
            ]

        return Measured(values, badness, examples)

    def _noise(self, batch: Batch, draws: int) -> Tensor:
        """Noise f32[R K T D] that depends on each sample's key alone."""
        rows, horizon, dims = batch.actions.shape
        noise, _ = draw_noise(batch.key[:rows].cpu(), NOISE_SEED, draws, horizon, dims)
        return noise.to(batch.actions.device)

    # --- what both kinds of actions share

    def _dims(self, source: str) -> int:
        return len(self.processor.robots[source].normalize.action.q01)

    def _chunk_errors(self, chunk: Tensor, truth: Tensor, mask: Tensor, source: str) -> tuple[Tensor, Tensor]:
        quantiles = self.processor.robots[source].normalize.action
        return chunk_errors(chunk, truth, mask, quantiles, self.accuracy_threshold)

    def _real(self, chunk: Tensor, source: str) -> np.ndarray:
        """Actions of a source in its own units and dimensions."""
        quantiles = self.processor.robots[source].normalize.action
        return quantiles.unnormalize(chunk[..., : self._dims(source)].cpu().numpy())

    def _chunk_example(
        self, batch: Batch, row: int, name: str, badness: Tensor, truth: Tensor, mask: Tensor, draws: Tensor
    ) -> Example:
        source = name.rpartition("/")[0]
        steps = int(mask[row].any(-1).sum())  # the others are after the episode's end
        return replace(
            self._example(batch, row, name, badness),
            actions=self._real(truth[row, :steps], source),
            draws=self._real(draws[:, :steps], source),
        )

    def _example(self, batch: Batch, row: int, name: str, badness: Tensor) -> Example:
        """What the model was given in a row: its images and its prompt."""
        slots = batch.image_mask.shape[1]
        images = {
            self.processor.cameras[int(batch.camera[place])]: batch.pixels[place].permute(1, 2, 0).cpu().numpy()
            for place, index in enumerate(batch.image_index.tolist())
            if index // slots == row
        }
        given = (
            batch.token_mask[row] & (batch.target_kind[row] != Target.FAST) & (batch.target_kind[row] != Target.TEXT)
        )
        if name.endswith(Modality.HL_SUBTASK):
            given = given & (batch.target_kind[row] == Target.NONE)
        prompt = self.processor.tokenizer.decode(batch.tokens[row][given].tolist())
        return Example(name, int(batch.key[row]), float(badness[row]), images, prompt.strip())


def without_targets(batch: Batch) -> Batch:
    """The batch with what has to be said masked out: what the model sees before it speaks.

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
