"""Names of the Hugging Face Hub, wherever a folder of weights or of a tokenizer is asked for."""

from __future__ import annotations

import re
from pathlib import Path

import httpx

from pi05_lightning.files.local import shown

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FILES = ("*.json", "*.safetensors", "*.model")
"""All that is downloaded: nothing of it can execute code."""


def is_hub_id(name: str | Path) -> bool:
    """Whether a name has the form `organisation/name`."""
    return _ID.fullmatch(str(name)) is not None


def local_folder(name: str | Path, revision: str | None = None) -> Path:
    """The path itself; for `organisation/name`, unless there is such a folder here, where the Hub's files were put.

    revision: of the Hub's: a branch, a tag or a commit.
    The Hub's own cache is used, so that a second call, or one without a network, downloads nothing.
    ValueError when the Hub cannot be reached, has no such repository or does not give it to this account.
    """
    path = Path(name)
    if path.exists() or path.parent.exists() or not is_hub_id(name):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(FILES)))
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"there is no folder {shown(name)}, and the Hugging Face Hub does not give one of that name ({reason}):"
            " correct the path, log in if the repository is gated, or download it elsewhere and name its folder"
        ) from error
