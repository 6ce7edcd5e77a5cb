"""`pi05 value label`: advantages and their signs as a column file beside each dataset, of which nothing changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from pi05_lightning.data.columns import evenly_spaced
from pi05_lightning.evaluation.report.tables import table_of
from pi05_lightning.experience.calibration import film, histograms
from pi05_lightning.experience.labelling import Judged, check_shares, judge, labels_paths
from pi05_lightning.experience.page import PageSection, write_page
from pi05_lightning.experience.reading import Reading
from pi05_lightning.experience.value import ValueFunction, datasets_of
from pi05_lightning.files.local import check_writable
from pi05_lightning.weights.locate import run_of

STRIP = 8  # images of a film


def value_label(
    value: Path,
    rollouts: tuple[str, ...] = (),
    demonstrations: tuple[str, ...] = (),
    n_steps: int | None = None,
    n_seconds: float | None = None,
    positive_share: float = 0.3,
    positive_shares: dict[str, float] | None = None,
    out: Path | None = None,
    device: str = "cpu",
) -> dict[str, str]:
    """Write of every frame of datasets of attempts how much better it went from there than the value expected.

    Args:
        value: run of `pi05 value fit`.
        rollouts: LeRobot datasets of attempts that say how they ended. Corrections in them are always positive.
        demonstrations: LeRobot datasets whose episodes all succeeded, if they are to be judged too. A source whose
            frames are positive throughout needs no file: `labels: positive`.
        n_steps: frames after which the value stands for the rest of the episode; by default none: the whole return.
        n_seconds: the same in time.
        positive_share: of each task's frames; the threshold is this quantile of their advantages.
        positive_shares: others, by the task's instruction.
        out: folder of the labels and of labels.html; by default each beside its dataset, as NAME.labels.parquet.
        device: where the value runs.

    Returns {dataset: its labels}, which a source takes as `labels`.
    Raises ValueError where nothing says how an episode ended, for another rate than the value's, and for a task in
    which no frame is better than another.
    """
    if out is not None:
        check_writable(out, "--out")
    datasets, judge_of = datasets_of(rollouts, demonstrations), ValueFunction(value, device)
    if judge_of.fps != datasets[0].files.fps:
        raise ValueError(
            f"{datasets[0].path} has {datasets[0].files.fps:g} frames per second, and {value} was fitted on"
            f" {judge_of.fps:g}: returns count frames, so fit a value on data of this rate"
        )
    reading = Reading.of(value)
    n_steps = frames_ahead(n_steps, n_seconds, datasets[0].files.fps)
    shares = positive_shares or {}
    # what is wrong shows before the values are computed
    check_shares(positive_share, shares, judge_of.longest)
    paths = labels_paths([one.files.root for one in datasets], out)
    for path in paths if out is None else []:
        check_writable(path.parent, "--out")
    for dataset in datasets:
        dataset.scale(judge_of.longest)
    values = [judge_of.everywhere(one, reading.options(one.path, datasets[0].path, one.collected)) for one in datasets]
    judged, thresholds = judge(datasets, values, judge_of.longest, judge_of.c_fail, n_steps, shares, positive_share)
    about = {
        "value": str(run_of(value.resolve())),
        "sha256": judge_of.sha256,
        "n_steps": n_steps,
        "thresholds": thresholds,
        "positive_share": positive_share,
        "positive_shares": shares,
    }
    table = table_of("positive frames", ["dataset", "labels"], ["frames", "positive"])
    written = {}
    for one, path in zip(judged, paths, strict=True):
        one.labels(about).write(path, one.dataset.files)
        written[one.dataset.path] = str(path)
        table.add_row(
            escape(one.dataset.path), escape(str(path)), str(len(one.positive)), f"{100 * one.positive.mean():.0f} %"
        )
    page = (out or Path(next(iter(written.values()))).parent) / "labels.html"
    sections = [histogram_section(judged, thresholds), *film_sections(judge_of, judged, reading)]
    write_page(page, f"Labels of the value {value}", sections)
    Console().print(table, f"page {page}", highlight=False)
    return written


def frames_ahead(n_steps: int | None, n_seconds: float | None, fps: float) -> int | None:
    """Frames after which the value stands for the rest of an episode, however that is said; None for never."""
    if n_seconds is not None:
        if n_steps is not None:
            raise ValueError("give n_steps or n_seconds, not both")
        n_steps = round(n_seconds * fps)
    if n_steps is not None and n_steps < 1:
        raise ValueError(f"n_steps: {n_steps} frames are no time: give more, or leave it out")
    return n_steps


def histogram_section(judged: list[Judged], thresholds: dict[str, float]) -> PageSection:
    """The advantages of every task that has a threshold."""
    found = {
        task: np.concatenate(
            [one.advantage[(one.dataset.attempts.task == task) & ~one.dataset.attempts.intervention] for one in judged]
        )
        for task in thresholds
    }
    rows = [["task", "threshold", "frames"], *([t, f"{thresholds[t]:.4f}", str(len(a))] for t, a in found.items())]
    figures = [histograms(found, thresholds)] if found else []  # of corrections alone there is none
    return PageSection("Advantages and thresholds", rows=rows, figures=figures)


def film_sections(value: ValueFunction, judged: list[Judged], reading: Reading) -> list[PageSection]:
    """V over the frames of a success and of a failure, of the first dataset of attempts that has them."""
    sections, first = [], judged[0].dataset
    for ended, heading in ((True, "A success"), (False, "A failure")):
        for one in judged:
            attempts = one.dataset.attempts
            options = reading.options(
                one.dataset.path, first.path, one.dataset.collected, not one.dataset.demonstrations
            )
            source = value.opened(one.dataset, "train", options)
            shown = np.isin(attempts.episode, source.episode) & (attempts.success == ended)
            if one.dataset.demonstrations or not shown.any() or not source.camera_names:
                continue
            episode = attempts.episode[int(np.argmax(shown))]
            own, rows = attempts.episode == episode, np.flatnonzero(source.episode == episode)
            frames = [source[int(row)] for row in rows[evenly_spaced(len(rows), STRIP)]]
            images = [next(iter(frame.images.values())) for frame in frames]
            title = f"{frames[0].task}, episode {episode}"
            figure = film(one.value[own], one.positive[own], images, title)
            sections.append(PageSection(heading, [one.dataset.path], figures=[figure]))
            break
    return sections
