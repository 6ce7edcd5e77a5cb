"""`pi05 demo`: the main job end to end, as the commands that a user would type, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pi05_lightning.cli.parts import Part, console, run_parts
from pi05_lightning.evaluation.report.metrics import Metrics, is_empty, ordered
from pi05_lightning.evaluation.report.tables import metrics_tables
from pi05_lightning.files.local import check_writable, read_json, write_json
from pi05_lightning.sim.summary import success_table
from pi05_lightning.types import Subset

Scene = Literal["metaworld", "desk"]
OUT: dict[Scene, Path] = {"metaworld": Path("runs/demo"), "desk": Path("runs/desk")}
HORIZON = 8  # of configs/model/tiny.yaml
CONFIGS: dict[Scene, tuple[str, ...]] = {
    "metaworld": ("configs/tiny.yaml", "experiments/001_metaworld/config.yaml"),
    "desk": ("configs/desk.yaml",),
}


def demo(out: Path | None = None, seed: int = 0, quick: bool = False, scene: Scene = "metaworld") -> None:
    """Data, statistics, tokenizer, training through both stages, validation, rollouts and a page about it.

    Interrupted and started again it goes on with the first part that is not done.

    Args:
        out: the directory of everything that is made; by default runs/demo, or runs/desk.
        seed: of the training; the data and the initial states of the rollouts are the same for every seed.
        quick: the smallest amount of everything: shows that all parts run, not how good the policy is.
        scene: metaworld (four tasks, each with a table of its own) or desk (one, where only the instruction says what
            to do: about an hour).

    Raises ValueError when `out` holds a demo with other arguments, SystemExit with a part's status when one fails.
    """
    out = out or OUT[scene]
    check_writable(out, "--out")
    todo = parts(out, seed, quick, scene)
    run_parts(out, todo, lambda: write_summary(out, todo, seed))
    summary = read_json(out / "summary.json")
    metrics = read_json(out / "fit" / "metrics.json", default={})
    success = success_table(summary["success"], summary.get("per_minute", {}), summary.get("held_out", False))
    console.print(*metrics_tables(metrics), success)
    console.print(f"page         {out / 'index.html'}", highlight=False, soft_wrap=True)
    console.print(f"TensorBoard  tensorboard --logdir {out / 'fit'}", highlight=False, soft_wrap=True)


def parts(out: Path, seed: int, quick: bool, scene: Scene = "metaworld") -> list[Part]:
    """The demo's commands, in order."""
    data, fast, run = out / "data", out / "fast", out / "fit"
    robot, web = str(data / "robot"), str(data / "web")
    configs = [word for config in CONFIGS[scene] for word in ("-c", config)]
    paths = {"--data.sources.robot.path": robot, "--data.sources.web.path": web, "--data.fast": str(fast)}
    elsewhere = [] if out == OUT[scene] else [word for flag in paths.items() for word in flag]
    collect = ["--episodes", "4", "--val_episodes", "2", "--scenes", "10"] if quick else []
    short = ("pretrain_steps=4", "pretrain.warmup_steps=1", "posttrain_steps=4", "posttrain.warmup_steps=1")
    fit = [*(f"--stages.{option}" for option in short), "--data.val_samples=8"] if quick else []
    rollout = ["--episodes", "2", "--max_seconds", "1"] if quick else []
    if scene == "desk":
        shares = ["--rephrased_share", "0.5", "--continued_share", "0.5"]
        collect = ["--env", "Desk", *shares, *collect]
        listening = ["--modes", "[policy,mean_replay]", "--instructions", "[right,swapped,paraphrased,empty]"]
        # every instruction in the same initial states: the page shows them side by side
        rollout = ["--env", "Desk", "--env.same_states", "true", *listening, *(rollout or ["--episodes", "8"])]
    fitted = ("--horizon", str(HORIZON), "--merge", "false")
    return [
        # a directory whose part is not marked as done may be whole all the same
        Part("collect", ("collect", str(data), "--overwrite", "true", *collect)),
        Part("stats", ("stats", robot)),
        # a token per coefficient: so small a model does not learn how many a merged one stands for
        Part(
            "tokenizer",
            ("tokenizer", robot, "--out", str(fast), *fitted, "--overwrite", "true"),
        ),
        Part(
            "fit",
            ("fit", *configs, "--run", str(run), "--seed_everything", str(seed), *elsewhere, *fit),
            resume=("fit", "--ckpt_path", str(run)),
            resume_from=run / "checkpoints" / "last.ckpt",
        ),
        Part("validate", ("validate", str(run))),
        Part("rollout", ("rollout", str(run), *rollout)),
        Part("page", ("report", str(run), "--out", str(out / "index.html"), "--summary", str(out / "summary.json"))),
    ]


def write_summary(out: Path, todo: list[Part], seed: int) -> None:
    """summary.json: the seconds of every part done so far, the metrics per modality, success."""
    markers = {part.name: read_json(out / "parts" / f"{part.name}.json", default={}) for part in todo}
    rollout = read_json(out / "fit" / "rollout" / "rollout.json", default={})
    summary = {
        "seed": seed,
        "seconds": {name: marker["seconds"] for name, marker in markers.items() if marker},
        "metrics": by_modality(read_json(out / "fit" / "metrics.json", default={})),
        "success": rollout.get("success", {}),
        "per_minute": rollout.get("per_minute", {}),
        "held_out": rollout.get("held_out", False),
    }
    write_json(out / "summary.json", summary)


def by_modality(metrics: Metrics) -> Metrics:
    """modality -> metric -> value over all sources: of the row `qa`, or of `robot/qa` where there is no other source.

    Without rows of no sample, what is measured per dim and step, and what is no number.
    """
    names = [name for name in ordered(metrics) if not is_empty(metrics[name])]
    rows = {str(Subset.parse(name).modality): metrics[name] for name in names}  # all sources come last
    return {
        modality: {metric: value for metric, value in row.items() if value is not None and "/" not in metric}
        for modality, row in rows.items()
    }
