"""The configurations that come with this package: configs/ and experiments/ of the repository.

A name is a path from the working directory first.
"""

from __future__ import annotations

from pathlib import Path

from pi05_lightning.files.local import shown

PACKAGE = Path(__file__).parents[1]
# an installed package carries both folders inside it; in a checkout they stand beside it
ROOT = PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent


def shipped_configs() -> list[str]:
    """Their names, such as `configs/tiny.yaml`."""
    files = (*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("experiments/*/config.yaml"))
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def shipped_models() -> list[str]:
    """The names of the model sizes."""
    return sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml"))


def find_config(name: str) -> Path:
    """The file at this path where there is one, else the shipped configuration of that name.

    Raises ValueError with the names of those that are shipped.
    """
    for file in (Path(name), ROOT / name):
        if file.is_file():
            return file
    raise ValueError(
        f"there is no file {name}; shipped are {', '.join(shipped_configs())}. Looked for it in {Path.cwd()}"
    )


def find_model(name: str) -> Path:
    """The file of a model's dimensions: of a shipped size by its name, such as `tiny`, else as `find_config`.

    Raises ValueError with the names of those that are shipped.
    """
    sizes = shipped_models()
    if name in sizes:
        return ROOT / "configs" / "model" / f"{name}.yaml"
    try:
        return find_config(name)
    except ValueError:
        raise ValueError(
            f"there is no model {name!r} and no file {shown(name)}; shipped models are {', '.join(sizes)}"
        ) from None
