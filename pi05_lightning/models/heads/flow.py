"""The flow head: the action expert that turns noise into an action chunk (π0, arXiv 2410.24164; π0.5, 2504.16054).

x_t = t·noise + (1 − t)·actions,   u = noise − actions,   t = 1 is noise;   sampled by Euler steps from 1 to 0

Real-time chunking: a chunk's first steps may be given, because the robot executes them while the chunk is computed
(arXiv 2506.07339). A given step has t = 0, in training (arXiv 2512.05964) as at inference: it is read, not predicted.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from pi05_lightning.models.backbone import Backbone, initialize
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.gemma import AdaRMSNorm, Context, ExpertBlock, compute_dtype, rope_table, with_room
from pi05_lightning.models.heads.base import Head
from pi05_lightning.types import Batch, Modality, Prefix

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0  # of the time features: openpi
Modulations = list[Tensor]
"""What adaRMS needs of the flow time: one [R K t 3W] per norm, two a layer and the last."""


def interpolate(noise: Tensor, actions: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Point on the straight path from data to noise, and its velocity (π0, eq. 2; here t = 1 is noise).

    noise f32[R K T D], actions f32[R T D], t f32[R K] or f32[R K T] in (0, 1]. Returns x_t and u, both f32[R K T D].
    """
    actions = actions[:, None]
    t = t[..., None] if t.ndim == 3 else t[..., None, None]
    return t * noise + (1 - t) * actions, noise - actions


def time_features(t: Tensor, width: int) -> Tensor:
    """sin and cos of 2πt / period, log-spaced, in float64 as the shortest period is 4e-3: t [...] -> f32[... width]."""
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=t.device)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angle = t.double()[..., None] * (2 * math.pi / period)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


