"""That what a run saves, names and stops by is something that its validation logs, said hours before it is missed."""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from pi05_lightning.data.clock import accumulated, most_batches
from pi05_lightning.evaluation.metrics import SHARES
from pi05_lightning.module import Pi05Module
from pi05_lightning.module.trainer import callbacks_of, logs_every


def check_monitored(
    checkpoint: ModelCheckpoint, trainer: Trainer, module: LightningModule, logged: Collection[str], was_scored: bool
) -> None:
    """Raises ValueError for a metric that a run's callbacks ask for and that nothing will log, and for a wrong mode.

    checkpoint: the run's own.  logged: what the sanity check has logged.  was_scored: the run was scored by the metric
    of `checkpoint` before, and goes on.
    """
    validates = is_validated(trainer)
    if checkpoint.monitor is not None and not validates:
        raise ValueError(
            f"checkpoint.monitor is {checkpoint.monitor}, and nothing is validated in this run"
            " (trainer.limit_val_batches, data.sources with no validation part, or a trainer.val_check_interval"
            f" beyond its {most_batches(trainer)} batches): leave it out, or validate"
        )
    own, judged = set[str](), set[str]()
    if isinstance(module, Pi05Module):
        own = set(module.validation_metrics())
        model = module.model
        theirs = {metric for name, head in model.heads.items() if name in model.auxiliary for metric in head.metrics}
        judged = {name for name in own if theirs.isdisjoint(name.split("/"))}
    known = set(logged) | (own if validates else set())
    if checkpoint.monitor is not None and not was_scored:
        check_logged("checkpoint.monitor", checkpoint.monitor, known)
        check_mode("checkpoint.monitor", checkpoint.monitor, checkpoint.mode, judged)
    if logs_of_others(trainer, module):
        return
    loss = {"loss"} if logs_every(trainer) else set[str]()
    for name in re.findall(r"\{([^:}]+)", checkpoint.filename or ""):
        check_logged("a name in checkpoint.filename", name, known | loss | {"epoch", "step"})
    for callback in callbacks_of(trainer, Callback):
        if isinstance(callback, EarlyStopping):
            if callback.strict:
                check_logged("monitor of EarlyStopping", callback.monitor, known | loss)
                if callback.monitor == "loss":
                    check_loss_is_early(trainer)
            check_mode("monitor of EarlyStopping", callback.monitor, callback.mode, judged)
        elif isinstance(callback, ModelCheckpoint) and callback.monitor and callback is not checkpoint:
            check_logged("monitor of ModelCheckpoint", callback.monitor, known | loss | {"epoch", "step"})
            check_mode("monitor of ModelCheckpoint", callback.monitor, callback.mode, judged)


def check_logged(option: str, name: str, known: Collection[str]) -> None:
    """Raises ValueError unless a metric is known, with the nearest ones that are."""
    if name in known:
        return
    near = get_close_matches(name, known, 3, cutoff=0)
    main = sorted(name for name in known if not name.startswith("val_detail/"))
    raise ValueError(
        f"{option} is {name}, which no validation of this run logs. Nearest: {', '.join(near)}. It logs"
        f" {', '.join(main)}, and the same per dim, step and flow time under val_detail/. What a callback of yours logs"
        " is only known with trainer.num_sanity_val_steps of 1 or more"
    )


def check_loss_is_early(trainer: Trainer) -> None:
    """Raises ValueError where the first validation comes before the training loss is logged."""
    logged = logs_every(trainer) * accumulated(trainer, trainer.current_epoch)
    if logged > (validated := cast("Any", trainer).val_check_batch):
        raise ValueError(
            f"monitor of EarlyStopping is loss, which is first logged after {logged} batches, and validation begins"
            f" after {validated}: make trainer.log_every_n_steps smaller, or monitor what validation logs"
        )


def check_mode(option: str, name: str, mode: str, judged: Collection[str]) -> None:
    """Raises ValueError where the worst of a metric is asked for.

    judged: what validation logs but for the metrics of a user's heads, of which nobody knows whether more is better.
    """
    is_share = not SHARES.isdisjoint(name.split("/"))
    more, best = ("more", "max") if is_share else ("less", "min")
    if mode != best and (is_share or name in judged):
        raise ValueError(f"{option} is {name}, of which {more} is better, and its mode is {mode}: give `mode: {best}`")


def is_validated(trainer: Trainer) -> bool:
    """Whether a run comes to a validation, by its options."""
    options = cast("Any", trainer)
    counted = options.check_val_every_n_epoch is None and isinstance(options.val_check_interval, int)
    ends_before = counted and 0 < most_batches(trainer) < options.val_check_interval
    return trainer.enable_validation and not ends_before


def logs_of_others(trainer: Trainer, module: LightningModule) -> bool:
    """Whether a module or callback that is not of these packages may log what nobody knows of before it does."""
    callbacks = callbacks_of(trainer, Callback)
    classes = [type(module), *(type(callback) for callback in callbacks)]
    own = any(kind.__module__.partition(".")[0] not in ("lightning", "pi05_lightning") for kind in classes)
    # rates are logged by names of the optimizer's
    return own or any(isinstance(callback, LearningRateMonitor) for callback in callbacks)
