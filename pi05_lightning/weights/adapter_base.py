"""The base that a checkpoint of adapters leaves out: named by its content, found again, and no other taken for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from pi05_lightning.files.hub import split_revision
from pi05_lightning.files.local import first_line
from pi05_lightning.weights.base import Weights


@dataclass(frozen=True)
class AdapterBase:
    """What a checkpoint says of its base.

    sha256: its `Weights.content_hash`.  place: where it was, an absolute path or a Hub id with its commit.  run: the
    directory of the run that it was used in, absolute.  dtype: what its tensors were cast to as they were read, such as
    `bfloat16`.
    """

    sha256: str
    place: str
    run: str
    dtype: str

    def places(self, run: Path, given: str | Path | None = None) -> list[str]:
        """Where it may be: where a user says; where it was; beside the run's directory of today, if both were moved.

        A repository of the Hub's without a revision says no more than where it was, which is a commit.
        """
        is_vague = given is None or str(given) == split_revision(self.place)[0]
        found = [self.place] if is_vague else [str(given), self.place]
        if Path(self.place).is_absolute():
            found.append(os.path.normpath(run.absolute() / os.path.relpath(self.place, self.run)))
        return list(dict.fromkeys(found))

    def find(self, places: Iterable[str], locate: Callable[[str], Weights]) -> tuple[AdapterBase, Weights]:
        """The weights at the first of some places that has this content, and this base with that place's name.

        ValueError that says what is at each.
        """
        seen = []
        for place in places:
            try:
                weights = locate(place)
                sha256 = weights.content_hash()
            except ValueError as error:
                seen.append(f"{place}: {first_line(error)}")
                continue
            if sha256 == self.sha256:
                return replace(self, place=place_of(place, weights)), weights
            seen.append(f"{place} has other weights: {sha256}")
        raise ValueError(
            "\n  ".join([f"the adapters' base is not found, weights with the SHA-256 {self.sha256}:", *seen])
            + "\n  Say where it is now: --model.init_from (fit, validate, test, predict), --base (check, convert,"
            " export, play, push, rollout, serve), base= (Pi05Policy); or put it back where it was"
        )

    def is_at(self, name: str | None) -> bool:
        """Whether it was found where a name says."""
        if name is None or not Path(name).exists():
            return name in (self.place, split_revision(self.place)[0])
        return any(Path(self.place).is_relative_to(path) for path in (Path(name).absolute(), unlinked(name).absolute()))


def unlinked(path: str | Path) -> Path:
    """The file beside a link that it names, as `last.ckpt` does another one in an hour; else the path itself."""
    path = Path(path)
    return path.parent / path.readlink() if path.is_symlink() and len(path.readlink().parts) == 1 else path


def place_of(name: str, weights: Weights) -> str:
    """What a checkpoint remembers of where weights were found by a name: their absolute path, or the commit on the Hub.

    The path is that of the file itself, as a run that trains has `last.ckpt` name others. The Hub's cache names a
    snapshot's folder by its commit.
    """
    if Path(name).exists():
        return str(unlinked(weights.path).absolute())
    return f"{split_revision(name)[0]}@{weights.path.name}"
