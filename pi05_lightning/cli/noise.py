"""Messages that are not for the user of this command line: advertising, and warnings whose cause is taken care of."""

from __future__ import annotations

import logging
import os
import re
import warnings

NOISE = (
    "💡 Tip",
    "TPU available: False",
    r"`isinstance\(treespec, LeafSpec\)`",
    "skip_none parameter was deprecated",
    "The dirpath has changed from",  # a run's directory may be moved
    r"Checkpoint directory .* exists and is not empty",  # a resumed run's does
    "You have overridden `(on_before_batch_transfer|transfer_batch_to_device)` in `LightningModule`",
    ".*your dataloader is not resumable",  # the data module knows its place, whoever loads
)
OPENING = ("chosen_episodes", "datamodule", "errors", "sources")
"""Modules of `data` whose warnings are of data that are opened: all ranks of a machine open the same."""


def silence_noise() -> None:
    """Keep NOISE from the terminal, and OPENING of all ranks of a machine but the first."""
    pattern = re.compile(f"\\s*({'|'.join(NOISE)})")
    warnings.filterwarnings("ignore", pattern.pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not pattern.match(record.getMessage())
    )
    local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    for name in OPENING if local_rank != "0" else ():
        logging.getLogger(f"pi05_lightning.data.{name}").setLevel(logging.ERROR)
