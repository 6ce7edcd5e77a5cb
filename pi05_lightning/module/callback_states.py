"""Callbacks of a run that goes on: a state that is restored must not undo an argument."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint


def arguments(callback: Callback) -> dict[str, Any]:
    """The arguments of a callback that it keeps under their names, of plain types."""
    names = inspect.signature(type(callback).__init__).parameters
    values = {name: getattr(callback, name) for name in names if hasattr(callback, name)}
    # of exactly these types: a checkpoint with others could not be read
    return {name: value for name, value in values.items() if value is None or type(value) in (bool, int, float, str)}


def reapply(callback: Callback, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Give a callback its arguments again where a state undid them; an unchanged one goes on as it was restored.

    then, now: its `arguments` when the checkpoint was written, and before the state was restored.
    """
    for name, value in now.items():
        if name in then and then[name] != value and getattr(callback, name) != value:
            setattr(callback, name, value)
    if isinstance(callback, ModelCheckpoint) and callback.best_k_models:
        keep_best(callback, callback.best_k_models)


def keep_best(callback: ModelCheckpoint, found: Iterable[str]) -> None:
    """Of the checkpoints that a callback scored and that were found, know the `save_top_k` best; files stay."""
    ranked = sorted(found, key=lambda path: float(callback.best_k_models[path]), reverse=callback.mode == "max")
    ranked = ranked[: callback.save_top_k if callback.save_top_k >= 0 else None]
    callback.best_k_models = {path: callback.best_k_models[path] for path in ranked}
    callback.best_model_path, callback.kth_best_model_path = (ranked[0], ranked[-1]) if ranked else ("", "")
    callback.best_model_score = callback.best_k_models.get(callback.best_model_path)
    if ranked:
        callback.kth_value = callback.best_k_models[callback.kth_best_model_path]


def find_states(callbacks: Sequence[Callback], states: Mapping[str, Any]) -> dict[str, Any]:
    """The states of callbacks under their keys of today: Lightning's of a ModelCheckpoint says also when it saves."""
    keys, found = {callback.state_key for callback in callbacks}, dict(states)
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.state_key not in states:
            scored = callback.state_key.partition("'every_n_train_steps'")[0]
            former = [key for key in found if key.startswith(scored) and key not in keys]
            if len(former) == 1:
                found[callback.state_key] = found.pop(former[0])
    return found
