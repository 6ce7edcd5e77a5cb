"""π0.5 as one `nn.Module`: the backbone and the three heads that read it. No Lightning, no data, no robot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pi05_lightning.models.backbone import Backbone
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.fast import FastHead
from pi05_lightning.models.heads.flow import FlowHead
from pi05_lightning.models.heads.subtask import SubtaskHead
from pi05_lightning.models.heads.token import TokenScores, score_tokens
from pi05_lightning.types import Batch


@dataclass
class Outputs:
    """What one forward pass gives the losses and the metrics.

    tokens: scores of the N target tokens, in the order of `Batch.target_index`; None if not asked for.
    flow f32[R K T D]: squared error of the velocity; None if not asked for.
    distance f32[Q]: mean of |y| and |x| between where the keypoints point and the truth, as a share of the image.
    """

    tokens: TokenScores | None = None
    flow: Tensor | None = None
    distance: Tensor | None = None


class Pi05(nn.Module):
    """Backbone, subtask head, FAST head, flow head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.fast_head = FastHead(config.vocab_size, config.fast_vocab_size, config.fast_skip_tokens)
        self.subtask_head = SubtaskHead(config.vocab_size, self.fast_head.ids)
        self.flow_head = FlowHead(config)

    def forward(
        self, batch: Batch, *, tokens: bool = True, actions: bool = True, points: bool = False, insulate: bool = False
    ) -> Outputs:
        """Token losses, flow loss and pointing error of a batch, from one backbone pass.

        tokens, actions, points: which of them to compute.  insulate: the flow loss gives the backbone no gradient
        (knowledge insulation, arXiv 2505.23705).  With `actions`, the batch needs its noise and time.
        """
        tokens = tokens and len(batch.target_index) > 0
        actions = actions and len(batch.actions) > 0
        prefix = self.backbone(batch, need_hidden=tokens)
        out = Outputs()
        if tokens:
            assert prefix.hidden is not None
            text = prefix.hidden.flatten(0, 1)
            targets = batch.tokens.flatten()[batch.target_index]
            # position l - 1 predicts token l
            out.tokens = score_tokens(text[batch.target_index - 1], self.backbone.embed_tokens.weight, targets)
        if points and len(batch.point_target):
            out.distance = (self.backbone.point(batch, prefix) - batch.point_target).abs().mean(-1)
        if actions:
            assert batch.noise is not None
            assert batch.time is not None
            seen = prefix.rows(len(batch.actions))
            seen = seen.detach() if insulate else seen
            out.flow = self.flow_head.loss(seen, batch.actions, batch.noise, batch.time)
        return out

    def reset_parameters(self, ordinal_ids: list[list[int]] | None = None) -> None:
        """Initialise from scratch; see `Backbone.reset_parameters`."""
        self.backbone.reset_parameters(ordinal_ids)
        self.flow_head.reset_parameters()

    @property
    def device(self) -> torch.device:
        return self.backbone.embed_tokens.weight.device
