"""What the subtask and the FAST head share: cross-entropy and generation over the backbone's tied embedding matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pi05_lightning.models.backbone import Backbone, Cache
from pi05_lightning.models.heads.base import Head, Term, Terms
from pi05_lightning.models.kernels import linear
from pi05_lightning.types import Batch, Prefix, Target

TOKEN_METRICS = ("cross_entropy", "token_accuracy")
CHUNK_BYTES = 1 << 28  # of fp32 logits at a time: 260 positions of π0.5's vocabulary


class TokenScores(NamedTuple):
    """Of each of N targets its negative log-likelihood f32[N], and whether it was the most likely token, bool[N]."""

    nll: Tensor
    correct: Tensor


def score_tokens(hidden: Tensor, embedding: Tensor, targets: Tensor) -> TokenScores:
    """Score targets i64[N] against hidden states [N W] and the tied embedding [V W].

    Logits are made chunk by chunk and made again in the backward pass, so that an [N V] tensor never exists.
    """
    rows = max(1, CHUNK_BYTES // (4 * embedding.shape[0]))
    if len(targets) <= rows:
        return _score(hidden, embedding, targets)
    parts = [
        checkpoint(_score, h, embedding, t, use_reentrant=False)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return TokenScores(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _score(hidden: Tensor, embedding: Tensor, targets: Tensor) -> TokenScores:
    logits = linear(hidden, embedding).float()
    nll = F.cross_entropy(logits, targets, reduction="none")
    return TokenScores(nll, logits.detach().argmax(-1) == targets)


class TokenHead(Head):
    """A head that predicts tokens of some kinds, each with a loss term: mean cross-entropy of the next token.

    kinds: term -> the kind of token that it is about.  A subclass's `metrics` say where TOKEN_METRICS are measured.
    """

    kinds: ClassVar[Mapping[str, Target]] = {}
    reads_hidden = True

    def masks(self, batch: Batch) -> dict[str, Tensor]:
        indices = {term: batch.target_index[kind] for term, kind in self.kinds.items()}
        return {term: torch.ones_like(index, dtype=torch.bool) for term, index in indices.items()}

    def score(self, batch: Batch, prefix: Prefix, backbone: Backbone, kind: Target) -> TokenScores:
        """Of the batch's tokens of a kind, in the order of `Batch.target_index`."""
        assert prefix.hidden is not None
        index = batch.target_index[kind]
        hidden = prefix.hidden.flatten(0, 1)[index - 1]  # position l - 1 predicts token l
        return score_tokens(hidden, backbone.embed_tokens.weight, batch.tokens.flatten()[index])

    def loss(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> dict[str, Tensor]:
        return {term: self.score(batch, prefix, backbone, kind).nll for term, kind in self._present(batch).items()}

    def measure(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> Terms:
        scores = [self.score(batch, prefix, backbone, kind) for kind in self._present(batch).values()]
        nll, correct = (torch.cat(part) for part in zip(*scores, strict=True))
        ones = torch.ones_like(correct)
        return dict(zip(TOKEN_METRICS, (Term(nll, ones), Term(correct, ones)), strict=True))

    def _present(self, batch: Batch) -> dict[str, Target]:
        return {term: kind for term, kind in self.kinds.items() if len(batch.target_index[kind])}


Generators = torch.Generator | Sequence[torch.Generator]
"""What tokens are drawn with: one generator for all rows, or every row's own, of one device."""
Allowed = Callable[[Tensor, int], Tensor]
"""(tokens so far i64[B n], step) -> bool[B V] or bool[V]: what may come next."""


@torch.no_grad()
def generate(
    backbone: Backbone,
    prefix: Prefix,
    *,
    max_tokens: int,
    stop_id: int,
    flow_visible: bool,
    forced: Tensor | None = None,
    allowed: Allowed | None = None,
    temperature: float = 0.0,
    generator: Generators | None = None,
) -> tuple[Tensor, Tensor, Prefix]:
    """Continue every row of a prefix until its own `stop_id` or `max_tokens`; greedy, or sampled when temperature > 0.

    prefix: with hidden states.  forced: i64[F], tokens that every row begins with.
    Returns tokens i64[B n] (forced ones included), valid bool[B n] (up to and with the stop token), and the prefix
    extended by them, so that the flow head reads what was said without another backbone call.
    """
    assert prefix.hidden is not None
    rows = len(prefix.mask)
    device = prefix.mask.device
    cache = Cache.extend(prefix, max_tokens)
    token_mask = prefix.mask[:, -prefix.hidden.shape[1] :]
    last = (token_mask * torch.arange(token_mask.shape[1], device=device)).argmax(1)
    hidden = prefix.hidden[torch.arange(rows, device=device), last]
    alive = torch.ones(rows, dtype=torch.bool, device=device)
    tokens: list[Tensor] = []
    valid: list[Tensor] = []
    for step in range(max_tokens):
        if forced is not None and step < len(forced):
            token = forced[step].expand(rows)
        else:
            logits = backbone.logits(hidden)
            if allowed is not None:
                logits = logits.masked_fill(~allowed(_stack(tokens, rows, device), step), -torch.inf)
            token = _choose(logits, alive, temperature, generator)
        token = torch.where(alive, token, stop_id)
        tokens.append(token)
        valid.append(alive)
        hidden = backbone.decode(token[:, None], alive[:, None], cache, flow_visible=flow_visible)[:, 0]
        alive = alive & (token != stop_id)
        if not alive.any():
            break
    return _stack(tokens, rows, device), torch.stack(valid, 1), cache.prefix()


def _choose(logits: Tensor, alive: Tensor, temperature: float, generator: Generators | None) -> Tensor:
    """One id per row of logits [B V]; drawn where the generator is, which may be the CPU.

    From its own generator a row draws while it is alive: as often as it would without the others.
    """
    if not temperature:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if not isinstance(generator, Sequence):
        probabilities = probabilities.to(generator.device if generator else logits.device)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
    chosen = logits.argmax(-1)
    probabilities = probabilities.to(generator[0].device)
    for row in alive.nonzero()[:, 0].tolist():
        chosen[row] = torch.multinomial(probabilities[row], 1, generator=generator[row]).item()
    return chosen


def _stack(tokens: list[Tensor], rows: int, device: torch.device) -> Tensor:
    return torch.stack(tokens, 1) if tokens else torch.empty(rows, 0, dtype=torch.long, device=device)
