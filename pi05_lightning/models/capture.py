"""A chunk of actions as one CUDA graph: its thousands of small kernels are launched by one call.

A graph computes on the memory that it was captured with, and on shapes that never change. So a batch is padded to a
multiple of `COLUMNS` tokens and copied into a graph's own inputs; there is a graph for every shape, and the graphs of
weights that moved are thrown away.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from pi05_lightning.models.parallelize import compiled_blocks
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Target

COLUMNS = 16
"""Prompts are padded to a multiple of so many tokens: they differ by a few, as a state's numbers do."""
MOST_GRAPHS = 16
"""Of these shapes the last used are kept; all share their memory for what is computed on the way."""


def padded(batch: Batch, columns: int = COLUMNS) -> Batch:
    """The batch with tokens that nobody sees, up to a multiple of so many.  Only for a batch without targets."""
    room = -batch.tokens.shape[1] % columns
    return replace(
        batch,
        tokens=F.pad(batch.tokens, (0, room)),
        token_mask=F.pad(batch.token_mask, (0, room)),
        causal=F.pad(batch.causal, (0, room)),
        target_kind=F.pad(batch.target_kind, (0, room), value=int(Target.NONE)),
    )


class CapturedChunk:
    """`Pi05.chunk` as CUDA graphs. A shape's first call captures it, which takes a second; several threads may call.

    compile: the blocks are compiled before, which takes the first two shapes half a minute each.
    """

    def __init__(self, model: Pi05, compile: bool = False) -> None:
        self.model, self.compile = model, compile
        self._lock = Lock()
        self._weights: tuple[int, ...] = ()
        self._forget()

    def _forget(self) -> None:
        self._graphs: OrderedDict[object, Graph] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self,
        batch: Batch,
        noise: Tensor,
        num_steps: int = 10,
        given: Tensor | None = None,
        num_given: Tensor | None = None,
    ) -> Tensor:
        """As `Pi05.chunk`."""
        batch = padded(batch)
        inputs = _tensors(vars(batch), noise, given, num_given)
        key = num_steps, given is None, *((x.shape, x.dtype) for x in inputs)
        with self._lock, torch.cuda.device(self.model.device):
            weights = tuple(parameter.data_ptr() for parameter in self.model.parameters())
            if weights != self._weights:
                self._forget()
                self._weights = weights
            if key not in self._graphs:
                if len(self._graphs) == MOST_GRAPHS:
                    self._graphs.popitem(last=False)
                self._graphs[key] = self._capture(vars(batch), noise, given, num_given, num_steps)
            self._graphs.move_to_end(key)
            return self._graphs[key].replay(inputs)

    def _capture(
        self, fields: dict[str, Any], noise: Tensor, given: Tensor | None, num_given: Tensor | None, num_steps: int
    ) -> Graph:
        fields, noise, given, num_given = tree_map_only(Tensor, Tensor.clone, (fields, noise, given, num_given))

        def chunk() -> Tensor:
            return self.model.chunk(Batch(**fields), noise, num_steps, given, num_given)

        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with compiled_blocks(self.model) if self.compile else nullcontext():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up in a first call, which no graph can hold
                chunk()
            torch.cuda.current_stream().wait_stream(stream)
            # other threads of a server may use the device meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = chunk()
        return Graph(graph, _tensors(fields, noise, given, num_given), output)


@dataclass(frozen=True)
class Graph:
    """What was captured, the tensors that it reads, and the one that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor

    def replay(self, inputs: list[Tensor]) -> Tensor:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.output.clone()


def _tensors(*values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]
