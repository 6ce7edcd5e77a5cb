"""`pi05 push`: a run's policy, or a dataset that `pi05 collect` wrote, to the Hugging Face Hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, RepoCard

from pi05_lightning.data.attempts import COLLECTED
from pi05_lightning.evaluation.report.card import (
    FILMS,
    RUN_CONFIG,
    card_sections,
    published_config,
    results_of,
    run_of_robot,
    with_names_alone,
)
from pi05_lightning.evaluation.report.page import poster
from pi05_lightning.evaluation.report.run import METRICS, ROLLOUT, read_run
from pi05_lightning.files.hub import check_repo, publish
from pi05_lightning.files.local import check_new, read_json, write_json, write_text
from pi05_lightning.training.run_directory import CONFIG, is_run
from pi05_lightning.weights.base import Weights
from pi05_lightning.weights.locate import locate, run_of
from pi05_lightning.weights.published import CARD, Licence, publish_policy, save_published
from pi05_lightning.weights.training_checkpoint import TrainingCheckpoint

LEROBOT, IMAGES = Path("meta", "info.json"), Path("dataset_dict.json")
"""What a folder has that is a LeRobot dataset, and one of `datasets`."""
OF_DATASETS = ("data/*", "meta/*", "videos/*")
"""What an earlier push may have written of a dataset; one that has no videos any more would keep the old ones."""


def push(
    source: Path,
    repo: str,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    out: Path | None = None,
    robot: str | None = None,
    averaged: bool = True,
    base: str | None = None,
    tokenizer: str | None = None,
) -> None:
    """Publish a run's policy with a card that says what it is, or a dataset.

    Args:
        source: a run, a checkpoint or a folder of weights; or a dataset of `pi05 collect`: its robot or its web folder.
        repo: where to, as user/name. It is made if there is none.
        license: an identifier of the Hub's, such as apache-2.0, for the card; or `other`, with the next two.
        license_name: of a licence that the Hub has no identifier for.
        license_link: where its text is.
        private: make the repository private, where it is made.
        dry_run: send nothing, and show the files and the card.
        out: keep what is published in this folder too; it must not exist.
        robot: publish the policy as this one of its robots alone.
        averaged: of a training checkpoint, take the averaged weights if it has them.
        base: of a checkpoint of adapters: a path or Hub id of the weights that they stand beside, if they moved.
        tokenizer: of a LeRobot or openpi folder: the local folder of PaliGemma's tokenizer.

    Raises ValueError for what cannot be published, and where the Hub refuses or cannot be reached: readers see all of
    a push or nothing of it.
    """
    if not source.exists() and (is_run(Path(repo)) or (Path(repo) / LEROBOT).is_file()):
        raise ValueError(f"there is no {source}, and {repo} is here: name what is pushed first, and then user/name")
    check_repo(repo)
    licence = Licence(license, license_name, license_link)
    if out is not None:
        check_new(out, "--out")
    tag = None
    of_a_policy = {"--robot": robot, "--base": base, "--tokenizer": tokenizer, "--averaged false": not averaged}
    with TemporaryDirectory() as made:
        folder = Path(made)
        kind: Literal["model", "dataset"] = "dataset"
        if (source / "robot" / LEROBOT).is_file():
            raise ValueError(
                f"{source} holds two datasets: push {source / 'robot'} and {source / 'web'}, each by itself"
            )
        is_dataset = (source / LEROBOT).is_file() or (source / IMAGES).is_file()
        if is_dataset and (given := [option for option, value in of_a_policy.items() if value]):
            raise ValueError(f"{given[0]} is for policies, and {source} is a dataset: leave it out")
        if (source / LEROBOT).is_file():
            tag = lerobot_dataset(source, folder, repo, licence)
        elif (source / IMAGES).is_file():
            image_dataset(source, folder, repo, licence)
        else:
            kind = "model"
            policy(source, folder, repo, licence, robot=robot, averaged=averaged, base=base, tokenizer=tokenizer)
        print("\n".join(listing(folder)))
        if dry_run:
            print(f"\n{(folder / CARD).read_text(encoding='utf-8')}\nnothing was sent")
        elif kind == "model":
            print(f"pushed: {publish_policy(folder, repo, private)}")
        else:
            print(f"pushed: {publish(folder, repo, kind, private, tag, replaced=OF_DATASETS)}")
        if out is not None:
            shutil.copytree(folder, out)
        stated = RepoCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict().get("license")
    if stated is None:
        print("No licence is stated: --license apache-2.0 (or another identifier of the Hub's) says who may use it.")


def listing(folder: Path) -> Iterator[str]:
    """The files of a folder and their sizes."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield f"{file.stat().st_size:>12,}  {file.relative_to(folder)}"


