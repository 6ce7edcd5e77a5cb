"""The options of the policy: what `lerobot-train` and `lerobot-eval` take as --policy.NAME."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig

from pi05_lightning.acting import Acting
from pi05_lightning.data.augment import Augmentation
from pi05_lightning.data.processor import Language
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import FLOW_ALPHA, POSTTRAIN, PRETRAIN, LossWeights, Recipe, Stage
from pi05_lightning.types import Modality
from pi05_lightning.weights.folder import PLUGIN
from pi05_lightning.weights.locate import locate

STAGES = {"pretrain": PRETRAIN, "posttrain": POSTTRAIN}


@PreTrainedConfig.register_subclass(PLUGIN)
@dataclass
class Pi05LightningConfig(PreTrainedConfig):
    """What is trained, on what, from what, and how the policy acts."""

    preset: str | None = None
    """The model's sizes: `debug`, `tiny`, `base` or a YAML file; by default those of the weights it begins with, or
    `base`."""
    model: dict[str, Any] | None = None
    """The sizes one by one, as a checkpoint has them; they take the place of `preset`."""
    chunk_size: int | None = None
    """Actions in a chunk; by default as the sizes say."""
    init_from: str | None = None
    """Weights to begin with: a checkpoint, run or folder of ours, LeRobot's or openpi's folder, or a Hub id."""
    tokenizer: str | None = None
    """`tiny` for the shipped one, or the folder or Hub id of PaliGemma's; by default that of the weights it begins
    with, else the one that the size of the vocabulary tells."""
    fast: str | None = None
    """Folder of a FAST tokenizer (`pi05 tokenizer`); by default that of the weights it begins with."""
    language: Language = field(default_factory=Language)
    """How frames become text, as `data.language` of `pi05 fit`."""

    stage: Literal["pretrain", "posttrain"] = "posttrain"
    """What is trained: text, subtasks and FAST tokens, or subtasks and the flow head."""
    losses: dict[str, float] | None = None
    """Weights of loss terms (text, subtask, fast, location, flow) instead of the stage's; a term without data is an
    error then. By default the stage's terms that the dataset has data of."""
    flow_alpha: float | None = None
    """Factor on the weight of the flow loss; by default 10 in posttrain, and 1 in pretrain."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Share of each modality (qa, hl_subtask, fast_robot_actions, continuous_robot_actions) in what the frames of a
    batch serve as; by default all that the losses train, equally."""
    knowledge_insulation: bool = False
    """The flow loss gives the backbone no gradient."""
    flow_draws: int = 1
    """Noise draws per observation and step."""
    rtc_max_delay: int = 0
    """Training-time real-time chunking: the first 0 to this many actions of a draw are given."""
    freeze: list[str] = field(default_factory=list)
    """Regular expressions; parameters whose name matches one are not trained."""
    lr_factors: dict[str, float] = field(default_factory=dict)
    """Regular expression -> factor on the learning rate; the first that matches a parameter's name counts."""
    augmentation: Augmentation | None = field(default_factory=Augmentation)
    """What happens to training images; null for nothing."""
    gradient_checkpointing: bool = False
    """Keep only the input of every block and run it again in the backward pass."""
    seed: int = 0
    """Of noise, flow time, augmentation and what a frame serves as."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What `lerobot-train` computes in; weights stay float32."""

    subtask_key: str | None = None
    """Column of the dataset with the subtask; by default as LeRobot annotates it."""
    relative_dims: list[int] = field(default_factory=list)
    """Dims of the action that are trained relative to the state at the chunk's first frame."""
    relative_state_dims: list[int] | None = None
    """Dims of the state that these are relative to; by default the same numbers."""
    min_range: float | None = None
    """Widen dims of less range (q99 - q01, real units) to this; without it one that does not vary is an error."""

    acting: Acting = field(default_factory=Acting)
    """How the policy acts, with the names and defaults of every other command."""
    n_action_steps: int | None = None
    """LeRobot's name of `acting.execution_horizon`."""

    optimizer_lr: float = 2.5e-5
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = 0.01
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 1_000
    scheduler_decay_steps: int = 30_000
    scheduler_decay_lr: float = 2.5e-6

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )
    """LeRobot's processors leave everything as it is: the policy normalises."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model = self._sizes().to_dict()
        self.preset, self.chunk_size = None, self.sizes.horizon
        if any(mode is not NormalizationMode.IDENTITY for mode in self.normalization_mapping.values()):
            raise ValueError("normalization_mapping: the policy normalises by itself; leave it out")
        if self.n_action_steps is not None:
            self.acting, self.n_action_steps = replace(self.acting, execution_horizon=self.n_action_steps), None
        self.acting.executed(self.sizes.horizon)
        if self.acting.inference_delay:
            raise ValueError(
                "acting.inference_delay: LeRobot waits for every chunk; `pi05 rollout` and `pi05 serve` do not"
            )
        if not 0 <= self.rtc_max_delay < self.sizes.horizon:
            raise ValueError(f"rtc_max_delay {self.rtc_max_delay} is not within 0 and chunk_size {self.sizes.horizon}")
        if self.flow_draws < 1:
            raise ValueError(f"flow_draws is {self.flow_draws}: it must be at least 1")
        for name in self.mixture:
            if name not in {*Modality} - {Modality.WEB_CAPTION}:
                raise ValueError(f"mixture: {name} is none of the modalities that a LeRobot dataset has")
        self.recipe_of(self.weights)

    def _sizes(self) -> ModelConfig:
        """The model's sizes, by whichever option says them. ValueError for two that differ."""
        said = None if self.preset is None else ModelConfig.preset(self.preset)
        if self.model is not None:
            found = ModelConfig.from_dict(self.model)
        elif self.init_from is not None:
            found = locate(self.init_from).config()
        else:
            found = said or ModelConfig.preset("base")
        if said is not None and replace(said, horizon=found.horizon) != found:
            raise ValueError(f"preset {self.preset}: the weights are of other sizes; leave it out")
        return found if self.chunk_size is None else replace(found, horizon=self.chunk_size)

    @property
    def sizes(self) -> ModelConfig:
        """The model's sizes."""
        assert self.model is not None
        return ModelConfig.from_dict(self.model)

    @property
    def weights(self) -> LossWeights:
        """Of the loss terms, before `flow_alpha`: the given ones, or the stage's."""
        return STAGES[self.stage].losses if self.losses is None else self.weights_of(self.losses)

    @staticmethod
    def weights_of(losses: Mapping[str, float]) -> LossWeights:
        """Weights of loss terms by name."""
        own: dict[str, Any] = {f.name: losses.get(f.name, 0.0) for f in fields(LossWeights) if f.name != "others"}
        return LossWeights(**own, others={name: weight for name, weight in losses.items() if name not in own})

    def recipe_of(self, losses: LossWeights) -> Recipe:
        """A recipe of the one stage that this training is."""
        alpha = self.flow_alpha
        if alpha is None:
            alpha = FLOW_ALPHA if self.stage == "posttrain" else 1.0
        stage = Stage(
            name=self.stage,
            steps=1,
            losses=losses,
            flow_alpha=alpha,
            mixture=self.mixture,
            freeze=tuple(self.freeze),
            lr_factors=self.lr_factors,
        )
        return Recipe((stage,))

    def validate_features(self) -> None:
        """Raises ValueError for data without images or actions."""
        if not self.image_features:
            raise ValueError("there is no image among the inputs: the policy sees")
        if self.action_feature is None:
            raise ValueError("there is no `action` among the outputs")

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            eps=self.optimizer_eps,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=self.optimizer_lr,
            decay_lr=self.scheduler_decay_lr,
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
        )

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.sizes.horizon))

    @property
    def reward_delta_indices(self) -> None:
        return None
