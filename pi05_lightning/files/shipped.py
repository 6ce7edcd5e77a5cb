"""The configurations that come with this package: configs/ and experiments/ of the repository."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# an installed package carries both folders inside it; in a checkout they stand beside it
ROOT = PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent


def shipped_configs() -> list[str]:
    """Their names, such as `configs/tiny.yaml`."""
    files = (*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("experiments/*/config.yaml"))
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def find_config(name: str) -> Path:
    """The file at this path where there is one, else the shipped configuration of that name.

    Raises ValueError with the names of those that are shipped.
    """
    for file in (Path(name), ROOT / name):
        if file.is_file():
            return file
    raise ValueError(f"there is no file {name}; shipped are {', '.join(shipped_configs())}")
