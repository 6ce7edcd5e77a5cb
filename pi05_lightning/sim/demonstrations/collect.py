"""Records demonstrations of a simulator's scripted experts as a LeRobot v3 dataset, with language."""

from __future__ import annotations

import logging
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pi05_lightning.files.cores import available_cores
from pi05_lightning.files.local import LOCK, held
from pi05_lightning.sim.demonstrations.config import CollectConfig, Piece
from pi05_lightning.sim.demonstrations.episodes import Block, Episode, record_block
from pi05_lightning.sim.demonstrations.kept import KEPT, Kept
from pi05_lightning.sim.demonstrations.scenes import record_scenes, write_scenes
from pi05_lightning.sim.environment import check_tasks
from pi05_lightning.sim.processes import simulator_processes

ROBOT, WEB = "robot", "web"
_BLOCK_SIZE = 25  # initial states in a piece of work: some seconds

log = logging.getLogger(__name__)


def collect(config: CollectConfig) -> Path:
    """Make the dataset and return its directory.

    `out/robot` is a LeRobot v3 dataset: training episodes first, then validation episodes (`splits` in its
    `meta/info.json`). `out/web` holds single frames with captions and questions, for `datasets.load_from_disk`.

    All is written to `.<name>.partial` beside `out` and moved at the end, so `out` is whole or not there. Where it ends
    before, what was recorded stays there, and the same collection goes on from it.
    Raises FileExistsError when `out` exists and `overwrite` is off or it is something else, ValueError on unknown
    tasks or cameras, when an expert fails too often, and while another process makes the same `out`.
    """
    if config.policy is None:
        check_tasks(config.expert_env, config.recorded)
    out, partial, replaced = config.out, _beside(config.out, "partial"), _beside(config.out, "replaced")
    with held(partial, f"pi05 collect writes to {out}"):
        _restore(out, replaced)
        try:
            _check_free(out, config.overwrite)
        except FileExistsError:
            if [entry.name for entry in partial.iterdir()] == [LOCK]:  # no interrupted one waits there
                shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)  # of a collect that was killed at its very end
        try:
            if config.policy is None:
                _make(partial, config)
            else:  # slow to import, and experts need no model
                from pi05_lightning.sim.demonstrations.autonomous import record_policy

                record_policy(partial / ROBOT, config)
            if out.exists():
                out.rename(replaced)
            partial.rename(out)
            shutil.rmtree(out / KEPT)
            (out / LOCK).unlink(missing_ok=True)
        except BaseException:  # a mistake too: what was recorded before it was made is no part of it
            if any((partial / KEPT).glob("*.pickle")):
                log.warning("what was recorded is kept in %s: the same command goes on from there", partial)
            else:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            _restore(out, replaced)
            shutil.rmtree(replaced, ignore_errors=True)
    return out


def _check_free(out: Path, overwrite: bool) -> None:
    """FileExistsError for a place where no dataset may be put."""
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} already exists. Delete it, choose another out, or set overwrite: true.")
    if out.exists() and not (out / ROBOT / "meta" / "info.json").exists():
        raise FileExistsError(f"{out} is not a dataset of pi05 collect, so it is not overwritten: choose another out.")


def _restore(out: Path, replaced: Path) -> None:
    """Put back a dataset that was moved aside for one that did not come."""
    if replaced.exists() and not out.exists():
        replaced.rename(out)


def _beside(out: Path, purpose: str) -> Path:
    return out.with_name(f".{out.name}.{purpose}")


def _make(root: Path, config: CollectConfig) -> None:
    episodes = {"train": config.episodes, "val": config.val_episodes}
    scenes = {"train": config.scenes, "val": -(-config.scenes // 10)}
    kept = Kept(root / ROBOT, config.spelled_out)
    with simulator_processes(config.num_workers or available_cores(), config.env.warm_up) as pool:
        from pi05_lightning.sim.demonstrations.lerobot_writer import (  # slow: while the workers import theirs
            Recording,
            video_path,
            write_dataset,
        )

        blocks: list[Block] = []
        for split, task, first, count in _pieces(config.recorded, episodes):
            videos = {camera: video_path(kept.folder, camera, len(blocks)) for camera in config.view.cameras}
            blocks.append(Block(config, task, split, first, count, videos))
        pictures = [Piece(config, task, split, *rest) for split, task, *rest in _pieces(config.recorded, scenes)]
        total = sum(spec.count for spec in blocks) + sum(spec.count for spec in pictures)
        with tqdm(total=total, unit=" initial states") as bar:
            arm = config.expert_env
            names = arm.state_names, arm.action_names, arm.robot
            what = Recording(config.out.name, config.view.cameras, config.image_size, config.fps, *names)
            failed = Counter[str]()

            def recorded() -> Iterator[tuple[str, list[Episode]]]:
                results = kept.continued("episodes", lambda done: _run(pool, record_block, blocks[done:]))
                for spec, (episodes, failures) in zip(blocks, results, strict=True):
                    bar.update(spec.count)
                    failed[spec.task] += failures
                    yield spec.split, episodes

            write_dataset(root / ROBOT, what, recorded())
            rows: dict[str, list[dict[str, Any]]] = {split: [] for split in scenes}
            results = kept.continued("scenes", lambda done: _run(pool, record_scenes, pictures[done:]))
            for spec, made in zip(pictures, results, strict=True):
                bar.update(spec.count)
                rows[spec.split] += made
            if pictures:
                write_scenes(root / WEB, rows)
    if failed.total():
        wanted = config.episodes + config.val_episodes
        said = ", ".join(f"{task} {count} of {wanted + count}" for task, count in failed.most_common() if count)
        log.warning("episodes in which the expert failed, replaced by other initial states: %s", said)


def _pieces(tasks: Iterable[str], counts: dict[str, int]) -> Iterator[tuple[str, str, int, int]]:
    """(split, task, first, count) of every piece of work, in the order of the dataset."""
    for split, total in counts.items():
        for task in tasks:
            for first in range(0, total, _BLOCK_SIZE):
                yield split, task, first, min(_BLOCK_SIZE, total - first)


def _run[Spec: Piece, Result](
    pool: ProcessPoolExecutor, function: Callable[[Spec], Result], specs: Iterable[Spec], ahead: int = 64
) -> Iterator[Result]:
    """Results in order; a few pieces ahead of what is taken, so that memory does not grow with the dataset."""
    pending: deque[Future[Result]] = deque()

    def finish() -> Result:
        try:
            return pending.popleft().result()
        except ValueError as error:  # its traceback is of another process
            raise ValueError(str(error)) from error

    for spec in specs:
        pending.append(pool.submit(function, spec))
        if len(pending) > ahead:
            yield finish()
    while pending:
        yield finish()
