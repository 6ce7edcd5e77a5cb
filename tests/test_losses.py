import math

import torch

from pi05_lightning.losses import mean_terms, total_loss
from pi05_lightning.models.heads.base import Term


def test_total_is_of_the_terms_that_have_a_weight_each_times_its_own() -> None:
    means = {"subtask": torch.tensor(2.0), "flow": torch.tensor(3.0), "text": torch.tensor(9.0)}
    assert total_loss(means, {"subtask": 1.0, "flow": 10.0}) == 32


def test_what_is_masked_counts_nowhere_even_where_it_is_no_number() -> None:
    term = Term(torch.tensor([1.0, math.nan, 3.0]), torch.tensor([True, False, True]))
    means, counts = mean_terms({"own": term}, {"own": torch.tensor(2)})
    assert (means["own"], counts["own"]) == (2, 2)
