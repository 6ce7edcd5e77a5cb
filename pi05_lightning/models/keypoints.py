"""A convolutional stem whose tokens are keypoints (spatial softmax: Levine et al. 2016, arXiv 1504.00702, §5.1).

For laptop-size models: where a thing is, in two numbers, is most of what a small policy needs of an image, and such a
stem learns it from a few thousand frames, where a patch transformer of the same size needs far more. The coordinates
enter as Fourier features, the curve that `<loc>` embeddings start on: to name a place is to copy it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pi05_lightning.models.config import VisionConfig


def fourier_features(x: Tensor, num_octaves: int) -> Tensor:
    """sin and cos of x in [0, 1] at π·{1, 2, 4, …}: [...] -> [... 2·num_octaves]."""
    angle = x[..., None] * (math.pi * 2.0 ** torch.arange(num_octaves, device=x.device, dtype=x.dtype))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class KeypointStem(nn.Module):
    """Convolutions to a quarter of the resolution, a spatial softmax per map; a token holds a few keypoints.

    Every camera has its own maps, and every token its own projection: a head that looks at all tokens alike still
    reads each keypoint by itself, as a linear regression would.
    """

    octaves = 6  # finest period 1/16 of the image: interpolates to well under a pixel at 64 px
    offset_scale = 0.1  # a keypoint is on the object or near it
    sharpness = 4.0  # of the softmax at the start: flat maps all point to the middle

    def __init__(self, config: VisionConfig, out_width: int) -> None:
        super().__init__()
        self.num_cameras = config.max_cameras
        self.num_groups = config.num_keypoints // config.keypoints_per_token
        self.num_tokens = self.num_groups + config.points_at_prompt
        self.convs = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(32, config.width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(config.width, config.width, 3, padding=1),
            nn.ReLU(),
        )
        self.maps = nn.Conv2d(config.width, config.max_cameras * config.num_keypoints, 3, padding=1)
        features = 4 * self.octaves * config.keypoints_per_token
        self.projection = nn.Parameter(torch.empty(config.max_cameras, self.num_groups, features, out_width))
        self.pointed = None
        if config.points_at_prompt:
            self.pointed = nn.Parameter(torch.empty(config.max_cameras, 4 * self.octaves, out_width))
        self.pointer = nn.Linear(out_width, config.max_cameras * (config.num_keypoints + 2))
        self.identity = nn.Parameter(torch.empty(config.max_cameras, self.num_tokens, out_width))

    def keypoints(self, images: Tensor, camera: Tensor) -> Tensor:
        """images f32[P 3 H W], camera i64[P] -> f32[P num_keypoints 2], (y, x) in [0, 1]."""
        images = images.contiguous(memory_format=torch.channels_last)  # what convolutions on a CPU are fastest with
        heat = rearrange(self.maps(self.convs(images)), "p (c n) h w -> p c n h w", c=self.num_cameras)
        heat = heat[torch.arange(camera.shape[0], device=camera.device), camera].float() * self.sharpness
        height, width = heat.shape[-2:]
        heat = rearrange(heat, "p n h w -> p n (h w)").softmax(-1)
        y = torch.linspace(0, 1, height, device=heat.device)
        x = torch.linspace(0, 1, width, device=heat.device)
        grid = rearrange(torch.stack(torch.meshgrid(y, x, indexing="ij")), "c h w -> (h w) c")
        return heat @ grid

    def forward(self, images: Tensor, camera: Tensor, prompt: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """images f32[P 3 H W] in [-1, 1], camera i64[P] -> tokens [P N W], and for heads `keypoints` f32[P K 2] and,
        where it points at the prompt, `pointed` f32[P 2].

        prompt: [P W], the mean of the embeddings of each image's prompt; zeros where there is none.
        """
        keypoints = self.keypoints(images, camera)
        features = fourier_features(keypoints, self.octaves).to(self.projection.dtype)
        features = rearrange(features, "p (n g) c f -> p n (g c f)", n=self.num_groups)
        # a one-hot camera axis instead of gathered weights: few cameras, and no copy of the projection per image
        own = F.one_hot(camera, self.num_cameras).to(features.dtype)
        tokens = torch.einsum("pc,pnf,cnfw->pnw", own, features, self.projection)
        seen = {"keypoints": keypoints}
        if self.pointed is not None:
            if prompt is None:
                prompt = tokens.new_zeros(len(tokens), tokens.shape[-1])
            seen["pointed"] = self.point(prompt, keypoints, camera)
            where = fourier_features(seen["pointed"], self.octaves).flatten(1).to(features.dtype)
            tokens = torch.cat([tokens, torch.einsum("pc,pf,cfw->pw", own, where, self.pointed)[:, None]], dim=1)
        return tokens + self.identity[camera], seen

    def point(self, query: Tensor, keypoints: Tensor, camera: Tensor) -> Tensor:
        """Where what a query names is: it selects among the image's keypoints, and an offset from them.

        query [Q W], keypoints f32[Q K 2] and camera i64[Q] of the image asked about -> f32[Q 2], (y, x) in [0, 1].
        """
        scores = rearrange(self.pointer(query), "q (c n) -> q c n", c=self.num_cameras)
        scores = scores[torch.arange(camera.shape[0], device=camera.device), camera].float()
        weights, offset = scores[:, :-2].softmax(-1), scores[:, -2:]
        return torch.einsum("qk,qkc->qc", weights, keypoints) + self.offset_scale * offset

    def reset_parameters(self) -> None:
        for conv in (*self.convs, self.maps):
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                assert conv.bias is not None
                nn.init.zeros_(conv.bias)
        nn.init.normal_(self.projection, std=self.projection.shape[2] ** -0.5)
        nn.init.normal_(self.identity, std=1.0)
        if self.pointed is not None:
            nn.init.normal_(self.pointed, std=self.pointed.shape[1] ** -0.5)
