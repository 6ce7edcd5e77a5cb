"""Where a LeRobot dataset is: a folder, LeRobot's copy of one on the Hub, or a download of it."""

from __future__ import annotations

from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from pi05_lightning.files.hub import is_hub_id, split_revision
from pi05_lightning.files.local import first_line, shown


def find_dataset(path: str, local_only: bool = False) -> Path:
    """The folder of a dataset: `path` itself, LeRobot's copy of that Hub id, or a download of it.

    A Hub id may name a branch, a tag or a commit, as `owner/name@revision`; else it is what LeRobot would take.
    What was downloaded is found again where the Hub cannot be reached, as from a cluster's nodes.
    local_only: the Hub is not asked.
    Raises ValueError when there is neither a folder nor such a dataset on the Hub, or, `local_only`, a copy of it here.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if not is_hub_id(path):
        raise ValueError(
            f"{shown(path)}: no such folder. Name a LeRobot dataset's folder, or its Hub id as owner/name."
        )
    return _of_hub(path, local_only)


def is_download(folder: Path) -> bool:
    """Whether a dataset's folder came from the Hub, by LeRobot of now or before, and was not recorded here."""
    from lerobot.datasets.utils import has_legacy_hub_download_metadata
    from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE

    return folder.is_relative_to(HF_LEROBOT_HUB_CACHE) or has_legacy_hub_download_metadata(folder)


@cache  # the Hub is asked once, not for every part and its workers
def _of_hub(name: str, local_only: bool) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from lerobot.datasets.dataset_metadata import CODEBASE_VERSION
    from lerobot.datasets.utils import CompatibilityError, get_safe_version, has_legacy_hub_download_metadata
    from lerobot.utils.constants import HF_LEROBOT_HOME, HF_LEROBOT_HUB_CACHE

    repo, revision = split_revision(name)
    own = HF_LEROBOT_HOME / repo
    is_here = revision is None and (own / "meta" / "info.json").exists()
    if is_here and not has_legacy_hub_download_metadata(own):  # of an older LeRobot, which may be of an older version
        return own
    download = partial(snapshot_download, repo, repo_type="dataset", cache_dir=HF_LEROBOT_HUB_CACHE)

    def downloaded_before() -> Path | None:
        with suppress(OSError):
            return Path(download(revision=revision or CODEBASE_VERSION, local_files_only=True))
        return own if is_here else None

    if local_only:
        if (kept := downloaded_before()) is None:
            raise ValueError(f"{shown(name)} is no folder, and LeRobot has no dataset of that name on this machine")
        return kept
    try:
        return Path(download(revision=revision or get_safe_version(repo, CODEBASE_VERSION)))
    except (CompatibilityError, RuntimeError) as error:  # LeRobot's, of its versions on the Hub
        if is_here:
            return own
        raise ValueError(
            f"{repo} on the Hub has no version that LeRobot opens ({first_line(error)}): download it (`hf download"
            f" --repo-type dataset {repo} --local-dir FOLDER`) and name the folder, of which its format is told"
        ) from error
    except (httpx.HTTPError, OSError) as error:
        if (kept := downloaded_before()) is not None:
            return kept
        raise ValueError(
            f"{shown(name)} is no folder, and the Hub does not give it ({error}): correct the path, check the "
            "connection, or log in if it is private"
        ) from error
