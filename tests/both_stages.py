"""A short training through both stages, of the recorded dataset `videos` as the source `robot`."""

from __future__ import annotations

from pi05_lightning.recipe import LossWeights, StageOptions

PRETRAIN_STEPS, POSTTRAIN_STEPS = 3, 3
STAGES = {
    "pretrain": StageOptions(LossWeights(text=1, subtask=1), {"robot/qa": 0.5, "robot/hl_subtask": 0.5}),
    "posttrain": StageOptions(LossWeights(subtask=1, flow=1), {"robot/continuous_robot_actions": 1.0}),
}
