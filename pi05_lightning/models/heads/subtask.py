"""The subtask head: everything that is said in words, from captions and answers with boxes to the next subtask."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pi05_lightning.models.backbone import Backbone
from pi05_lightning.models.heads.base import PREDICTS_TOKENS, ROBOT_ACTIONS
from pi05_lightning.models.heads.token import TOKEN_METRICS, Generators, TokenHead, generate
from pi05_lightning.types import Modality, Prefix, Target

MAX_WORDS = 128
"""Tokens of what is said at most, unless more are asked for: a long sentence, or two dozen boxes."""


class SubtaskHead(TokenHead):
    """Reads the backbone's tied embedding; its tokens are all of the vocabulary except FAST's."""

    kinds: ClassVar = {"text": Target.TEXT, "subtask": Target.SUBTASK}
    terms: ClassVar = {
        "text": frozenset({Modality.WEB_CAPTION, Modality.QA}),
        "subtask": frozenset({Modality.HL_SUBTASK, *ROBOT_ACTIONS}),
    }
    # beside FAST tokens, a subtask's would hide how well these are predicted
    metrics: ClassVar = dict.fromkeys(TOKEN_METRICS, PREDICTS_TOKENS - {Modality.FAST})

    def __init__(self, vocab_size: int, fast_ids: range, eos_id: int = 1) -> None:
        super().__init__()
        self.vocab_size, self.fast_ids, self.eos_id = vocab_size, fast_ids, eos_id

    def token_mask(self, device: torch.device) -> Tensor:
        """The ids that words are made of, bool[V]."""
        ids = torch.arange(self.vocab_size, device=device)
        return (ids < self.fast_ids.start) | (ids >= self.fast_ids.stop)

    def generate(
        self,
        backbone: Backbone,
        prefix: Prefix,
        *,
        max_tokens: int = MAX_WORDS,
        temperature: float = 0.0,
        generator: Generators | None = None,
        is_subtask: bool = True,
    ) -> tuple[Tensor, Tensor, Prefix]:
        """Say something after the prefix: tokens i64[B n], valid bool[B n], and the prefix with it (see `generate`)."""
        words = self.token_mask(prefix.mask.device)
        return generate(
            backbone,
            prefix,
            max_tokens=max_tokens,
            stop_id=self.eos_id,
            flow_visible=is_subtask,
            allowed=lambda tokens, step: words,
            temperature=temperature,
            generator=generator,
        )
