"""The limit that a share in `benchmarks/` is of: all matrix products, counted once each, and a time for each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.limit import Product, Products, fastest, limit_seconds
from benchmarks.peer import make_inputs
from benchmarks.sizes import DEBUG, ONE_ROBOT
from pi05_lightning.models.kernels import linear
from pi05_lightning.models.pi05 import Pi05


def flops(products: Products) -> int:
    return sum(2 * n * p.batch * p.rows * p.inner * p.columns for p, n in products.found.items())


def test_products_of_a_large_layer_are_all_that_it_multiplies() -> None:
    weight = torch.ones(600, 512, requires_grad=True)
    with Products() as products, FlopCounterMode(display=False) as counter:
        linear(torch.ones(4, 128, 512), weight).sum().backward()
    assert flops(products) == counter.get_total_flops() > 0


def test_products_of_attention_are_two_and_four_for_its_gradients() -> None:
    q, k, v = (torch.ones(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    with Products() as products:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert flops(products) == (2 + 4) * 2 * (2 * 5 * 8 * 5)


def test_products_of_a_chunk_are_all_that_it_multiplies() -> None:
    model, inputs = Pi05(DEBUG).to(torch.bfloat16).eval(), make_inputs(DEBUG, ONE_ROBOT)
    with Products() as products, FlopCounterMode(display=False) as counter:
        inputs.our_chunk(model)
    assert flops(products) == counter.get_total_flops() > 0


def test_limit_is_the_sum_of_what_each_product_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.limit.fastest", lambda product: float(product.columns))
    a, b, c = torch.ones(2, 3), torch.ones(3, 5), torch.ones(3, 7)
    assert limit_seconds(lambda: (a @ b, a @ b, a @ c)) == 17


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_larger_products_take_longer(dtype: torch.dtype) -> None:
    small, large = (fastest(Product(1, size, size, size, dtype)) for size in (32, 512))
    assert 0 < small < large
