"""A convolutional stem whose tokens are keypoints (spatial softmax: Levine et al. 2016, arXiv 1504.00702, §5.1).

For laptop-size models: where a thing is, in two numbers, is most of what a small policy needs of an image, and such a
stem learns it from a few thousand frames, where a patch transformer of the same size needs far more. The coordinates
enter as Fourier features, the curve that `<loc>` embeddings start on: to name a place is to copy it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pi05_lightning.models.config import VisionConfig


def fourier_features(x: Tensor, num_octaves: int) -> Tensor:
    """sin and cos of x in [0, 1] at π·{1, 2, 4, …}: [...] -> [... 2·num_octaves]."""
    angle = x[..., None] * (math.pi * 2.0 ** torch.arange(num_octaves, device=x.device, dtype=x.dtype))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def places(heat: Tensor) -> Tensor:
    """Where maps are hot, by a softmax over all places: f32[... h w] -> f32[... 2], (y, x) in [0, 1].

    Means by sums instead of a product of matrices: autocast would round a place to half a pixel.
    """
    shares = heat.flatten(-2).softmax(-1).unflatten(-1, heat.shape[-2:])
    axes = shares.sum(-1), shares.sum(-2)
    means = [(axis * torch.linspace(0, 1, axis.shape[-1], device=heat.device)).sum(-1) for axis in axes]
    return torch.stack(means, dim=-1)


class KeypointStem(nn.Module):
    """Convolutions to a quarter of the resolution, a spatial softmax per map; a token holds a few keypoints.

    Every camera has its own maps, and every token its own projection: a head that looks at all tokens alike still
    reads each keypoint by itself, as a linear regression would. What words name is among the keypoints or, with
    `named_maps`, where maps of the words' own are hot: their products with the features at every place.
    """

    octaves = 6  # finest period 1/16 of the image: interpolates to well under a pixel at 64 px
    named_width = 64  # channels of the features that words are multiplied with
    offset_scale = 0.1  # a keypoint is on the object or near it
    sharpness = 4.0  # of the softmax at the start: flat maps all point to the middle

    def __init__(self, config: VisionConfig, out_width: int) -> None:
        super().__init__()
        self.num_cameras = config.max_cameras
        self.num_groups = config.num_keypoints // config.keypoints_per_token
        self.num_tokens = self.num_groups + config.points_at_prompt
        self.num_named = config.named_maps
        self.convs = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(32, config.width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(config.width, config.width, 3, padding=1),
            nn.ReLU(),
        )
        self.surroundings = self.named = None
        if self.num_named:
            self.surroundings = nn.Sequential(  # a place is known by 73 pixels around it instead of 25
                nn.Conv2d(config.width, config.width, 3, padding=2, dilation=2),
                nn.ReLU(),
                nn.Conv2d(config.width, config.width, 3, padding=4, dilation=4),
                nn.ReLU(),
            )
            self.named = nn.Conv2d(config.width, self.named_width, 3, padding=1)
        self.maps = nn.Conv2d(config.width, config.max_cameras * config.num_keypoints, 3, padding=1)
        features = 4 * self.octaves * config.keypoints_per_token
        self.projection = nn.Parameter(torch.empty(config.max_cameras, self.num_groups, features, out_width))
        self.pointed = None
        if config.points_at_prompt:
            coordinates = 4 * self.octaves * (1 + self.num_named)
            self.pointed = nn.Parameter(torch.empty(config.max_cameras, coordinates, out_width))
        self.said = (self.num_named * self.named_width, self.num_named or config.num_keypoints, 2)
        self.pointer = nn.Linear(out_width, config.max_cameras * sum(self.said))
        self.identity = nn.Parameter(torch.empty(config.max_cameras, self.num_tokens, out_width))

    def look(self, images: Tensor, camera: Tensor) -> dict[str, Tensor]:
        """images f32[P 3 H W], camera i64[P] -> `keypoints` f32[P num_keypoints 2], (y, x) in [0, 1], and with maps
        that words make `named` [P C h w], the features for them."""
        images = images.contiguous(memory_format=torch.channels_last)  # what convolutions on a CPU are fastest with
        features, seen = self.convs(images), dict[str, Tensor]()
        if self.surroundings is not None and self.named is not None:
            features = features + self.surroundings(features)
            seen["named"] = self.named(features)
        heat = rearrange(self.maps(features), "p (c n) h w -> p c n h w", c=self.num_cameras)
        rows = torch.arange(camera.shape[0], device=camera.device)
        heat = heat[rows, camera] if self.num_cameras > 1 else heat[:, 0]
        heat = heat.contiguous()  # a softmax over places that are far apart takes three times as long
        return {"keypoints": places(heat.float() * self.sharpness)} | seen

    def forward(self, images: Tensor, camera: Tensor, prompt: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """images f32[P 3 H W] in [-1, 1], camera i64[P] -> tokens [P N W], and for heads what `look` finds and, where
        it points at the prompt, `pointed` f32[P 2].

        prompt: [P W], the mean of the embeddings of each image's prompt; zeros where there is none.
        """
        seen = self.look(images, camera)
        features = fourier_features(seen["keypoints"], self.octaves).to(self.projection.dtype)
        features = rearrange(features, "p (n g) c f -> p n (g c f)", n=self.num_groups)
        # a one-hot camera axis instead of gathered weights: few cameras, and no copy of the projection per image
        own = F.one_hot(camera, self.num_cameras).to(features.dtype)
        tokens = torch.einsum("pc,pnf,cnfw->pnw", own, features, self.projection)
        if self.pointed is not None:
            if prompt is None:
                prompt = tokens.new_zeros(len(tokens), tokens.shape[-1])
            pointed, found = self.point(prompt, seen, camera)
            seen["pointed"] = pointed
            where = torch.cat([pointed[:, None], found], dim=1)
            where = fourier_features(where, self.octaves).flatten(1).to(features.dtype)
            tokens = torch.cat([tokens, torch.einsum("pc,pf,cfw->pw", own, where, self.pointed)[:, None]], dim=1)
        return tokens + self.identity[camera], seen

    def point(self, query: Tensor, seen: Mapping[str, Tensor], camera: Tensor) -> tuple[Tensor, Tensor]:
        """Where what a query names is: it selects among keypoints, or the places of its own maps, and an offset.

        query [Q W], and of the image asked about what `look` found and camera i64[Q] -> f32[Q 2], (y, x) in [0, 1], and
        the places f32[Q named_maps 2].
        """
        said = rearrange(self.pointer(query), "q (c n) -> q c n", c=self.num_cameras)
        said = said[torch.arange(camera.shape[0], device=camera.device), camera]
        kernels, scores, offset = said.split(self.said, dim=-1)
        among, found = seen["keypoints"], seen["keypoints"][:, :0]
        if self.num_named:
            kernels = rearrange(kernels, "q (n c) -> q n c", n=self.num_named)
            heat = torch.einsum("qnc,qchw->qnhw", kernels, seen["named"])
            among = found = places(heat.float() * (self.sharpness / self.named_width**0.5))
        mean = (scores.float().softmax(-1)[..., None] * among).sum(-2)
        return mean + self.offset_scale * offset.float(), found

    def reset_parameters(self) -> None:
        for conv in (*self.convs, *(self.surroundings or ()), self.named, self.maps):
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                assert conv.bias is not None
                nn.init.zeros_(conv.bias)
        nn.init.normal_(self.projection, std=self.projection.shape[2] ** -0.5)
        nn.init.normal_(self.identity, std=1.0)
        if self.pointed is not None:
            nn.init.normal_(self.pointed, std=self.pointed.shape[1] ** -0.5)
