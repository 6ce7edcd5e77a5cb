"""The FAST head: actions as discrete tokens (FAST, arXiv 2501.09747), written into unused rows of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pi05_lightning.models.backbone import Backbone
from pi05_lightning.models.heads.token import generate
from pi05_lightning.types import Loss, Prefix


class FastHead(nn.Module):
    """Reads the backbone's tied embedding; owns the token ids vocab − 1 − skip − token."""

    kinds = (Loss.FAST,)

    def __init__(self, vocab_size: int, fast_vocab_size: int, fast_skip_tokens: int) -> None:
        super().__init__()
        self.top = vocab_size - 1 - fast_skip_tokens
        self.ids = range(self.top - fast_vocab_size + 1, self.top + 1)
        self.vocab_size = vocab_size
        if self.ids.start < 0:
            raise ValueError(f"vocab_size {vocab_size} has no room for {fast_vocab_size} FAST tokens")

    def generate(
        self, backbone: Backbone, prefix: Prefix, lengths: Tensor, num_coefficients: int, forced: Tensor
    ) -> tuple[Tensor, Tensor]:
        """FAST tokens i64[B n] (valid bool[B n]) that expand to exactly `num_coefficients`, so that they always decode.

        lengths: i64[V_fast] coefficients per FAST token, see `FastTokenizer.lengths`.
        forced: i64[F] ids in the language vocabulary that open the segment ("Action: "); they are not returned.
        """
        stop_id = 0  # never one of ours: padding ends a row here, since its length decides, not a token
        per_id = lengths.new_zeros(self.vocab_size)
        per_id[self.top - torch.arange(len(lengths), device=lengths.device)] = lengths
        opening = len(forced)

        def allowed(tokens: Tensor, step: int) -> Tensor:
            left = num_coefficients - per_id[tokens[:, opening:]].sum(1, keepdim=True)
            fits = (per_id > 0) & (per_id <= left)
            fits[:, stop_id] = left[:, 0] == 0
            return fits

        tokens, valid, _ = generate(
            backbone,
            prefix,
            max_tokens=opening + num_coefficients + 1,
            stop_id=stop_id,
            flow_visible=False,
            forced=forced,
            allowed=allowed,
        )
        tokens, valid = tokens[:, opening:], valid[:, opening:]
        valid = valid & (tokens != stop_id)
        return torch.where(valid, self.top - tokens, 0), valid
