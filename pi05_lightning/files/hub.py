"""Names of the Hugging Face Hub, wherever a folder of weights or of a tokenizer is asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

import httpx

from pi05_lightning.files.local import first_line, shown

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FAILURES = (OSError, ValueError, RuntimeError, httpx.HTTPError)
FILES = ("*.json", "*.safetensors", "*.model")
"""All that is downloaded: nothing of it can execute code."""
TOKENIZER = ("*.json", "*.model")
"""What of it a tokenizer is in: PaliGemma's stands beside weights of many gigabytes."""


def is_hub_id(name: str | Path) -> bool:
    """Whether a name has the form `organisation/name`, or `organisation/name@revision`."""
    repo, revision = split_revision(name)
    return _ID.fullmatch(repo) is not None and revision != ""


def split_revision(name: str | Path) -> tuple[str, str | None]:
    """The repository, and the branch, tag or commit, of `organisation/name@revision`; None without one."""
    repo, at, revision = str(name).partition("@")
    return repo, revision if at else None


def is_on_hub(name: str | Path) -> bool:
    """Whether a name stands for a repository of the Hub's: it has the form of one, and no folder here is meant."""
    path = Path(name)
    return is_hub_id(name) and not path.exists() and not path.parent.exists()


def local_folder(name: str | Path, files: Sequence[str] = FILES) -> Path:
    """The path itself; for a Hub id (see `is_hub_id`), unless there is such a folder here, where its files were put.

    files: patterns of those that are needed.
    The Hub's own cache is used, so that a second call, or one without a network, downloads nothing.
    ValueError when the Hub cannot be reached, has no such repository or does not give it to this account.
    """
    if not is_on_hub(name):
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download

    repo, revision = split_revision(name)
    download = partial(snapshot_download, repo, revision=revision, allow_patterns=list(files))
    try:
        return Path(download())
    except (OSError, ValueError, httpx.HTTPError) as error:
        with suppress(OSError, ValueError):  # a commit is asked for its files, though an older library has them here
            return Path(download(local_files_only=True))
        reason = first_line(error)
        raise ValueError(
            f"there is no folder {shown(name)}, and the Hugging Face Hub does not give one of that name ({reason}):"
            " correct the path, log in if the repository is gated, or download it elsewhere and name its folder"
        ) from error


def check_repo(name: str) -> None:
    """ValueError for what is no name of a repository."""
    if _ID.fullmatch(name) is None:
        raise ValueError(f"{name} is no name of a repository on the Hugging Face Hub: give it as user/name")


def publish(
    folder: Path,
    repo: str,
    kind: Literal["model", "dataset"] = "model",
    private: bool = False,
    tag: str | None = None,
    replaced: Sequence[str] = (),
) -> str:
    """Put a folder into a repository of the Hub, which is made if there is none; returns the commit's address.

    All files come in one commit, so readers see all of it or nothing. What a push that failed had sent is not sent
    again. Files that an earlier push wrote into a folder of this one, and that are no longer in it, go in the same
    commit; what else is in the repository stays.
    tag: what the commit is called too, in place of an earlier commit.  replaced: patterns of other files that go too,
    where they are not written again.
    ValueError when the Hub refuses or cannot be reached, and where a repository that is to be private is public.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    check_repo(repo)
    api = HfApi()
    try:
        api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        is_public = private and not api.repo_info(repo, repo_type=kind).private
    except _FAILURES as error:
        raise ValueError(_failed(repo, error)) from error
    if is_public:
        raise ValueError(f"{repo} is there already, and is public: make it private on the Hub, or leave out --private")
    try:
        commit = api.upload_folder(
            repo_id=repo,
            repo_type=kind,
            folder_path=folder,
            commit_message="Pushed by pi05_lightning",
            delete_patterns=[*replaced, *(f"{inner.name}/*" for inner in folder.iterdir() if inner.is_dir())],
        )
    except _FAILURES as error:
        raise ValueError(_failed(repo, error)) from error
    if tag is not None:
        try:
            with suppress(RevisionNotFoundError):
                api.delete_tag(repo, tag=tag, repo_type=kind)
            api.create_tag(repo, tag=tag, repo_type=kind)
        except _FAILURES as error:
            raise ValueError(
                f"the files are at {commit.commit_url}, but the tag {tag}, by which they are asked for, is not"
                f" ({_reason(error)}): run the same command again"
            ) from error
    return commit.commit_url


def _failed(repo: str, error: Exception) -> str:
    return (
        f"the push to {repo} failed ({_reason(error)}), and readers see none of it. Mend what it says, or log in with"
        " an account that may write there (hf auth login), then run the same command again: what was sent already is"
        " not sent again"
    )


def _reason(error: Exception) -> str:
    """All that the Hub said, on one line."""
    return " ".join(str(error).split())
