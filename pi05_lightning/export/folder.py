"""The folder of an exported policy: graphs, tables, tokenizer, the manifest, and the runner that reads them."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pi05_lightning.acting.inference import Inference
from pi05_lightning.export import runner
from pi05_lightning.export.formats import ENDINGS, SAVE, Format, Stored, quietly
from pi05_lightning.export.graphs import flow_table, graphs_of
from pi05_lightning.files.local import sha256, write_json, write_text

MANIFEST = "manifest.json"
CALLERS = ("execution_horizon", "inference_delay", "rtc", "on_failed_decode")
"""Options of `Acting` that the runner leaves to whoever calls it: `act` gives whole chunks, or raises."""


def write(folder: Path, policy: Inference, format: Format, stored: Stored = "float32") -> dict[str, Any]:
    """Write a policy whose model is in float32, as the one robot that it acts as; returns what the manifest says.

    stored: what the graphs' weights are stored in; the embedding of tokens stays in float32.
    """
    model, processor = policy.model, policy.processor
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # ONNX's exporter fails on those that do
    graphs: dict[str, Any] = {}
    with quietly():
        for name, graph in graphs_of(model, policy.horizon).items():
            path = folder / f"{name}{ENDINGS[format]}"
            SAVE[format](graph, path, stored)
            graphs[name] = {"file": path.name, "inputs": graph.inputs, "outputs": graph.outputs}
    np.save(folder / "embedding.npy", model.backbone.embed_tokens.weight.numpy())
    np.save(folder / "modulations.npy", flow_table(model.flow_head, policy.acting.num_steps).numpy())
    write_text(folder / "tokenizer.json", processor.tokenizer.to_dict()["tokenizer"])
    shutil.copyfile(runner.__file__, folder / "runner.py")
    files = sorted(path for path in folder.iterdir() if path.name != "runner.py")
    manifest = {
        "format": format,
        "dtype": stored,
        "graphs": graphs,
        "files": {path.name: sha256(path) for path in files},
        **described(policy),
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def described(policy: Inference) -> dict[str, Any]:
    """What the runner must know of a policy: what it can do, how it acts, dimensions, statistics, prompts, tokens."""
    config, processor, language = policy.model.config, policy.processor, policy.processor.language
    robot, tokenizer = processor.robots[policy.robot], processor.tokenizer
    quantiles = robot.to_dict()["quantiles"]
    acting = {name: value for name, value in asdict(policy.resolved).items() if name not in CALLERS}
    return {
        "acting": acting | {"max_prompt_bytes": policy.inputs.max_prompt_bytes},
        "able": {
            "flow": policy.abilities.flow,
            "fast": policy.abilities.fast,
            "subtask": robot.has_subtasks and policy.trained.able("subtask"),
            "text": policy.trained.able("text"),
        },
        "model": {
            "backbone_type": config.backbone_type,
            "image_size": config.vision.image_size,
            "horizon": config.horizon,
            "action_dim": config.action_dim,
            "layers": config.language.depth,
            "kv_heads": config.language.num_kv_heads,
            "head_dim": config.language.head_dim,
            "cameras": processor.cameras,
            "max_delay": policy.abilities.max_delay,
        },
        "robot": {
            "name": policy.robot,
            "cameras": processor.cameras_of(policy.robot),
            "tasks": robot.tasks,
            "fps": robot.fps if robot.fps_is_known else None,
            "horizon": robot.horizon,
            "embodiment": robot.embodiment,
            "control_mode": robot.control_mode,
            "state": quantiles["state"],
            "action": quantiles["action"],
            "state_range": robot.state_range,
            "relative": robot.to_dict()["relative"],
        },
        "prompts": asdict(language.prompts),
        "condition_on": language.condition_on,
        "untold": language.untold,
        "max_tokens": language.max_tokens,
        "tokens": {
            **{name: getattr(tokenizer, f"{name}_id") for name in ("pad", "bos", "eos")},
            "fast": [policy.model.fast_head.ids[0], policy.model.fast_head.ids[-1]],
        },
        "fast": fast_of(policy),
    }


def fast_of(policy: Inference) -> dict[str, Any] | None:
    """FAST's tokens by their number, each with the bytes that it stands for; None where it was not trained on them."""
    fast = policy.processor.fast
    if fast is None or not policy.abilities.fast:
        return None
    return {"scale": fast.scale, "min_token": fast.min_token, "pieces": [piece.hex() for piece in fast.pieces]}