class FlowHead(Head):
    """The action expert: velocity of noisy actions, given a prefix.

    Loss term `flow`: mean squared error of the velocity, over actions that are neither padding nor given.
    """

    terms: ClassVar = {"flow": frozenset({Modality.CONTINUOUS})}
    is_insulated = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.expert.width
        self.action_dim = config.action_dim
        self.width, self.head_dim = width, config.expert.head_dim
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)
        blocks = (ExpertBlock(config.expert) for _ in range(config.expert.depth))
        self.layers: list[ExpertBlock] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = AdaRMSNorm(width)

    def modulate(self, t: Tensor) -> Modulations:
        """adaRMS scales, shifts, gates at flow times t f32[R K] or f32[R K T]: everything that depends on t alone."""
        t = t if t.ndim == 3 else t[..., None]
        cond = time_features(t, self.width).to(self.time_mlp_in.weight.dtype)
        cond = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(cond))))
        norms = [norm for layer in self.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        return [norm.modulate(cond) for norm in (*norms, self.norm)]

    def forward(self, x_t: Tensor, modulations: Modulations, prefix: Prefix, mask: Tensor | None = None) -> Tensor:
        """Velocity f32[R K T D] at x_t f32[R K T D]; each of K draws sees the prefix and itself, see `context`."""
        return self.velocity(x_t, modulations, self.context(prefix, x_t, mask))

    def context(self, prefix: Prefix, x_t: Tensor, mask: Tensor | None = None, has_room: bool = False) -> Context:
        """Of a prefix, for x_t [R K T D].

        mask: the steps that are no padding, bool[R T], by default all: no step sees the others, which are copies of the
        last action.  has_room: copy keys and values, so that later calls need not.
        """
        _, draws, steps, _ = x_t.shape
        # after the last token that it sees, however many hidden ones follow
        start = ((prefix.mask.cumsum(1) - 1) * prefix.flow_mask).amax(1) + 1
        mask = prefix.flow_mask.new_ones(len(prefix.flow_mask), steps) if mask is None else mask
        seen = torch.cat([prefix.flow_mask, mask], dim=1)
        start, seen = (repeat(x, "r ... -> (r k) ...", k=draws) for x in (start, seen))
        kv = prefix.kv
        if has_room:
            dtype = compute_dtype(self.layers[0].self_attn.k_proj.weight)
            kv = [(with_room(k, steps, dtype, draws), with_room(v, steps, dtype, draws)) for k, v in kv]
        place = start[:, None] + torch.arange(steps, device=start.device)
        return Context(kv, draws, has_room, seen[:, None, None], rope_table(place, self.head_dim))

    def velocity(self, x_t: Tensor, modulations: Modulations, context: Context) -> Tensor:
        """As `forward`, in a context that serves many calls."""
        modulations = [m.flatten(0, 1) for m in modulations]
        x = self.action_in_proj(x_t.flatten(0, 1).to(self.action_in_proj.weight.dtype))
        for i, (layer, past) in enumerate(zip(self.layers, context.kv, strict=True)):
            x = layer(x, past, (modulations[2 * i], modulations[2 * i + 1]), context)
        x, _ = self.norm(x, modulations[-1])
        return self.action_out_proj(x.to(self.action_out_proj.weight.dtype)).float().view_as(x_t)

    def masks(self, batch: Batch) -> dict[str, Tensor]:
        """Steps of the data, in all dims; the batch needs its noise and time.

        Dims beyond the robot's are 0 there, and trained to be so, as openpi does: a chunk is integrated in all of them,
        and what was not trained would lead the others astray.
        """
        assert batch.noise is not None
        assert batch.time is not None
        mask = batch.action_mask.any(-1, keepdim=True)[:, None]
        if batch.time.ndim == 3:
            mask = mask & (batch.time > 0)[..., None]
        return {"flow": mask.expand(batch.noise.shape)}

    def loss(self, batch: Batch, prefix: Prefix, backbone: Backbone) -> dict[str, Tensor]:
        """The batch needs its noise and time."""
        assert batch.noise is not None
        assert batch.time is not None
        steps, prefix = batch.action_mask.any(-1), prefix.rows(slice(len(batch.actions)))
        return {"flow": self.squared_error(prefix, batch.actions, batch.noise, batch.time, steps)}

    def squared_error(
        self, prefix: Prefix, actions: Tensor, noise: Tensor, t: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Squared error of the velocity per element, f32[R K T D] (flow matching, π0 eq. 1).

        prefix of the R rows that have actions f32[R T D]; noise f32[R K T D]; t f32[R K] or f32[R K T]; mask bool[R T],
        see `context`.
        """
        x_t, u = interpolate(noise, actions, t)
        return (self(x_t, self.modulate(t), prefix, mask) - u).square()

    @torch.no_grad()
    def sample(
        self,
        prefix: Prefix,
        noise: Tensor,
        num_steps: int = 10,
        given: Tensor | None = None,
        num_given: Tensor | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """Integrate noise f32[R K T D] to actions with `num_steps` Euler steps from t = 1 to 0.

        T may be less than the horizon: the chunks of some data are shorter.
        given f32[R T D], num_given i64[R]: row r's first num_given[r] actions are given, and come back as they are.
        guidance: β of v_u + β (v_c - v_u) (classifier-free guidance, arXiv 2207.12598). Where it is not 1 the prefix
        has 2 R rows: the first R give v_c, the others v_u.
        """
        dt = -1.0 / num_steps
        # summed in float64, as LeRobot does: the shortest time period is 4e-3, so float32 errors of t would show
        grid = (1 + torch.arange(num_steps, dtype=torch.float64, device=noise.device) * dt).float()
        context = self.context(prefix, noise, has_room=True)

        def velocity(x: Tensor, modulations: Modulations) -> Tensor:
            if guidance == 1:
                return self.velocity(x, modulations, context)
            both = [torch.cat([m, m]) if len(m) == len(x) else m for m in modulations]
            led, free = self.velocity(torch.cat([x, x]), both, context).chunk(2)
            return free + guidance * (led - free)

        table = self.modulate(grid[None])  # [1 steps 1 3W]: a table over time, the same for all rows and draws
        if given is None or num_given is None:
            x = noise
            for step in range(num_steps):
                x = x + dt * velocity(x, [m[:, step, None] for m in table])
            return x
        is_given = torch.arange(noise.shape[2], device=noise.device) < num_given[:, None]
        is_given = repeat(is_given, "r t -> r k t 1", k=noise.shape[1])
        clean = self.modulate(grid.new_zeros(1, 1))
        x = torch.where(is_given, given[:, None], noise)
        for step in range(num_steps):
            mixed = [torch.where(is_given, c, m[:, step, None]) for c, m in zip(clean, table, strict=True)]
            x = torch.where(is_given, x, x + dt * velocity(x, mixed))
        return x

    def reset_parameters(self) -> None:
        """Initialise from scratch: fan-in scaled, adaRMS zero."""
        initialize(self)
