"""Single frames with captions and questions: where things are, without anybody having to do anything with them.

A frame costs a twentieth of an episode, and what a policy most needs from pre-training is to find things in images
it has not seen. A row is an image with its caption and all its questions.
"""

from __future__ import annotations

import io
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

from pi05_lightning.sim.demonstrations import questions
from pi05_lightning.sim.demonstrations.beginning import begin
from pi05_lightning.sim.demonstrations.config import Piece
from pi05_lightning.sim.environment import Demonstrator
from pi05_lightning.sim.splits import SEEDS_PER_SPLIT, rng_of, split_seeds

FRAMES_PER_SCENE = 4
_FIRST_SCENE = SEEDS_PER_SPLIT // 2  # the split's episodes count from 0, and a policy's attempts from 3/4 on


def record_scenes(piece: Piece) -> list[dict[str, Any]]:
    """Rows of image (PNG bytes), camera, task, caption, question and answer (lists); the cameras take turns.

    Images of which there is nothing to say are left out.
    """
    config, rows = piece.config, []
    with closing(config.expert_env.open(piece.task, config.view)) as env:
        for seed in split_seeds(piece.split, piece.count, config.seed, start=_FIRST_SCENE + piece.first):
            rng = rng_of(env.task, seed)
            begin(env, seed, config.continued_share)
            for number in range(FRAMES_PER_SCENE):
                env.place_hand(rng.uniform(*env.workspace), effort=rng.choice([-1.0, 1.0]))
                row = _row(env, env.cameras[number % len(env.cameras)])
                rows += [row] if row["caption"] or row["question"] else []
    return rows


def write_scenes(path: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    """A folder that `datasets.load_from_disk` opens, one part per split."""
    import datasets

    text, texts = datasets.Value("string"), datasets.List(datasets.Value("string"))
    features = datasets.Features(
        image=datasets.Image(), camera=text, task=text, caption=text, question=texts, answer=texts
    )
    parts = {split: datasets.Dataset.from_list(rows, features=features) for split, rows in splits.items() if rows}
    datasets.disable_progress_bars()
    datasets.DatasetDict(parts).save_to_disk(path)
    datasets.enable_progress_bars()


def _row(env: Demonstrator, camera: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(env.render([camera])[camera].transpose(1, 2, 0)).save(buffer, "PNG")
    boxes = env.boxes([camera])
    asked = questions.answers(env, boxes)
    return {
        "image": {"bytes": buffer.getvalue()},
        "camera": camera,
        "task": env.sentence,
        "caption": questions.caption(boxes[camera]),
        "question": [answer.question for answer in asked],
        "answer": [answer.answer for answer in asked],
    }
