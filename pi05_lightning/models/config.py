"""The dimensions of a model: frozen dataclasses with π0.5's own defaults; `configs/model/*.yaml` are instances."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from pi05_lightning.files.ranges import check_range
from pi05_lightning.files.shipped import find_model
from pi05_lightning.files.yaml_files import read_yaml
from pi05_lightning.types import Shapes


def check_size(name: str, value: int | None, least: int = 1) -> None:
    """ValueError, by name, unless a number is at least `least`; YAML's null, which a parser lets through, is none."""
    if value is None:
        raise ValueError(f"{name} is null: give a number of {least} at least, or leave it out for the default")
    check_range(name, value, least)


@dataclass(frozen=True)
class GemmaConfig:
    """A Gemma transformer (PaliGemma's language model or the action expert)."""

    width: int = 2048
    depth: int = 18
    mlp_dim: int = 16_384
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256

    def __post_init__(self) -> None:
        for name in fields(self):
            check_size(name.name, getattr(self, name.name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: it must be even, as rotary embedding turns pairs")


@dataclass(frozen=True)
class VisionConfig:
    """What turns an image into tokens: a SigLIP tower, or for laptop-size models a convolutional keypoint stem."""

    image_size: int = 224
    """Side of the square images that the model sees, in pixels."""
    patch_size: int = 14
    """SigLIP: side of a patch, in pixels."""
    width: int = 1152
    """SigLIP: width. Keypoints: channels of the last feature map before the heat maps."""
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    num_keypoints: int = 32
    """Keypoints: heat maps per image."""
    keypoints_per_token: int = 4
    """Keypoints: how many share a token; num_keypoints / keypoints_per_token tokens per image."""
    max_cameras: int = 4
    """Keypoints: cameras that get an embedding of their own."""
    points_at_prompt: bool = False
    """Keypoints: one more token per image says where the prompt's words point, as the location loss teaches them."""
    named_maps: int = 0
    """Keypoints: heat maps that words make of what they name, to point with instead of those that all images have; 0
    for none. With them a place is known by 73 pixels around it, without by 25."""

    def __post_init__(self) -> None:
        check_size("vision.named_maps", self.named_maps, 0)
        for name in fields(self):
            if name.name not in ("points_at_prompt", "named_maps"):
                check_size(f"vision.{name.name}", getattr(self, name.name))
        if self.width % self.num_heads:
            raise ValueError(f"vision width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.num_keypoints % self.keypoints_per_token:
            raise ValueError(
                f"num_keypoints {self.num_keypoints} is not a multiple of"
                f" keypoints_per_token {self.keypoints_per_token}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Backbone, action expert and the shape of an action chunk."""

    backbone_type: Literal["siglip_gemma", "keypoint_gemma"] = "siglip_gemma"
    """siglip_gemma: PaliGemma's layout. keypoint_gemma: keypoints instead of SigLIP (small images, laptops)."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    language: GemmaConfig = field(default_factory=GemmaConfig)
    expert: GemmaConfig = field(default_factory=lambda: GemmaConfig(width=1024, mlp_dim=4096))
    vocab_size: int = 257_152
    """Rows of the embedding: Gemma's 256 000, 1024 <loc>, 128 <seg>."""
    fast_vocab_size: int = 1024
    """Token ids set aside for FAST (its BPE may be smaller)."""
    fast_skip_tokens: int = 1152
    """FAST's ids are vocab − 1 − skip − token. 1152 leaves <loc> and <seg> alone; openpi and pi0_fast use 128."""
    horizon: int = 50
    """Actions in a chunk (T)."""
    action_dim: int = 32
    """Action dimensions of the model (D); a dataset's actions are padded to it."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "fast_vocab_size", "horizon", "action_dim"):
            check_size(name, getattr(self, name))
        check_size("fast_skip_tokens", self.fast_skip_tokens, 0)
        side, patch = self.vision.image_size, self.vision.patch_size
        if self.backbone_type == "siglip_gemma" and side % patch:
            raise ValueError(f"vision.image_size {side} is not a multiple of vision.patch_size {patch}")
        lm, expert = self.language, self.expert
        for name in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(lm, name) != getattr(expert, name):
                raise ValueError(
                    f"language.{name} is {getattr(lm, name)} but expert.{name} is {getattr(expert, name)}: the expert"
                    " attends to the backbone's keys layer by layer, so both must be equal"
                )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Rebuild a config from plain types, as `to_dict` and the YAML files hold them."""
        parts = {"vision": VisionConfig, "language": GemmaConfig, "expert": GemmaConfig}
        return cls(**{key: parts[key](**value) if key in parts else value for key, value in values.items()})

    @property
    def shapes(self) -> Shapes:
        """What the data must know of the model."""
        return Shapes(
            image_size=self.vision.image_size,
            horizon=self.horizon,
            action_dim=self.action_dim,
            vocab_size=self.vocab_size,
            fast_vocab_size=self.fast_vocab_size,
            fast_skip_tokens=self.fast_skip_tokens,
            max_cameras=self.vision.max_cameras if self.backbone_type == "keypoint_gemma" else None,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """A shipped size: `debug` (tests), `tiny` (the demo) or `base` (π0.5); or the path of a YAML file.

        Raises ValueError with the shipped sizes for a name that is neither.
        """
        return cls.from_dict(read_yaml(find_model(name)))
