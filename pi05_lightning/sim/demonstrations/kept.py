"""A collection on its way: what is recorded is kept in a folder, so that an interrupted one goes on."""

from __future__ import annotations

import logging
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pi05_lightning.files.local import LOCK, replacing
from pi05_lightning.sim.demonstrations.config import CollectConfig
from pi05_lightning.sim.unfinished import claim, versions

KEPT = ".kept"
_FILMS = "videos"
_CHANGE_NOTHING = {"out", "num_workers", "lanes", "overwrite"}  # of what is recorded

log = logging.getLogger(__name__)


class Kept:
    """What is recorded, piece by piece, beside a LeRobot dataset `root` that is written anew from it.

    Whatever else is in the folder of `root` is removed.  config: with what its defaults come to, and paths that are
    spelled in one way.  policy_hash: of the weights of a policy that is recorded.
    """

    def __init__(self, root: Path, config: CollectConfig, policy_hash: str | None = None) -> None:
        self.root, self.folder = root, root.with_name(KEPT)
        self.folder.mkdir(exist_ok=True)
        options = {name: str(value) for name, value in vars(config).items() if name not in _CHANGE_NOTHING}
        if claim(self.folder, {**options, "weights": policy_hash, **versions(config.env)}):
            if (root / _FILMS).exists():
                (root / _FILMS).rename(self.folder / _FILMS)
            log.info("going on with what is in %s", self.folder)
        for left in root.parent.iterdir():
            if left != self.folder and left.name != LOCK:
                shutil.rmtree(left)

    def continued[Result](self, name: str, make: Callable[[int], Iterable[Result]]) -> Iterator[Result]:
        """The results that were kept, in order, and then those of `make(number of the kept)`, which are kept too.

        name: of this kind of results.  Films belong under `folder`, and are moved to the dataset after the last result.
        """
        done = 0
        while (file := self._file(name, done)).exists():
            yield pickle.loads(file.read_bytes())
            done += 1
        for number, result in enumerate(make(done), start=done):
            with replacing(self._file(name, number)) as part:
                part.write_bytes(pickle.dumps(result))
            yield result
        if (self.folder / _FILMS).exists():
            (self.folder / _FILMS).rename(self.root / _FILMS)

    def _file(self, name: str, number: int) -> Path:
        return self.folder / f"{name}-{number}.pickle"
