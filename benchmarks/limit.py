"""The time that nothing which computes the same matrix products can beat: each of them alone, in its fastest kernel."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import Row, speed_up
from pi05_lightning.models.kernels import DTYPES

REPEATS, ENOUGH = 20, 0.1  # products of one shape and kernel: as many, or for as many seconds


@dataclass(frozen=True)
class Product:
    """[batch rows inner] × [batch inner columns]."""

    batch: int
    rows: int
    inner: int
    columns: int
    dtype: torch.dtype


class Products(TorchDispatchMode):
    """Counts the matrix products of what runs in it: of layers, of attention, and of convolutions as products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found.update(products_of(func.overloadpacket, args, out))
        return out


def products_of(operator: Any, args: tuple[Any, ...], out: Any) -> Iterator[Product]:
    """The products of a call of one of PyTorch's operators, and what it returned."""
    aten = torch.ops.aten
    if operator in (aten.mm, aten.bmm):
        yield product(args[0], args[1])
    elif operator in (aten.addmm, aten.baddbmm):
        yield product(args[1], args[2])
    elif DTYPES and operator is torch.ops.mkldnn._linear_pointwise:
        yield product(args[0].flatten(0, -2), args[1].t())
    elif operator is aten.convolution:
        yield convolution(out, args[1])
    elif operator is aten.convolution_backward:
        yield from [convolution(args[0], args[2])] * sum(args[-1][:2])  # of inputs and of weights, as asked for
    elif operator is aten._scaled_dot_product_flash_attention_for_cpu:
        yield from attention(*args[:3])
    elif operator is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        yield from 2 * [*attention(*args[1:4])]  # those of the gradients; scores computed again are its own affair


def product(a: Tensor, b: Tensor) -> Product:
    return Product(a.shape[0] if a.ndim == 3 else 1, *a.shape[-2:], b.shape[-1], a.dtype)


def convolution(out: Tensor, weight: Tensor) -> Product:
    return Product(1, out.numel() // out.shape[1], weight[0].numel(), len(weight), out.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> list[Product]:
    """Scores, and the values that they weigh."""
    batch, queries, keys = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    of_q, of_v = q.shape[3], v.shape[3]
    return [Product(batch, queries, of_q, keys, q.dtype), Product(batch, queries, keys, of_v, q.dtype)]


def share_of_limit(name: str, goal: str, limit: float, seconds: Sequence[float]) -> Row:
    """The row that says how near calls that took so many seconds come to the least that their products take."""
    return speed_up(f"{name}: share of what its products allow", goal, ([limit] * len(seconds), list(seconds)))


def limit_seconds(run: Callable[[], Any]) -> float:
    """Seconds of all matrix products of a call, each as often as it occurs, in the fastest kernel that was found."""
    with Products() as products:
        run()
    return sum(count * fastest(found) for found, count in products.found.items())


@torch.no_grad()
def fastest(found: Product) -> float:
    """Seconds of the fastest of all libraries and layouts, with operands that are in cache as far as they fit."""
    x = torch.linspace(-1, 1, found.inner).to(found.dtype)
    a = x.expand(found.batch, found.rows, -1).contiguous()
    b = x[:, None].expand(found.batch, -1, found.columns).contiguous()
    if found.batch == 1:
        a, b = a[0], b[0]
    layouts = [(p, q) for p in (a, a.mT.contiguous().mT) for q in (b, b.mT.contiguous().mT)]
    seconds = [seconds_of(lambda p=p, q=q: p @ q) for p, q in layouts]
    if found.dtype == torch.float32:
        with torch.backends.mkldnn.flags(enabled=False):
            seconds += [seconds_of(lambda p=p, q=q: p @ q) for p, q in layouts]
    if found.batch == 1 and found.dtype in DTYPES:
        onednn = torch.ops.mkldnn._linear_pointwise
        seconds += [seconds_of(lambda p=p, q=q: onednn(p, q.t(), None, "none", [], "")) for p, q in layouts]
    return min(seconds)


def seconds_of(multiply: Callable[[], Tensor]) -> float:
    """The least of a few, after one to warm up."""
    multiply()
    found = list[float]()
    while len(found) < REPEATS and sum(found) < ENOUGH:
        start = time.perf_counter()
        multiply()
        found.append(time.perf_counter() - start)
    return min(found)
