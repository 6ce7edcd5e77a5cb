"""Lightning's CSV logger deletes the metrics.csv that it finds; a command of this package never loses one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter as CSVWriter
from lightning.pytorch.utilities import rank_zero_info


@contextmanager
def no_metrics_lost(trainer: Trainer, run: Path, command: str) -> Iterator[None]:
    """While a command runs, its CSV loggers write beside what earlier ones wrote.

    A training renames its earlier file; what measures gets a folder of its own beside a training's.
    Raises ValueError for a logger in the run's own directory, in which `pi05 validate` writes a metrics.csv.
    """
    with ExitStack() as stack:
        for number, logger in enumerate(trainer.loggers):
            if not isinstance(logger, CSVLogger):
                continue
            if Path(logger.log_dir).resolve() == run.resolve():
                raise ValueError(
                    f"trainer.logger: a CSVLogger would write its metrics.csv into {run}, where that of pi05 validate"
                    " is: give it a name (trainer.logger.init_args.name csv)"
                )
            if command != "fit":
                trainer.loggers[number] = _beside_training(logger, command)
            elif trainer.is_global_zero:
                stack.enter_context(_earlier_renamed(Path(logger.log_dir)))
        yield


@contextmanager
def _earlier_renamed(folder: Path) -> Iterator[None]:
    """It has its name again in the end where nothing was logged, as when a resume is refused."""
    file = folder / CSVWriter.NAME_METRICS_FILE
    if not file.exists():
        yield
        return
    earlier = next(path for n in count(1) if not (path := file.with_suffix(f".{n}.csv")).exists())
    file.rename(earlier)
    try:
        yield
    finally:
        if file.exists():
            rank_zero_info(f"{file} of an earlier start is {earlier} now")
        else:
            earlier.rename(file)


def _beside_training(logger: CSVLogger, command: str) -> CSVLogger:
    """The logger, or one in a folder of the command's where the given one has the metrics.csv of a training."""
    if not Path(logger.log_dir, CSVWriter.NAME_METRICS_FILE).exists():
        return logger
    folder = Path(logger.log_dir, command)
    version = next(n for n in count(1) if not (folder / f"version_{n}").exists())
    return CSVLogger(folder.parent, folder.name, version)
