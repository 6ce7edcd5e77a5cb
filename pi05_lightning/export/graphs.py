"""What a policy computes, as three graphs: `vision`, `language`, `flow`. All else is arithmetic of a line or two.

    vision    images                                  -> their columns
    language  columns of a sequence, and what its
              earlier ones left (keys and values)     -> what comes next, and what these columns leave
    flow      noisy actions, and what all columns left -> their velocity

`language` reads a prompt, and says a subtask, an answer or FAST tokens one by one; its weights are in one graph, once.
A graph is of one observation, of any number of images and tokens. What depends on the flow's times alone is a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pi05_lightning.models.backbone import Backbone
from pi05_lightning.models.gemma import KV, Context, rope_table
from pi05_lightning.models.heads.flow import FlowHead
from pi05_lightning.models.keypoints import KeypointStem
from pi05_lightning.models.pi05 import Pi05


class Vision(nn.Module):
    """pixels f32[P 3 H W] in 0..255, camera i64[P] -> embeddings f32[P N W].

    With a stem that points, also prompt f32[W], the mean of the embeddings of the prompt's tokens.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.vision = backbone.vision

    def forward(self, pixels: Tensor, camera: Tensor, prompt: Tensor | None = None) -> Tensor:
        images = pixels / 127.5 - 1
        if prompt is None:
            return self.vision(images, camera)[0]
        return self.vision(images, camera, prompt.expand(images.shape[0], -1))[0]


class Language(nn.Module):
    """Columns x f32[S W] after S0 others -> logits f32[V] after the last, and keys and values f32[layers H_kv S d].

    block i64[S]: a column sees those of its own block and of blocks with lower numbers, and all S0 earlier ones, whose
    keys and values f32[layers H_kv S0 d] are given.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.layers, self.norm, self.embed_tokens = backbone.layers, backbone.norm, backbone.embed_tokens
        self.head_dim = backbone.head_dim

    def forward(self, x: Tensor, block: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = keys.shape[2]
        seen = block[:, None] >= block
        mask = torch.cat([seen.new_ones(block.shape[0], before), seen], dim=1)[None, None]
        rope = rope_table(before + torch.arange(block.shape[0])[None], self.head_dim)
        x, new = x[None], list[KV]()
        for number, layer in enumerate(self.layers):
            y = layer.input_layernorm(x)
            new.append(layer.self_attn.keys_values(y, rope))
            k, v = (torch.cat([past[number][None], own], 2) for past, own in zip((keys, values), new[-1], strict=True))
            if number == len(self.layers) - 1:  # only the last column says what is next
                x, y, mask, rope = x[:, -1:], y[:, -1:], mask[:, :, -1:], (rope[0][:, :, -1:], rope[1][:, :, -1:])
            x = layer.mix(x, y, rope, mask, (k, v))
        logits = nn.functional.linear(self.norm(x)[0, 0], self.embed_tokens.weight)
        own_keys, own_values = (torch.cat(part) for part in zip(*new, strict=True))
        return logits, own_keys, own_values


class Flow(nn.Module):
    """Noisy actions f32[T D] after S columns -> their velocity f32[T D].

    modulations f32[norms T 3W] of each action's flow time, see `flow_table`; keys, values f32[layers H_kv S d].
    """

    def __init__(self, head: FlowHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, actions: Tensor, modulations: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        horizon, before = actions.shape[0], keys.shape[2]
        seen = torch.ones(1, 1, 1, before + horizon, dtype=torch.bool)
        rope = rope_table(before + torch.arange(horizon)[None], self.head.head_dim)
        kv = [(k[None], v[None]) for k, v in zip(keys.unbind(), values.unbind(), strict=True)]
        context = Context(kv, draws=1, has_room=False, mask=seen, rope=rope)
        return self.head.velocity(actions[None, None], [m[None, None] for m in modulations.unbind()], context)[0, 0]


@torch.no_grad()
def flow_table(head: FlowHead, num_steps: int) -> Tensor:
    """Modulations f32[num_steps + 1 norms 3W] of the flow's times 1, 1 - 1 / num_steps, …, and of 0, the last."""
    times = [*(1 - step / num_steps for step in range(num_steps)), 0.0]
    return torch.stack(head.modulate(torch.tensor([times])), dim=2)[0, :, :, 0]


@dataclass(frozen=True)
class Graph:
    """A traced graph and the names of what goes in and comes out."""

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def graphs_of(model: Pi05, steps: int) -> dict[str, Graph]:
    """The graphs of a model in float32, by name. steps: of a chunk."""
    config, vision = model.config, model.backbone.vision
    size, width = config.vision.image_size, config.language.width
    lm = config.language
    past = torch.zeros(2, lm.depth, lm.num_kv_heads, 5, lm.head_dim).unbind()
    points = isinstance(vision, KeypointStem) and vision.pointed is not None
    images, columns, before = Dim("images"), Dim("columns"), Dim("before")
    seen = {name: {2: before} for name in ("keys", "values")}
    every: dict[str, tuple[nn.Module, dict[str, Tensor], dict[str, Any], tuple[str, ...]]] = {
        "vision": (
            Vision(model.backbone),
            {"pixels": torch.zeros(2, 3, size, size), "camera": torch.zeros(2, dtype=torch.long)}
            | ({"prompt": torch.zeros(width)} if points else {}),
            {"pixels": {0: images}, "camera": {0: images}} | ({"prompt": None} if points else {}),
            ("embeddings",),
        ),
        "language": (
            Language(model.backbone),
            {"x": torch.zeros(3, width), "block": torch.arange(3), "keys": past[0], "values": past[1]},
            {"x": {0: columns}, "block": {0: columns}, **seen},
            ("logits", "new_keys", "new_values"),
        ),
        "flow": (
            Flow(model.flow_head),
            {
                "actions": torch.zeros(steps, config.action_dim),
                "modulations": flow_table(model.flow_head, 1)[0, :, None].repeat(1, steps, 1),
                "keys": past[0],
                "values": past[1],
            },
            {"actions": None, "modulations": None, **seen},
            ("velocity",),
        ),
    }
    with torch.no_grad():
        return {
            name: Graph(
                torch.export.export(module.eval(), tuple(inputs.values()), dynamic_shapes=shapes, strict=False),
                tuple(inputs),
                outputs,
            )
            for name, (module, inputs, shapes, outputs) in every.items()
        }
