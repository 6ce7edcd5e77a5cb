"""Single frames with captions and questions: where things are, without anybody having to do anything with them.

A frame costs a tenth of an episode, and what a policy most needs from pre-training is to find things in images
it has not seen. Rows are flat, as captioning and question-answering sets on the hub have them.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pi05_lightning.sim import questions
from pi05_lightning.sim.config import CollectConfig
from pi05_lightning.sim.metaworld import SEEDS_PER_SPLIT, MetaWorldEnv, split_seeds
from pi05_lightning.types import Modality

FRAMES_PER_SCENE = 4
QUESTIONS_PER_FRAME = 2
_MOVE_STEPS = 20  # control steps towards a random place, 20 cm at most
_FIRST_SCENE = SEEDS_PER_SPLIT // 2  # the split's episodes count from 0


@dataclass(frozen=True)
class SceneSpec:
    """`count` initial states of a split of a task, from the `first` on."""

    config: CollectConfig
    task: str
    split: str
    first: int
    count: int


def record_scenes(spec: SceneSpec) -> list[dict[str, Any]]:
    """Rows of image (PNG bytes), camera, task, kind, caption | question and answer; cameras take turns."""
    config, rows = spec.config, []
    with MetaWorldEnv(spec.task, config.image_size, config.cameras, config.action_repeat) as env:
        for seed in split_seeds(spec.split, spec.count, config.seed, start=_FIRST_SCENE + spec.first):
            rng = np.random.default_rng([seed, zlib.crc32(env.task.encode())])
            env.reset(seed)
            for number in range(FRAMES_PER_SCENE):
                _move_anywhere(env, rng)
                rows += _rows(env, env.cameras[number % len(env.cameras)], rng)
    return rows


def write_scenes(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One parquet file that `datasets.load_dataset("parquet", …)` opens with decoded images."""
    import datasets

    text = datasets.Value("string")
    features = datasets.Features(
        image=datasets.Image(), camera=text, task=text, kind=text, caption=text, question=text, answer=text
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(list(rows), features=features).to_parquet(str(path))


def _move_anywhere(env: MetaWorldEnv, rng: np.random.Generator) -> None:
    low, high = env.workspace
    target, effort = rng.uniform(low, high), rng.choice([-1.0, 1.0])
    for _ in range(_MOVE_STEPS):
        env.control_step(np.append(10.0 * (target - env.state[:3]), effort))


def _rows(env: MetaWorldEnv, camera: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    boxes = env.boxes([camera])[camera]
    asked = questions.answers(env, [camera])
    chosen: Sequence[int] = rng.permutation(len(asked))[:QUESTIONS_PER_FRAME]
    buffer = io.BytesIO()
    Image.fromarray(env.render([camera])[camera].transpose(1, 2, 0)).save(buffer, "PNG")
    row = {"image": {"bytes": buffer.getvalue()}, "camera": camera, "task": env.language.sentence}
    row |= {"kind": str(Modality.WEB_CAPTION), "caption": questions.caption(boxes), "question": None, "answer": None}
    qa = [{"question": asked[i].question, "answer": asked[i].answer} for i in chosen]
    return [row, *(row | {"kind": str(Modality.QA), "caption": None} | pair for pair in qa)]
