"""Loss terms to one loss: means over an optimizer step, weighted and summed by name.

What a term is, its formula and its name, is its head's business (models/heads/).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from pi05_lightning.models.heads.base import Term, Terms


def mean_terms(
    terms: Terms, counts: Mapping[str, Tensor], batches: int = 1
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The mean of each term over all its elements in an optimizer step, and how many those are, on all ranks together.

    The mean of the batches' own means would weigh elements unequally, where batches have different numbers of them.
    What this gives for a batch is scaled so that its mean over the step's batches, which Lightning takes, and over
    ranks, which data-parallel strategies take, is the mean over all elements of the step, and so for gradients. Values
    are the same on every rank.

    terms: of this batch.  counts: elements of each term in the step's batches on this rank, of all terms that a batch
    or rank may have.  batches: how many the step accumulates.
    Every rank must call this: there is one small all-reduce, and no host synchronisation.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    zero = next(iter(counts.values())).new_zeros((), dtype=torch.float32)
    sums = {name: sum_of(term) for name, term in terms.items()}
    mine = torch.stack([sums.get(name, zero) for name in counts])
    everyone = torch.stack([mine.detach(), torch.stack(list(counts.values())).float()])
    if ranks > 1:
        dist.all_reduce(everyone)
    total, count = everyone
    means = ranks * batches * mine / count.clamp(min=1)
    if ranks > 1:
        means = means + (batches * total / count.clamp(min=1) - means).detach()
    return dict(zip(counts, means, strict=True)), dict(zip(counts, count, strict=True))


def weighted_sums(terms: Terms, weights: Mapping[str, float]) -> list[Tensor]:
    """Of each term of a batch, its weight times the sum over its elements."""
    return [weights[name] * sum_of(term) for name, term in terms.items()]


def sum_of(term: Term) -> Tensor:
    """Over the elements that count: what is masked counts nowhere, even where it is no number."""
    return torch.where(term.mask, term.values, 0).sum()


def total_loss(means: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ weight · mean over the terms that have a weight. Raises ValueError where there are none of them."""
    used = [weights[name] * mean for name, mean in means.items() if name in weights]
    if not used:
        raise nothing_to_learn(weights)
    return torch.stack(used).sum()


def nothing_to_learn(weights: Mapping[str, float]) -> ValueError:
    """The error of a step without an element of any term that its stage weighs."""
    return ValueError(
        f"this step has nothing that the stage trains on: its loss weights are {dict(weights)}; give one of them"
        " data in the stage's mixture, or a weight to what the mixture draws"
    )