# --- policies


def policy(source: Path, folder: Path, repo: str, licence: Licence, robot: str | None = None, **options: Any) -> None:
    """Write what is published of a policy; of a run's, with its results, films and configuration."""
    weights = locate(source, **options)
    processor = weights.processor()
    robots = processor.robots
    processor.keep_robot(robot)
    sections: dict[str, str] = {}
    results: list[EvalResult] = []
    begun = None
    home = run_of(weights.path)
    if is_run(home) and (home / CONFIG).is_file():
        run, published = read_run(home), weights.content_hash()
        if run.metrics and run.measured.get("sha256") != published:
            mend = how_to_measure(source, weights, run.measured.get("sha256"))
            print(f"{home / METRICS} is not known to be of these weights, and is left out: {mend}")
            run = replace(run, metrics={}, questions={})
        if run.success and run.rollout.get("sha256") != published:
            print(f"{home / ROLLOUT} is of other weights, so its success and films are left out: roll these out first")
            run = replace(run, videos=[], rollout={})
        if robot is not None:
            run = run_of_robot(run, robot, {name for name, of in robots.items() if (of.same_as or name) != robot})
        if damaged := [film for film in run.videos if not poster(film)]:
            print(f"left out, as they cannot be read: {', '.join(map(str, damaged))}: `pi05 rollout` makes them anew")
            run = replace(run, videos=[film for film in run.videos if film not in damaged])
        if run.videos:
            (folder / FILMS).mkdir()
        for film in run.videos:
            shutil.copyfile(film, folder / FILMS / film.name)
        write_text(folder / RUN_CONFIG, yaml.safe_dump(published_config(run), sort_keys=False))
        sections, results = card_sections(run, repo), results_of(run)
        begun = run.provenance.get("hub", {}).get("init_from")  # the name alone may be a folder's elsewhere
    save_published(folder, repo, weights.model(), processor, weights.trained, licence, sections, results, begun)


def how_to_measure(source: Path, weights: Weights, measured: str | None) -> str:
    """What to do for metrics of weights, where those that were measured have another hash."""
    if (
        not isinstance(weights, TrainingCheckpoint)
        or TrainingCheckpoint(weights.path, not weights.averaged).content_hash() != measured
    ):
        return "run `pi05 validate` first"
    found, validate, push = (
        ("as they were trained", "true", "with") if weights.averaged else ("that are averaged", "false", "without")
    )
    return (
        f"it is of the checkpoint's weights {found}. Run `pi05 validate {source} --ema.validate {validate}` first, or"
        f" push {push} --averaged false"
    )


# --- datasets


def lerobot_dataset(source: Path, folder: Path, repo: str, licence: Licence) -> str:
    """Put a LeRobot dataset into a folder, with LeRobot's card; returns the tag by which LeRobot asks for it."""
    from lerobot.datasets.io_utils import load_info
    from lerobot.datasets.utils import create_lerobot_dataset_card

    # caches are left out; files are not copied, as they may be many gigabytes
    hidden = shutil.ignore_patterns(".*")
    shutil.copytree(source.resolve(), folder, copy_function=os.symlink, ignore=hidden, dirs_exist_ok=True)
    if (folder / COLLECTED).exists():
        about = with_names_alone(read_json(folder / COLLECTED))
        (folder / COLLECTED).unlink()  # a link to the dataset's own
        write_json(folder / COLLECTED, about)
    is_new = not (folder / CARD).exists()
    if is_new:
        shown = licence.name or licence.id
        card: RepoCard = create_lerobot_dataset_card(["pi05_lightning"], load_info(source), license=shown, repo_id=repo)
    else:
        card = RepoCard.load(folder / CARD, ignore_metadata_errors=True)
    if is_new or licence.metadata:
        for name in ("license", "license_name", "license_link"):
            setattr(card.data, name, licence.metadata.get(name))
        (folder / CARD).unlink(missing_ok=True)  # a link to the dataset's own
        write_text(folder / CARD, str(card))
    return read_json(source / LEROBOT)["codebase_version"]


def image_dataset(source: Path, folder: Path, repo: str, licence: Licence) -> None:
    """Write single images with text as parquet files, which `datasets` and the Hub's viewer read, with a card."""
    from datasets import load_from_disk
    from huggingface_hub import DatasetCardData

    for split, rows in load_from_disk(source).items():
        (folder / "data").mkdir(exist_ok=True)
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    about = DatasetCardData(**licence.metadata, task_categories=["visual-question-answering"], tags=["pi05_lightning"])
    text = f"---\n{about.to_yaml()}\n---\n\n# {repo.partition('/')[2]}\n\nSingle images with captions and questions.\n"
    write_text(folder / CARD, text)
