"""Which files of a folder are for training, validation and test, by their names, as in Hugging Face `datasets`."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from datasets.data_files import FILES_TO_IGNORE

from pi05_lightning.data.split import NAMES, Split

_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json"}

log = logging.getLogger(__name__)


def files_by_part(local: Path, where: str, tell: bool, are_given: bool) -> tuple[dict[str, list[Path]], str]:
    """The files by part, as far as their names say which, and the builder in `datasets` that reads them.

    where: the dataset, in words.  tell: warn of files that are not read, or that may be kept from training by mistake.
    are_given: the user said which parts are for what.  Raises ValueError where there is no file to read.
    """
    files = [local] if local.is_file() else sorted(local.rglob("*"))
    files = [file for file in files if file.name not in FILES_TO_IGNORE and not file.match("cache-*.arrow")]
    by_suffix = {suffix: [file for file in files if file.suffix == suffix] for suffix in _FORMATS}
    found = {suffix: several for suffix, several in by_suffix.items() if several}
    if not found:
        raise ValueError(f"{local} holds neither a dataset saved by `datasets` nor {', '.join(_FORMATS)} files")
    (suffix, read), *others = found.items()
    named = {file: (None, True) if file == local else _part_of(file.relative_to(local)) for file in read}
    if tell:
        for other, unread in others:
            log.warning(
                "%s: its %s files are read, and the %s files, as %s, are not: keep one format in the folder",
                where,
                suffix,
                other,
                unread[0].relative_to(local),
            )
        held = [file for file, (part, is_plain) in named.items() if part not in (None, "train") and not is_plain]
        known = {part for part, _ in named.values()}
        if held and not are_given and "train" not in known:
            log.warning(
                "%s: by a word in its name %s is for %s, and so %d of %d files are not for training. If they are to be,"
                " rename them, or set parts: {train: %s}",
                where,
                held[0].relative_to(local),
                named[held[0]][0],
                len(held),
                len(read),
                "+".join(sorted({part or "train" for part in known & {None, *(named[file][0] for file in held)}})),
            )
    parts: dict[str, list[Path]] = {}
    for file, (part, _) in named.items():
        parts.setdefault(part or "train", []).append(file)
    return parts, _FORMATS[suffix]


def _part_of(file: Path) -> tuple[Split | None, bool]:
    """What a file's name or a folder's says that it is for, and whether that is all it says.

    The file's own comes before its folders', and what says nothing else before a word among others: of these, as in
    `datasets`, a folder's before the file's, and the last one.
    """
    name, *folders = [_words(place) for place in reversed(file.with_suffix("").parts)]
    known = {word: part for part, words in NAMES.items() for word in words}
    for words in (name, *folders):
        if words and known.keys() >= {*words}:
            return known[words[-1]], True
    for words in (*folders, name):
        if found := [known[word] for word in words if word in known]:
            return found[-1], False
    return None, False


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[-._ 0-9]+", name.lower()) if word not in ("", "of")]
