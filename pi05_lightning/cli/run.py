"""`pi05 fit | validate | test | predict`: LightningCLI, one parser for the four, and what is particular to a run.

A run is a directory: config.yaml, checkpoints/ and TensorBoard's event files. Every checkpoint carries the
configuration it was trained with, so that its path alone is enough to validate it or to train on.

    1. `-c FILE …` given: the configuration is these files, merged in order, and the flags
    2. otherwise a checkpoint given: the configuration is the checkpoint's own, and the flags
    3. otherwise: the defaults and the flags
"""

from __future__ import annotations

import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from pi05_lightning.acting import Acting
from pi05_lightning.cli.arguments import RESUME_NEEDS, complete_arguments, find_resumed, is_within
from pi05_lightning.cli.building import mistakes_named
from pi05_lightning.cli.csv_metrics import no_metrics_lost
from pi05_lightning.cli.help import CHECKPOINT_DEFAULTS, NOT_OF_A_CHUNK, RUN_OPTIONS, TRAINER_DEFAULTS
from pi05_lightning.cli.main import TRAINER_COMMANDS, Parser, said_fully
from pi05_lightning.cli.noise import silence_noise
from pi05_lightning.cli.refused import as_list, check_loggers, check_saved, check_trainer
from pi05_lightning.cli.results import MEASURING, show_results
from pi05_lightning.data.datamodule import Pi05DataModule
from pi05_lightning.files.local import check_writable, held
from pi05_lightning.files.ranges import check_range
from pi05_lightning.module import Pi05Module
from pi05_lightning.module.trainer import callbacks_of, leaves_nothing
from pi05_lightning.training.callbacks.checkpoint import RunCheckpoint
from pi05_lightning.training.callbacks.dashboard import Dashboard
from pi05_lightning.training.callbacks.ema import WeightAverage
from pi05_lightning.training.callbacks.end_together import EndTogether
from pi05_lightning.training.callbacks.examples import ValidationExamples
from pi05_lightning.training.callbacks.forecast import MemoryForecast
from pi05_lightning.training.callbacks.interrupt import InterruptBetweenSteps
from pi05_lightning.training.callbacks.mixture import MixtureLog
from pi05_lightning.training.callbacks.predictions import PredictionsFile, measured_hash
from pi05_lightning.training.callbacks.progress import ProgressLines
from pi05_lightning.training.callbacks.provenance import Provenance
from pi05_lightning.training.callbacks.restart import Restart
from pi05_lightning.training.callbacks.stages import StageSwitch
from pi05_lightning.training.callbacks.step_time import StepTime
from pi05_lightning.training.callbacks.throughput import Throughput
from pi05_lightning.training.precision import check_precision
from pi05_lightning.training.run_directory import (
    check_free,
    has_checkpoints,
    is_run,
    new_run,
    write_config,
)
from pi05_lightning.training.trackio import TrackioLogger  # noqa: F401 - what trainer.logger knows by name
from pi05_lightning.weights.locate import locate, locate_run, run_of
from pi05_lightning.weights.resumed import REMEDY, changed_options, differing

FEW = 3  # dimensions of another model that are listed
KILLED_LOADER = re.compile(r"DataLoader worker \(pid[^.;]*")
# defaults of Lightning's callbacks, such as Timer's, which a saved configuration holds too
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, choice: dumper.represent_data(choice.value))


def default_callbacks() -> list[Callback]:
    """What every run has, beside the callbacks that its configuration names."""
    return [
        EndTogether(),
        MemoryForecast(),
        PredictionsFile(),
        Provenance(),
        Dashboard(),
        Throughput(),
        StepTime(),
        MixtureLog(),
        ValidationExamples(),
        InterruptBetweenSteps(),  # so late that all have taken note of the step that it stops after
        Restart(),  # what it makes up can be interrupted
    ]


class RunParser(Parser, LightningArgumentParser):
    """Lightning's parser with this package's error messages."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if "Not a valid subclass of SourceConfig" in message and "Got value: {'init_args." in message:
            message = (
                "a flag --data.sources.NAME.init_args… names a source that the configuration does not have. The last -c"
                " file with data.sources replaces those before it as a whole: name one of its sources, or give the"
                " source's class_path too"
            )
        super().error(message, ex)


class RunTrainer(Trainer):
    """Lightning's trainer, for which a parsed 1 stays one batch and 1.0 all of them.

    Its own annotations are those of the first module that asked for a union of int and float, in whichever order.
    """

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            **options,
        )


class RunConfig(SaveConfigCallback):
    """Saves the resolved configuration as the run's config.yaml, and gives it to the module for every checkpoint.

    Where the run lies and what it resumed from are left out: the text can start another run as it is.
    """

    _is_due = False

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        what = config.clone()
        what.run = what.ckpt_path = what.resume = None
        what.force = False
        super().__init__(parser, what, **kwargs)

    @cached_property
    def text(self) -> str:
        return self.parser.dump(self.config, skip_unset=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        cast("Pi05Module", pl_module).run_config = self.text
        # upstream writes to where the logger writes, over whatever is there
        self._is_due = stage == "fit" and trainer.is_global_zero and not leaves_nothing(trainer)
        if not is_run(Path(trainer.default_root_dir)):
            self._write(trainer)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self._write(trainer)  # over that of an earlier start, which holds where this one is refused

    def _write(self, trainer: Trainer) -> None:
        if self._is_due:
            write_config(Path(trainer.default_root_dir), self.text)
            self._is_due = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say what is not as in the configuration that the checkpoint was written with."""
        changed = changed_options(checkpoint.get("config", self.text), self.text)
        if changed and trainer.state.fn == "fit":
            step = checkpoint["global_step"]
            rank_zero_info("\n  ".join([f"Other options than the checkpoint's, from step {step} on:", *changed]))


