"""The FAST head: actions as discrete tokens (FAST, arXiv 2501.09747), written into unused rows of the vocabulary."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pi05_lightning.models.backbone import Backbone
from pi05_lightning.models.heads.base import Term, Terms
from pi05_lightning.models.heads.token import TOKEN_METRICS, Allowed, Generators, TokenHead, generate
from pi05_lightning.types import Batch, Modality, Prefix, Shapes, Target


class FastHead(TokenHead):
    """Reads the backbone's tied embedding; owns the token ids from `Shapes.fast_top` down."""

    kinds: ClassVar = {"fast": Target.FAST}
    terms: ClassVar = {"fast": frozenset({Modality.FAST})}
    metrics: ClassVar = dict.fromkeys(TOKEN_METRICS, frozenset({Modality.FAST}))

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.top, self.vocab_size = shapes.fast_top, shapes.vocab_size
        self.ids = range(self.top - shapes.fast_vocab_size + 1, self.top + 1)
        if self.ids.start < 1:  # 0 is padding
            raise ValueError(f"vocab_size {self.vocab_size} has no room for {shapes.fast_vocab_size} FAST tokens")

    def measure(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> Terms:
        """Of FAST tokens alone: the words that open and close them are known."""
        scores = self.score(batch, prefix, backbone, Target.FAST)
        targets = batch.tokens.flatten()[batch.target_index[Target.FAST]]
        own = (targets >= self.ids.start) & (targets < self.ids.stop)
        return {name: Term(values, own) for name, values in zip(TOKEN_METRICS, scores, strict=True)}

    def generate(
        self,
        backbone: Backbone,
        prefix: Prefix,
        lengths: Tensor,
        num_coefficients: int,
        forced: Tensor,
        *,
        closing_id: int | None = None,
        temperature: float = 0.0,
        generator: Generators | None = None,
    ) -> tuple[Tensor, Tensor]:
        """FAST tokens i64[B n] (valid bool[B n]) that expand to exactly `num_coefficients`, so that they always decode.

        lengths: i64[V_fast] coefficients per FAST token, see `FastTokenizer.lengths`.
        forced: i64[F] ids in the language vocabulary that open the segment ("Action: "); they are not returned.
        closing_id: makes generation free instead: any id, up to this one ("|"). What comes out need not decode, and
        ids that are no FAST tokens are below 0 or past the vocabulary.
        ValueError if no sequence of tokens expands to `num_coefficients`.
        """
        opening = len(forced)
        free = closing_id is not None
        # constrained, a row's length ends it, and padding stands for the end: never one of ours
        stop_id = 0 if closing_id is None else closing_id
        tokens, valid, _ = generate(
            backbone,
            prefix,
            max_tokens=opening + num_coefficients + 1,
            stop_id=stop_id,
            flow_visible=False,
            forced=forced,
            allowed=None if free else self._fitting(lengths, num_coefficients, opening, stop_id),
            temperature=temperature,
            generator=generator,
        )
        tokens, valid = tokens[:, opening:], valid[:, opening:]
        valid = valid & (tokens != stop_id)
        return torch.where(valid, self.top - tokens, 0), valid

    def _fitting(self, lengths: Tensor, num_coefficients: int, opening: int, stop_id: int) -> Allowed:
        """Only tokens after which the rest of the coefficients can still be filled exactly; then only the stop."""
        per_id = lengths.new_zeros(self.vocab_size)
        per_id[self.top - torch.arange(len(lengths), device=lengths.device)] = lengths
        fillable = _fillable(set(lengths.tolist()) - {0}, num_coefficients)
        if not fillable[-1]:
            raise ValueError(
                f"no sequence of this FAST tokenizer's tokens expands to {num_coefficients} coefficients: its"
                " vocabulary is damaged, or was fitted on chunks of another size"
            )
        can_fill = torch.tensor(fillable, device=lengths.device)

        def allowed(tokens: Tensor, step: int) -> Tensor:
            left = num_coefficients - per_id[tokens[:, opening:]].sum(1, keepdim=True)
            fits = (per_id > 0) & (per_id <= left) & can_fill[(left - per_id).clamp(min=0)]
            fits[:, stop_id] = left[:, 0] == 0
            return fits

        return allowed


def _fillable(lengths: set[int], total: int) -> list[bool]:
    """For 0..total, whether it is a sum of these lengths."""
    fillable = [True]
    for n in range(1, total + 1):
        fillable.append(any(fillable[n - length] for length in lengths if length <= n))
    return fillable
