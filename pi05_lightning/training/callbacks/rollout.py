"""A small rollout now and then during training: is the policy getting anywhere?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from tensorboard.compat.proto.summary_pb2 import Summary

from pi05_lightning.acting import Acting, check
from pi05_lightning.acting.inference import Inference
from pi05_lightning.files.ranges import check_range
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.module import Pi05Module
from pi05_lightning.module.trainer import callbacks_of
from pi05_lightning.ranks import by_first_rank
from pi05_lightning.sim import video
from pi05_lightning.sim.environment import EnvironmentConfig, tasks_to_run
from pi05_lightning.sim.modes import PolicyMode, acting_in
from pi05_lightning.sim.rollout import Job, Lanes, Plan, run_policy_job, view_of
from pi05_lightning.sim.simulators import MetaWorld
from pi05_lightning.sim.trials import ENDED, OUT_OF_TIME, Result
from pi05_lightning.training.callbacks.ema import WeightAverage
from pi05_lightning.training.callbacks.interrupt import stop_if_asked
from pi05_lightning.training.callbacks.throughput import Throughput
from pi05_lightning.weights.abilities import UNKNOWN

log = logging.getLogger(__name__)

FOLDER = "rollouts"


class PeriodicRollout(Callback):
    """Runs the policy in a simulator every `every_n_steps` optimizer steps, on rank 0.

    Only stages that train its kind of actions (`actions`) are rolled out.

    It logs `rollout/success`, of each task `rollout/success_of/<task>`, and `rollout/seconds`, what that cost; a film
    of the first episode goes to TensorBoard and to the run's rollouts/. The initial states are those of the validation
    split, always the same ones. Weights are the average where there is one (`ema`). Training's random numbers are as
    without it. A rollout that was broken off is run again, from its start, when the run goes on.

    Args:
        every_n_steps: optimizer steps from one rollout to the next.
        env: the simulator.
        tasks: by default those that `pi05 rollout` takes.
        episodes: per task.
        mode: how the policy acts, as in `pi05 rollout`: policy (as `acting` says), flat (without subtask), fast (FAST
            tokens), rtc and async (with `inference_delay`, with and without real-time chunking).
        max_seconds: simulated time after which an episode has failed; by default the simulator's.
        lanes: episodes that are stepped together.
        seed: of the initial states and the noise.
        name: what tells it from another one: it then logs `rollout_<name>/success`, and films into rollouts/<name>/.
        acting: how the policy acts, see `Acting`. Of data with several robots, name one as `robot`.

    Raises ValueError at the start of the run for what the policy will not be able to do, and for what the simulator
    does not have, or lacks to run. Also for two of one name.
    """

    def __init__(
        self,
        every_n_steps: int,
        env: EnvironmentConfig = MetaWorld(),  # noqa: B008 - frozen
        tasks: list[str] | None = None,
        episodes: int = 4,
        mode: PolicyMode = "policy",
        max_seconds: float | None = None,
        lanes: int = 8,
        seed: int = 0,
        name: str = "",
        **acting: Any,
    ) -> None:
        for option, value in {"every_n_steps": every_n_steps, "episodes": episodes, "lanes": lanes}.items():
            check_range(f"PeriodicRollout's {option}", value, 1)
        self.every_n_steps, self.env, self.tasks, self.episodes = every_n_steps, env, tasks, episodes
        self.mode, self.max_seconds, self.lanes, self.seed = mode, max_seconds, lanes, seed
        self.acting = acting_in(mode, Acting(**acting))
        self.name = name
        self.is_pending = False
        """A rollout has begun and is not over."""
        self._last = -1

    @property
    def state_key(self) -> str:
        named = {"name": self.name} if self.name else {}  # checkpoints of before it could have one have no such key
        return self._generate_state_key(
            env=self.env, tasks=self.tasks, mode=self.mode, every_n_steps=self.every_n_steps, **named
        )

    @property
    def tag(self) -> str:
        return f"rollout_{self.name}" if self.name else "rollout"

    def state_dict(self) -> dict[str, Any]:
        return {"is_pending": self.is_pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.is_pending = state_dict["is_pending"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pi05Module)
        assert pl_module.processor is not None
        of_this_name = [c for c in callbacks_of(trainer, PeriodicRollout) if c.name == self.name]
        if len(of_this_name) > 1:
            raise ValueError(
                f"{len(of_this_name)} PeriodicRollout log as `{self.tag}`: give all but one a `name` of their own"
            )
        check(self.acting, pl_module.processor, UNKNOWN)  # the weights are yet to be trained
        if any(self.acting.actions in stage.weights for stage in pl_module.recipe.reached):
            with self._weights(trainer, pl_module) as model:
                by_first_rank(partial(self._try_out, trainer, pl_module, model))
        else:
            rank_zero_warn(
                f"PeriodicRollout: no stage trains `actions: {self.acting.actions}`, so nothing is rolled out"
            )

    def _try_out(self, trainer: Trainer, module: Pi05Module, model: Pi05) -> None:
        """Open every task once, act once and film it: what is missing shows now, not after hours of training.

        Raises ValueError where the policy cannot act on what it sees.
        """
        with (
            isolate_rng(),
            self._policy(trainer, module, model) as policy,
            closing(Lanes(self.env, view_of(policy))) as lanes,
            TemporaryDirectory() as folder,
        ):
            first, *others = {job.task: job.trials[0] for job in self._plan(policy).jobs()}.values()
            lanes.of(first.task, 1, first.max_seconds)
            step = replace(first, films="all", max_seconds=1e-9)  # a single action, as there are no shorter episodes
            (result,) = run_policy_job(Job((step,)), policy, lanes).results
            if not result.success and result.reason not in (OUT_OF_TIME, ENDED):
                raise ValueError(f"PeriodicRollout: no action could be taken at task {step.task}: {result.reason}")
            video.write(Path(folder, "film.mp4"), result)
            video.gif(result)
            for trial in others:
                for env in lanes.of(trial.task, 1, trial.max_seconds):
                    env.reset(trial.seed)
                    env.observation()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = trainer.global_step
        for film in self._folder(trainer).glob("step-*.*"):
            if trainer.is_global_zero and int(film.stem.removeprefix("step-")) > trainer.global_step:
                film.unlink()  # of steps that a resumed run takes anew
        if self.is_pending:
            assert isinstance(pl_module, Pi05Module)
            self._roll_out(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, Pi05Module)
        step, self._last = self._last, trainer.global_step
        due = trainer.global_step != step and trainer.global_step % self.every_n_steps == 0
        if due and self.acting.actions in pl_module.recipe.at(step).weights:
            self._roll_out(trainer, pl_module)

    def _roll_out(self, trainer: Trainer, module: Pi05Module) -> None:
        self.is_pending = True
        with self._weights(trainer, module) as model:
            self._roll_out_on_one_rank(trainer, module, model)
        if module.sharding is not None:
            module.sharding.wait()  # what comes next has less patience
        self.is_pending = False
        for throughput in callbacks_of(trainer, Throughput):
            throughput.pause()

    @rank_zero_only
    def _roll_out_on_one_rank(self, trainer: Trainer, module: Pi05Module, model: Pi05) -> None:
        start = perf_counter()
        with isolate_rng(), self._policy(trainer, module, model) as policy:
            by_task = self.run(policy, partial(stop_if_asked, trainer))
        results = [result for of_task in by_task.values() for result in of_task]
        if crashed := [result for result in results if result.crashed]:
            log.warning("%d of %d episodes were ended by: %s", len(crashed), len(results), crashed[0].reason)
        metrics = {f"{self.tag}/seconds": perf_counter() - start}
        if any(result.lacked_memory for result in results):
            log.warning("no success is logged, as memory ran out, which tells nothing of the policy: use fewer lanes")
        else:
            # not success/<task>: for MLflow's files `success` would be a folder as well as a file
            metrics |= {f"{self.tag}/success_of/{task}": _success(of_task) for task, of_task in by_task.items()}
            metrics[f"{self.tag}/success"] = _success(results)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)
        if results[0].film:  # else it ended before its first action
            self._show(trainer, results[0])

    def run(self, policy: Inference, between: Callable[[], None] = lambda: None) -> dict[str, list[Result]]:
        """Every task's results; the first episode is filmed.  between: is called before each job, and may raise."""
        plan = self._plan(policy)
        (first, *rest), *others = (job.trials for job in plan.jobs())
        by_task: dict[str, list[Result]] = {task: [] for task in plan.tasks}
        with closing(Lanes(self.env, view_of(policy))) as lanes:
            for job in (Job((replace(first, films="all"), *rest)), *map(Job, others)):
                between()
                by_task[job.task] += run_policy_job(job, policy, lanes).results
        return by_task

    def _plan(self, policy: Inference) -> Plan:
        return Plan(
            self.env,
            tasks_to_run(self.env, self.tasks, policy.processor.robots[policy.robot]),
            [self.mode],
            self.episodes,
            split="val",
            lanes=self.lanes,
            max_seconds=self.max_seconds,
            seed=self.seed,
        )

    @contextmanager
    def _weights(self, trainer: Trainer, module: Pi05Module) -> Iterator[Pi05]:
        """The model that a checkpoint of this moment would hold, on the first rank; every rank must enter it."""
        average = next(iter(callbacks_of(trainer, WeightAverage)), WeightAverage())
        with average.applied(module):
            yield module.gathered(keep=trainer.is_global_zero)

    @contextmanager
    def _policy(self, trainer: Trainer, module: Pi05Module, model: Pi05) -> Iterator[Inference]:
        """The policy of these weights; the module trains on as before afterwards."""
        assert module.processor is not None
        training = {name: part.training for name, part in model.named_modules()}
        # what was not trained so far is not asked for
        acting = self.acting if module.trained.able("subtask") else replace(self.acting, hierarchical=False)
        trained = replace(module.trained, complete=False)  # it is asked for actions before it has learned any
        with trainer.precision_plugin.val_step_context():
            try:
                yield Inference(model, module.processor, acting, trained=trained)
            finally:
                for name, part in model.named_modules():
                    part.training = training[name]

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir, FOLDER, self.name)

    def _show(self, trainer: Trainer, result: Result) -> None:
        folder = self._folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        video.write(folder / f"step-{trainer.global_step:08d}.mp4", result)
        height, width = video.frames(result)[0].shape[:2]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=video.gif(result))
        summary = Summary(value=[Summary.Value(tag=f"{self.tag}/{result.trial.task}", image=image)])
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.file_writer.add_summary(summary, trainer.global_step)


def _success(results: list[Result]) -> float:
    return sum(result.success for result in results) / len(results)
