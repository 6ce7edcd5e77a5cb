"""A logger for Trackio, which keeps metrics in a database on this machine or in a Space of the Hugging Face Hub."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from trackio import Run


class TrackioLogger(Logger):
    """Logs to Trackio; `trackio show` opens its page. Lightning has loggers for the others, and none for it.

    Args:
        project: what runs are gathered in.
        run_name: of this run; by default Trackio makes one up. A name that there is goes on with that run.
        space_id: a Space of the Hub to log to, as `user/name`; by default nothing leaves this machine.

    Raises ValueError where Trackio is not installed.
    """

    def __init__(self, project: str = "pi05", run_name: str | None = None, space_id: str | None = None) -> None:
        super().__init__()
        try:
            import trackio  # noqa: F401
        except ModuleNotFoundError as error:
            raise ValueError("TrackioLogger needs the package trackio: pip install trackio") from error
        self.project, self.run_name, self.space_id = project, run_name, space_id
        self._params: dict[str, Any] = {}
        self._run: Run | None = None

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str | None:
        return self.run_name

    @property
    @rank_zero_experiment
    def experiment(self) -> Run:
        """Trackio's run, begun when it is first asked for."""
        if self._run is None:
            import trackio

            self._run = trackio.init(
                self.project, self.run_name, space_id=self.space_id, config=self._params, resume="allow", embed=False
            )
            self.run_name = self._run.name
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self._params |= vars(params) if isinstance(params, Namespace) else dict(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
