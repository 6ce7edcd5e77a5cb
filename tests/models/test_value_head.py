"""The value head: 201 bins from -1 to 0, cross-entropy on the return's bin, the expectation as the value."""

import math

import pytest
import torch

from pi05_lightning.models.heads.value import Returns, ValueHead
from pi05_lightning.types import Batch, Frame

from .small import change_column, make_batch, small_config, small_model

RETURNS = [-1.0, -0.5, 0.0, None, -0.2512]


@pytest.fixture
def head() -> ValueHead:
    head = ValueHead(small_config())
    head.reset_parameters()
    return head


def test_bins_are_the_nearest_of_201(head: ValueHead) -> None:
    assert head.bins == 201
    assert head.bin_of(torch.tensor([-1.0, -0.9976, -0.5, -0.0024, 0.0])).tolist() == [0, 0, 100, 200, 200]


def test_expectation_is_over_the_bins(head: ValueHead) -> None:
    logits = torch.full((2, 201), -math.inf)
    logits[0, 100] = 0.0
    logits[1, [0, 200]] = torch.tensor([math.log(0.25), math.log(0.75)])
    torch.testing.assert_close(head.expected(logits), torch.tensor([-0.5, -0.25]))


def test_expectation_is_as_exact_under_autocast(head: ValueHead) -> None:
    logits = torch.randn(64, 201, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = head.expected(logits)
    torch.testing.assert_close(found, head.expected(logits))


def test_expectation_of_a_certain_failure_is_not_below_it(head: ValueHead) -> None:
    logits = torch.randn(4096, 201, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += 20
    logits[:, 40:] -= 10
    assert head.expected(logits).min() >= -1


def test_loss_is_the_cross_entropy_of_the_rows_that_know_their_return(head: ValueHead) -> None:
    model = small_model()
    batch = make_batch(model.config, ["ipp", "ip", "ppp", "ip", "ippp"])
    made = [Returns().make(Frame(returns=value)) for value in RETURNS]
    batch.auxiliary["value"] = Returns().collate(made, [{}] * 5, lambda text: [])
    prefix = model.backbone(batch)
    loss = head.terms_of(batch, prefix, model.backbone)["value"]
    rows = torch.tensor([0, 1, 2, 4])
    logits = head.logits(batch, prefix, rows)
    expected = -logits.log_softmax(-1)[torch.arange(4), torch.tensor([0, 100, 200, 150])]
    torch.testing.assert_close(loss.values, expected)
    error = head.measure(batch, prefix, model.backbone)["value_error"].values
    known = torch.tensor([value for value in RETURNS if value is not None])
    torch.testing.assert_close(error, (head.value(batch, prefix)[rows] - known).abs())


def test_value_depends_on_the_last_word_of_the_prompt_and_on_nothing_that_is_said(head: ValueHead) -> None:
    model = small_model()
    batch = make_batch(model.config, ["ippossff"])

    def value(batch: Batch) -> torch.Tensor:
        return head.value(batch, model.backbone(batch))

    said = [change_column(batch, column) for column in range(3, 8)]
    assert all(torch.equal(value(changed), value(batch)) for changed in said)
    assert value(change_column(batch, 2)) != value(batch)


def test_value_of_a_row_depends_on_its_image_and_its_last_word_but_on_no_other_row(head: ValueHead) -> None:
    model = small_model()
    alone = make_batch(model.config, ["ip"])
    together = make_batch(model.config, ["ip", "ipppp"])
    values = [head.value(batch, model.backbone(batch)) for batch in (alone, together)]
    torch.testing.assert_close(values[0][0], values[1][0])
    alone.pixels = 255 - alone.pixels
    assert head.value(alone, model.backbone(alone))[0] != values[0][0]
