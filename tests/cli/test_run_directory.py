"""What a run writes is in its own directory, whatever logs, and replaces nothing that no run wrote."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback

from pi05_lightning.cli.arguments import complete_arguments, find_resumed
from pi05_lightning.cli.main import main
from pi05_lightning.data.datamodule import Pi05DataModule
from pi05_lightning.data.sources.vision_text import VisionTextConfig
from pi05_lightning.files.local import LOCK, empty, held
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.module import Pi05Module
from pi05_lightning.training.callbacks.stages import StageSwitch
from pi05_lightning.training.run_directory import MARK, new_run
from pi05_lightning.weights.locate import locate
from pi05_lightning.weights.training_checkpoint import find_checkpoint
from tests.quiet_trainer import quiet_trainer

from .conftest import STEPS

CSV = "[{class_path: CSVLogger, init_args: {save_dir: logs, name: csv}}]"


def steps(run: Path) -> int:
    return torch.load(find_checkpoint(run), weights_only=True)["global_step"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow_cases
@pytest.mark.parametrize("loggers", [CSV, "false", CSV[:-1] + ", {class_path: CSVLogger, init_args: {save_dir: .}}]"])
def test_configuration_and_checkpoints_are_in_the_run_whatever_logs(config: Path, here: Path, loggers: str) -> None:
    (here / "config.yaml").write_text("mine: true\n")
    main(["fit", "-c", str(config), "--run", "run", "--trainer.logger", loggers])
    assert (here / "config.yaml").read_text() == "mine: true\n"
    assert (here / "run/config.yaml").read_text().startswith(MARK)
    assert steps(here / "run") == STEPS
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(config), "--run", "run", "--trainer.logger", loggers])
    main(["fit", "--ckpt_path", "run", "--trainer.max_steps", str(STEPS + 1)])
    assert steps(here / "run") == STEPS + 1


@pytest.mark.slow
def test_what_a_csv_logger_wrote_is_kept_when_its_run_goes_on(config: Path, here: Path) -> None:
    loggers = "[{class_path: CSVLogger, init_args: {save_dir: logs, name: csv, version: ''}}]"
    main(["fit", "-c", str(config), "--run", "run", "--trainer.logger", loggers, "--trainer.log_every_n_steps", "1"])
    written = (here / "logs/csv/metrics.csv").read_text()
    with pytest.raises(SystemExit):
        main(["fit", "--ckpt_path", "run", "--trainer.max_steps", str(STEPS + 1), "--model.lora.rank", "2"])
    main(["validate", "run"])
    assert (here / "logs/csv/metrics.csv").read_text() == written
    assert "val/" in (here / "logs/csv/validate/version_1/metrics.csv").read_text()
    main(["fit", "--ckpt_path", "run", "--trainer.max_steps", str(STEPS + 1)])
    assert (here / "logs/csv/metrics.1.csv").read_text() == written
    assert len(list((here / "logs/csv").glob("metrics*.csv"))) == 2


def test_a_csv_logger_in_the_runs_own_directory_is_refused(config: Path, here: Path) -> None:
    loggers = "[{class_path: CSVLogger, init_args: {save_dir: run, name: '', version: ''}}]"
    with pytest.raises(SystemExit, match=r"metrics.csv into run, where that of pi05 validate is: give it a name"):
        main(["fit", "-c", str(config), "--run", "run", "--trainer.logger", loggers])


def test_a_directory_with_someone_elses_files_is_no_place_for_a_run(config: Path, here: Path) -> None:
    (here / "config.yaml").write_text("mine: true\n")
    with pytest.raises(SystemExit, match=r"no run's directory, and a run would overwrite its config.yaml"):
        main(["fit", "-c", str(config), "--run", "."])
    assert (here / "config.yaml").read_text() == "mine: true\n"


def test_a_lone_checkpoint_is_measured_without_writing_beside_it(finished_run: Path, here: Path) -> None:
    (here / "downloads").mkdir()
    shutil.copyfile(find_checkpoint(finished_run), here / "downloads" / "a.ckpt")
    main(["validate", "downloads/a.ckpt"])
    assert [path.name for path in (here / "downloads").iterdir()] == ["a.ckpt"]
    assert len(list((here / "runs").glob("*/metrics.json"))) == 1


def test_a_run_that_trains_is_not_trained_by_another_process(config: Path, here: Path) -> None:
    command = ["fit", "-c", str(config), "--run", "run"]
    holds = "import os, pathlib, time\nfrom pi05_lightning.files.local import held\nwith held(pathlib.Path('run'), ''):"
    program = f"{holds}\n os.fork() or time.sleep(99)\n print(flush=True)\n time.sleep(99)"
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    assert other.stdout is not None
    try:
        other.stdout.readline()
        with pytest.raises(SystemExit, match="another pi05 fit writes to run: wait for it, or give another --run"):
            main(command)
        assert [path.name for path in (here / "run").iterdir()] == [LOCK]
        other.kill()  # what it forked, as a run does its loaders, lives on
        other.wait()
        main(command)
        assert steps(here / "run") == STEPS
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        other.communicate()


def test_the_lock_of_a_folder_is_a_file_open_for_writing_which_alone_nfs_tells_its_server_of(tmp_path: Path) -> None:
    with held(tmp_path / "run", "x"):
        empty(tmp_path / "run")
        another = "import fcntl; fcntl.flock(open('run/.lock', 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        ended = subprocess.run([sys.executable, "-c", another], cwd=tmp_path, capture_output=True, text=True)
        assert "BlockingIOError" in ended.stderr
        lock = next(fd for fd in os.listdir("/dev/fd") if os.path.realpath(f"/dev/fd/{fd}").endswith("run/.lock"))
        assert fcntl.fcntl(int(lock), fcntl.F_GETFL) & os.O_RDWR
    subprocess.run([sys.executable, "-c", another], cwd=tmp_path, check=True)


def test_runs_started_in_one_second_have_directories_of_their_own(here: Path) -> None:
    assert len({new_run() for _ in range(5)}) == 5


def test_ranks_that_lightning_starts_take_the_first_ones_checkpoint_though_the_run_saves_another_one(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))
    first = find_resumed(str(run), None)
    content = torch.load(first, weights_only=True)
    later = content["pi05"] | {"saved_at": content["pi05"]["saved_at"] + 1}
    torch.save(content | {"pi05": later}, run / "checkpoints" / "later.ckpt")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with multiprocessing.get_context("fork").Pool(1) as started:
        assert started.apply(find_resumed, (str(run), None)) == first
    assert find_resumed(str(run), None) == str(run / "checkpoints" / "later.ckpt")  # nobody that was told started this


@pytest.mark.slow
def test_ranks_that_lightning_starts_share_the_run_without_a_name(config: Path, here: Path) -> None:
    flags = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    command = [sys.executable, "-m", "pi05_lightning", "fit", "-c", str(config), *flags]
    subprocess.run(command, check=True, capture_output=True)
    (run,) = (here / "runs").iterdir()
    assert steps(run) == STEPS


@pytest.mark.slow
def test_ranks_that_torchrun_starts_need_a_name(config: Path, here: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pi05_lightning", "fit"]
    ended = subprocess.run([*command, "-c", str(config)], capture_output=True, text=True)
    assert ended.returncode != 0
    assert "give them one name with --run" in ended.stderr
    assert not (here / "runs").exists()


def test_one_command_starts_a_run_and_goes_on_with_it(config: Path, here: Path) -> None:
    command = ["fit", "-c", str(config), "--run", "run", "--resume", "auto"]
    main(command)
    assert steps(here / "run") == STEPS
    main([*command, "--stages.pretrain_steps", str(STEPS + 2)])
    assert steps(here / "run") == STEPS + 2


def test_a_branch_goes_on_with_itself_and_takes_no_other_runs_folder(config: Path, here: Path) -> None:
    main(["fit", "-c", str(config), "--run", "begun", "--trainer.max_steps", "2"])
    branch = ["fit", "--ckpt_path", "begun", "--run", "branch"]
    main([*branch, "--resume", "auto", "--trainer.max_steps", "3"])
    kept = find_checkpoint(here / "branch").read_bytes()
    with pytest.raises(SystemExit):
        main([*branch, "--trainer.max_steps", "4"])
    assert find_checkpoint(here / "branch").read_bytes() == kept
    shutil.rmtree("begun")  # a requeued branch needs nothing of it
    main([*branch, "--resume", "auto", "--trainer.max_steps", "4"])
    assert steps(here / "branch") == 4


@pytest.mark.slow
def test_resume_auto_in_yaml_means_what_the_flag_does(config: Path, here: Path) -> None:
    (here / "job.yaml").write_text("run: run\nresume: auto\n")
    command = ["fit", "-c", str(config), "-c", "job.yaml"]
    main([*command, "--trainer.max_steps", "1"])
    main([*command, "--trainer.max_steps", "2"])
    assert steps(here / "run") == 2


@pytest.mark.slow
def test_checkpoints_in_a_folder_of_their_own_are_guarded_and_gone_on_with(config: Path, here: Path) -> None:
    command = ["fit", "-c", str(config), "--run", "run", "--checkpoint.dirpath", "scratch"]
    main([*command, "--trainer.max_steps", "1"])
    with pytest.raises(SystemExit):
        main(command)
    assert steps(here / "scratch") == 1
    main([*command, "--resume", "auto", "--trainer.max_steps", "2"])
    assert steps(here / "scratch") == 2


class Interrupted(Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_names_the_folder_that_its_checkpoints_have_of_their_own(
    config: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint.dirpath", "scratch", "--trainer.callbacks", f"[{__name__}.Interrupted]"]
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(config), "--run", "run", *flags])
    assert steps(here / "scratch") == 1
    assert "Go on with: pi05 fit --ckpt_path scratch --run run\n" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_resumed_with_the_options_it_has_goes_on_though_a_new_one_is_refused(
    config: Path, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main(["fit", "-c", str(config), "--run", "run", "--trainer.max_steps", "1"])
    content = torch.load(find_checkpoint(here / "run"), weights_only=True)
    options = yaml.safe_load(content["config"])
    options["stages"]["pretrain"]["warmup_steps"] = STEPS + 1  # as older versions took it
    torch.save(content | {"config": yaml.safe_dump(options)}, "old.ckpt")
    command = ["fit", "--ckpt_path", "old.ckpt", "--trainer.max_steps", "2"]
    main([*command, "--run", "on"])
    assert steps(here / "on") == 2
    assert "so the learning rate is never reached" in caplog.text
    with pytest.raises(SystemExit, match="freeze 'vizion' matches no parameter"):
        main(
            [*command, "--run", "other", "--stages.pretrain.warmup_steps", "0", "--stages.pretrain.freeze", "[vizion]"]
        )


@pytest.mark.slow
def test_a_refused_resume_leaves_the_runs_checkpoint_as_it_was(config: Path, here: Path) -> None:
    main(["fit", "-c", str(config), "--run", "run", "--trainer.max_steps", "1"])
    names = "config.yaml", "provenance.json"
    before, texts = find_checkpoint(here / "run").read_bytes(), [(here / "run" / name).read_text() for name in names]
    for flags, named in (
        (["--model.optimizer", "torch.optim.SGD"], r"model.optimizer is torch.optim.sgd.SGD"),
        (["--stages.pretrain.freeze", "[.]"], "nothing"),
        (["--checkpoint.monitor", "val/loss"], "checkpoint.monitor is val/loss"),
    ):
        with pytest.raises(SystemExit, match=named):
            main(["fit", "--ckpt_path", "run", "--trainer.max_steps", "2", *flags])
        assert find_checkpoint(here / "run").read_bytes() == before
        assert [(here / "run" / name).read_text() for name in names] == texts
    main(["fit", "--ckpt_path", "run", "--trainer.max_steps", "2"])
    assert all((here / "run" / name).read_text() != text for name, text in zip(names, texts, strict=True))


def test_a_run_of_several_machines_is_measured_on_one_unless_several_were_started(
    finished_run: Path, here: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = torch.load(find_checkpoint(finished_run), weights_only=True)
    options = yaml.safe_load(content["config"])
    options["trainer"]["num_nodes"] = 4
    torch.save(content | {"config": yaml.safe_dump(options)}, "big.ckpt")
    config = str(here / "config.yaml")
    taken = ["--config", config, "--ckpt_path", "big.ckpt", "--trainer.num_nodes", "1"]
    assert complete_arguments("validate", ["big.ckpt"], here) == taken
    assert "trainer.num_nodes is 1 here, and 4 in the checkpoint" in caplog.text
    caplog.clear()
    given = ["--trainer.num_nodes=4"]
    assert complete_arguments("validate", ["big.ckpt", *given], here) == [*taken[:-2], *given]
    monkeypatch.setenv("MASTER_ADDR", "node0")
    assert complete_arguments("validate", ["big.ckpt"], here) == taken[:-2]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert complete_arguments("validate", ["big.ckpt"], here) == taken
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert complete_arguments("validate", ["big.ckpt"], here) == taken[:-2]


def test_resume_auto_needs_the_runs_name(config: Path, here: Path) -> None:
    with pytest.raises(SystemExit, match="name it with --run"):
        main(["fit", "-c", str(config), "--resume", "auto"])


@pytest.mark.slow_cases
@pytest.mark.parametrize("path", ["last", "run", "run/checkpoints/last.ckpt"])
def test_ckpt_path_in_yaml_means_what_the_flag_does(config: Path, here: Path, path: str) -> None:
    main(["fit", "-c", str(config), "--run", "run"])
    before = torch.load(find_checkpoint(here / "run"), weights_only=True)["state_dict"]
    content = yaml.safe_load(config.read_text()) | {"ckpt_path": path, "run": "run"}
    content["trainer"]["max_steps"] = STEPS + 1
    (here / "more.yaml").write_text(yaml.safe_dump(content))
    main(["fit", "-c", "more.yaml"])
    after = torch.load(find_checkpoint(here / "run"), weights_only=True)
    assert after["global_step"] == STEPS + 1
    assert all(torch.allclose(after["state_dict"][name], value, atol=0.01) for name, value in before.items())


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_model_that_waits_for_a_checkpoint_is_never_stepped(command: str, captions: Path, tmp_path: Path) -> None:
    module = Pi05Module(ModelConfig.preset("debug"))
    module.will_be_restored = True
    data = Pi05DataModule({"web": VisionTextConfig(str(captions), val_fraction=0.3)}, batch_size=2, num_workers=0)
    steps = {"max_steps": 1, "limit_val_batches": int(command != "fit"), "num_sanity_val_steps": 0}
    trainer = quiet_trainer(StageSwitch(1, 0), default_root_dir=tmp_path, **steps)
    with pytest.raises(RuntimeError, match="the model has no weights"):
        getattr(trainer, command)(module, data)


def test_newest_checkpoint_is_the_one_with_most_steps_though_files_were_copied(config: Path, here: Path) -> None:
    main(
        [
            "fit",
            "-c",
            str(config),
            "--run",
            "run",
            "--checkpoint.every_n_train_steps",
            "2",
            "--checkpoint.save_top_k",
            "-1",
        ]
    )
    for place, file in enumerate(sorted((here / "run/checkpoints").glob("0*.ckpt"), reverse=True)):
        os.utime(file, (1e9 + place, 1e9 + place))
    (here / "run/checkpoints/last.ckpt").unlink()
    assert steps(here / "run") == STEPS


class Score(Callback):
    begun = 0

    def on_train_batch_start(self, *args: Any) -> None:
        Score.begun += 1

    def state_dict(self) -> dict[str, Any]:
        return {"best": np.float64(0.5)}


class Locked(Score):
    def state_dict(self) -> dict[str, Any]:
        return {"lock": threading.Lock()}


class Added(Score):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["names"] = np.array(["a"], dtype=object)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("kind", "where"), [(Score, "callbacks/Score"), (Locked, "callbacks/Locked"), (Added, "names")]
)
def test_a_checkpoint_that_could_not_be_read_again_is_refused_by_its_callbacks_name_before_the_first_step(
    config: Path, here: Path, kind: type, where: str
) -> None:
    flag = ["--trainer.callbacks", f"[{{class_path: tests.cli.test_run_directory.{kind.__name__}}}]"]
    with pytest.raises(SystemExit, match=re.escape(f"{where} holds more than tensors and plain types")):
        main(["fit", "-c", str(config), "--run", "run", *flag])
    assert not list((here / "run/checkpoints").glob("*.ckpt"))
    assert Score.begun == 0


@pytest.mark.slow
def test_a_checkpoint_of_weights_alone_has_the_average_which_is_measured_and_the_configuration(
    config: Path, here: Path
) -> None:
    flags = ["--checkpoint.save_weights_only", "true", "--ema.decay", "0.5"]
    main(["fit", "-c", str(config), "--run", "run", *flags])
    content = torch.load(find_checkpoint(here / "run"), weights_only=True)
    assert "optimizer_states" not in content
    weights = locate(here / "run").tensors()
    assert content["ema"]
    assert all(torch.equal(weights[name], average) for name, average in content["ema"].items())
    measured = {}
    for option in ("decay=0.5", "decay=null", "validate=false"):
        main(["validate", "run", f"--ema.{option}"])
        measured[option] = (here / "run/metrics.json").read_text()
    assert measured["decay=0.5"] == measured["decay=null"] != measured["validate=false"]
