import torch

from pi05_lightning.losses import total_loss


def test_total_is_of_the_terms_that_have_a_weight_each_times_its_own() -> None:
    means = {"subtask": torch.tensor(2.0), "flow": torch.tensor(3.0), "text": torch.tensor(9.0)}
    assert total_loss(means, {"subtask": 1.0, "flow": 10.0}) == 32