class Pi05CLI(LightningCLI):
    """Parses a run's configuration and builds its trainer, model and data; `run` then does what the command says."""

    def __init__(self, command: str, args: list[str]) -> None:
        self.command = command
        super().__init__(
            Pi05Module,
            Pi05DataModule,
            trainer_class=RunTrainer,
            save_config_callback=RunConfig,
            trainer_defaults=TRAINER_DEFAULTS | {"callbacks": default_callbacks()},
            seed_everything_default=0,
            parser_class=RunParser,
            parser_kwargs={"prog": f"pi05 {command}", "description": TRAINER_COMMANDS[command]},
            auto_configure_optimizers=False,
            args=args,
            run=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # upstream warns whenever args are given and the process has some of its own, which is how `pi05` works
        assert isinstance(args, list)
        self.config = parser.parse_args(args)
        if self.config.seed_everything is True:  # Lightning's own draw would differ from the one that is written down
            parser.error("seed_everything is true: give a number, so that the run can be resumed and repeated")
        if self.config.seed_everything is not False:
            check_range("seed_everything", self.config.seed_everything, 0, 2**32 - 1)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, (kind, text) in RUN_OPTIONS.items():
            parser.add_argument(f"--{name}", type=kind, default=False if kind is bool else None, help=text)
        # groups of their own rather than items of trainer.callbacks: lists in layered YAML replace each other
        parser.add_lightning_class_args(StageSwitch, "stages")
        parser.add_lightning_class_args(WeightAverage, "ema")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        if self.command == "predict":
            parser.add_class_arguments(Acting, "acting", skip=NOT_OF_A_CHUNK)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.set_defaults({f"checkpoint.{key}": value for key, value in CHECKPOINT_DEFAULTS.items()})

    def before_instantiate_classes(self) -> None:
        config = self.config
        if self.command != "fit" and config.ckpt_path is None:
            self.parser.error("no checkpoint: give its path, or that of a run's directory")
        if config.model.config is None and config.model.init_from is None:
            self.parser.error("no model: give its dimensions as model.config, or weights as model.init_from")
        if config.model.config is None:
            # into the configuration that is saved: the run's checkpoints need no other file
            config.model.config = locate(config.model.init_from).config().to_dict()
        if config.resume and (self.command != "fit" or not config.run):
            self.parser.error(RESUME_NEEDS)
        if config.resume and (found := saved_in(config)) and not is_within(config.ckpt_path, found):
            config.ckpt_path = found  # whatever it was begun from
        if config.ckpt_path is not None:  # of a file too: what the flag says is a path already
            config.ckpt_path = find_resumed(config.ckpt_path, config.run)
        if not config.run:
            old = run_of(Path(config.ckpt_path)) if config.ckpt_path else None
            config.run = str(old if old and is_run(old) else new_run())
        check_free(Path(config.run))
        check_writable(Path(config.run), "--run")
        if config.ckpt_path is not None:
            check_dimensions(Path(config.ckpt_path), config.as_dict()["model"]["config"])
        if self.command == "fit" and (found := saved_in(config)) and not is_within(config.ckpt_path, found):
            self.parser.error(
                f"{found} holds a run: resume it with --ckpt_path {found} (or --resume auto, which also starts one),"
                " or give another --run" + (" and checkpoint.dirpath" if config.checkpoint.dirpath else "")
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        kwargs["default_root_dir"] = self.config.run
        if self.config_init.trainer.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(self.config.run, name="", version="", default_hp_metric=False)
        trainer = self.config_init.trainer
        check_trainer(trainer, self.command)
        if self.command == "fit":
            check_saved(self.config.checkpoint, trainer)
        check_loggers(self.config.trainer.logger)
        if trainer.precision is None and trainer.accelerator != "cpu" and torch.accelerator.is_available():
            kwargs["precision"] = "bf16-mixed"
        if trainer.enable_progress_bar is None:
            kwargs["enable_progress_bar"] = True
            if not sys.stdout.isatty() and not any(isinstance(c, ProgressBar) for c in as_list(trainer.callbacks)):
                kwargs["callbacks"] = [*as_list(trainer.callbacks), ProgressLines()]
        added = [*as_list(trainer.callbacks)]  # Lightning adds to the list
        with mistakes_named(vars(trainer), likely=("accelerator", "devices", "strategy")):
            made = super().instantiate_trainer(**kwargs)
        if made.strategy.root_device.type == "mps":
            raise ValueError(
                "trainer.accelerator is mps, or auto, which takes it. It has no float64, and flow time needs that:"
                " set it to cpu"
            )
        check_precision(made.precision_plugin)
        # what a user adds, as rollouts, comes after what takes a batch's time, and before what stops or saves the run
        last = (InterruptBetweenSteps, Restart, Checkpoint)
        cast("Any", made).callbacks.sort(
            key=lambda c: next((n for n, kind in enumerate(last, 2) if isinstance(c, kind)), int(c in added))
        )
        return made

    def instantiate_classes(self) -> None:
        with mistakes_named():
            super().instantiate_classes()


def saved_in(config: Namespace) -> str | None:
    """The folder that holds checkpoints of a configuration's run, if it has saved any."""
    if has_checkpoints(Path(config.run)):
        return str(config.run)
    folder = config.checkpoint.dirpath
    return folder if folder and any(Path(folder).glob("*.ckpt")) else None


def check_dimensions(checkpoint: Path, here: dict[str, Any]) -> None:
    """ValueError where a checkpoint's model has other dimensions than the configuration says."""
    if found := differing("model.config", locate_run(checkpoint).config().to_dict(), here):
        more = f"; and {len(found) - FEW} more" if len(found) > FEW else ""
        raise ValueError(f"{checkpoint} is of another model. {REMEDY}. {'; '.join(found[:FEW])}{more}")


def run(command: str, args: list[str]) -> None:
    """Do what `pi05 fit | validate | test | predict` with these arguments says."""
    silence_noise()
    switches = {name for name, (kind, _) in RUN_OPTIONS.items() if kind is bool}
    with tempfile.TemporaryDirectory() as folder:
        cli = Pi05CLI(command, complete_arguments(command, said_fully(args, switches), Path(folder)))
    prepare(cli)
    run_directory = Path(cli.config.run)
    # what Lightning prints by itself has a column per loader, all of them full
    quiet = {"predict": {"return_predictions": False}, "validate": {"verbose": False}, "test": {"verbose": False}}
    try:
        with ends_named(), only_writer(cli), no_metrics_lost(cli.trainer, run_directory, command):
            getattr(cli.trainer, command)(
                cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path, **quiet.get(command, {})
            )
        if command in MEASURING and cli.trainer.is_global_zero:
            show_results(cli.trainer, cli.model, run_directory, command)
    finally:
        begun = command == "fit" and cli.trainer.train_dataloader is not None
        if begun and cli.trainer.interrupted and (found := saved_in(cli.config)):
            named = "" if Path(found) == run_directory else f" --run {run_directory}"
            print(f"Go on with: pi05 fit --ckpt_path {found}{named}", file=sys.stderr)


def prepare(cli: Pi05CLI) -> None:
    """Tell callbacks and model what the command needs of them; refuse early what would fail late.

    Raises ValueError for a mixture that serves a stage nothing, and for weights that are not there.
    """
    trainer, model, config = cli.trainer, cli.model, cli.config
    for forecast in callbacks_of(trainer, MemoryForecast):
        forecast.force = config.force
    for switch in callbacks_of(trainer, StageSwitch):
        switch.apply(trainer, model, cli.command)
        if cli.command == "fit":
            cli.datamodule.check_mixtures(switch.recipe)
    if cli.command == "fit" and config.ckpt_path is None:
        model.check_new()
        if model.init_from is not None:
            locate(model.init_from)
    if cli.command == "predict":
        model.acting = cli.config_init.acting
    model.will_be_restored = config.ckpt_path is not None
    if cli.command != "fit" and model.will_be_restored and trainer.is_global_zero:
        # it takes memory, of which the model has none yet
        model.restored_hash = measured_hash(trainer, config.ckpt_path)


def only_writer(cli: Pi05CLI) -> AbstractContextManager[None]:
    """While it trains, no other `pi05 fit` writes to the run."""
    if cli.command != "fit" or not cli.trainer.is_global_zero or leaves_nothing(cli.trainer):
        return nullcontext()
    return held(Path(cli.config.run), f"pi05 fit writes to {cli.config.run}", instead="another --run")


@contextmanager
def ends_named() -> Iterator[None]:
    """What Lightning and PyTorch raise as a run ends, as an error that says how to mend it, or as the exit status."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # for which the trainer says 1
            raise SystemExit(128 + signal.SIGINT) from None
        raise
    except MisconfigurationException as error:  # of a callback of Lightning's, which its options do not fit
        raise ValueError(str(error)) from error
    # PyTorch raises it wherever the run is, in what tells its own errors too
    except (RuntimeError, ValueError) as error:
        if not (killed := KILLED_LOADER.search(str(error))):
            raise
        raise ChildProcessError(
            f"a process that loads data was killed ({killed[0]}), most likely for want of memory: use fewer with"
            " --data.num_workers, or give a container more of /dev/shm"
        ) from error
