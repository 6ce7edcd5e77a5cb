"""What is measured on real batches, with models whose answers are known: zero weights, or scripted tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from pi05_lightning import Pi05DataModule
from pi05_lightning.evaluation.metrics import Evaluator, SubsetMetrics
from pi05_lightning.evaluation.metrics.measure import FLOW_TIMES, NOISE_SEED, without_targets
from pi05_lightning.models.flow_noise import draw_noise
from pi05_lightning.models.heads.location import LocationHead
from pi05_lightning.types import Batch, Modality, Subset, Target

from .conftest import batches, values

CONTINUOUS, FAST = "robot/continuous_robot_actions", "robot/fast_robot_actions"
SUBTASK, QA = "robot/hl_subtask", "robot/qa"


@pytest.fixture
def still(evaluator: Evaluator) -> Evaluator:
    """A flow head whose velocity is 0: the sampled chunk is the noise, the flow loss (noise - action)²."""
    torch.nn.init.zeros_(evaluator.model.flow_head.action_out_proj.weight)
    torch.nn.init.zeros_(evaluator.model.flow_head.action_out_proj.bias)
    return evaluator


@pytest.fixture
def indifferent(evaluator: Evaluator) -> Evaluator:
    """An embedding of zeros: every token is as likely as every other."""
    torch.nn.init.zeros_(evaluator.model.backbone.embed_tokens.weight)
    return evaluator


def noise_of(batch: Batch, draws: int = len(FLOW_TIMES)) -> torch.Tensor:
    return draw_noise(batch.key, NOISE_SEED, draws, *batch.actions.shape[1:])[0]


def test_flow_loss_is_the_mean_over_a_fixed_grid(still: Evaluator, data: Pi05DataModule) -> None:
    given = batches(data, CONTINUOUS)
    squares = [(noise_of(b) - b.actions[:, None]).square()[b.action_mask[:, None].expand(-1, 8, -1, -1)] for b in given]
    assert values(still, CONTINUOUS, *given)["flow_loss"] == pytest.approx(float(torch.cat(squares).mean()), rel=1e-5)


def test_flow_loss_of_a_time_is_that_of_its_draw(still: Evaluator, data: Pi05DataModule) -> None:
    (batch, *_) = batches(data, CONTINUOUS)
    expected = (noise_of(batch)[:, 2] - batch.actions).square()[batch.action_mask].mean()
    assert values(still, CONTINUOUS, batch)[f"flow_loss/t_{FLOW_TIMES[2]:.2f}"] == pytest.approx(
        float(expected), rel=1e-5
    )


def test_flow_loss_of_a_time_is_at_that_time(evaluator: Evaluator, data: Pi05DataModule) -> None:
    (batch, *_) = batches(data, CONTINUOUS)
    time = torch.full((len(batch.actions), 1), FLOW_TIMES[2])
    prefix, head, mask = evaluator.model.backbone(batch), evaluator.model.flow_head, batch.action_mask
    squares = head.squared_error(prefix, batch.actions, noise_of(batch)[:, 2:3], time, mask.any(-1))[:, 0]
    assert values(evaluator, CONTINUOUS, batch)[f"flow_loss/t_{FLOW_TIMES[2]:.2f}"] == pytest.approx(
        float(squares[mask].detach().mean()), rel=1e-5
    )


def test_chunks_are_sampled_in_as_many_steps_as_is_said(evaluator: Evaluator, data: Pi05DataModule) -> None:
    (batch, *_) = batches(data, CONTINUOUS)
    found = [values(replace(evaluator, num_steps=n), CONTINUOUS, batch)["action_mae"] for n in (1, 2)]
    prefix, noise = evaluator.model.backbone(batch), noise_of(batch)[:, :1]
    chunks = [evaluator.model.flow_head.sample(prefix, noise, n)[:, 0] for n in (1, 2)]
    errors = [float((chunk - batch.actions).abs()[batch.action_mask].mean()) for chunk in chunks]
    assert found == pytest.approx(errors, rel=1e-5)
    assert abs(errors[0] - errors[1]) > 1e-4


def test_actions_are_accurate_within_the_threshold_that_is_said(still: Evaluator, data: Pi05DataModule) -> None:
    (batch, *_) = batches(data, CONTINUOUS)
    error = (noise_of(batch)[:, 0] - batch.actions)[batch.action_mask].abs()
    found = values(replace(still, accuracy_threshold=0.5), CONTINUOUS, batch)["action_accuracy"]
    assert found == pytest.approx(float((error <= 1.0).float().mean()))  # of a range of 2
    assert 0 < found < 1


def test_action_error_is_that_of_the_first_draw(still: Evaluator, data: Pi05DataModule) -> None:
    (batch, *_) = batches(data, CONTINUOUS)
    error = (noise_of(batch)[:, 0] - batch.actions)[batch.action_mask]
    found = values(still, CONTINUOUS, batch)
    assert found["action_mse"] == pytest.approx(float(error.square().mean()), rel=1e-5)
    assert found["action_mae"] == pytest.approx(float(error.abs().mean()), rel=1e-5)
    assert found["action_accuracy"] == pytest.approx(float((error.abs() <= 0.2).float().mean()), rel=1e-5)


def test_grid_of_times_averages_to_the_mean_that_training_draws() -> None:
    # Beta(1.5, 1) has mean 0.6
    assert sum(FLOW_TIMES) / len(FLOW_TIMES) == pytest.approx(0.999 * 0.6 + 0.001, abs=2e-3)


def test_what_is_padded_does_not_change_anything(evaluator: Evaluator, data: Pi05DataModule) -> None:
    (batch, *_) = batches(data, CONTINUOUS)
    expected = values(evaluator, CONTINUOUS, batch)
    other = torch.where(batch.action_mask, batch.actions, 7.0)
    batch.actions = other
    found = values(evaluator, CONTINUOUS, batch)
    for metric in ("action_mse", "action_mae", "action_accuracy", "action_mae_real", "action_mse_real"):
        assert found[metric] == expected[metric]


@pytest.mark.parametrize("name", [CONTINUOUS, FAST, SUBTASK, QA])
def test_measuring_twice_gives_the_same_numbers(evaluator: Evaluator, data: Pi05DataModule, name: str) -> None:
    first, second = (values(evaluator, name, *batches(data, name)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", [CONTINUOUS, FAST, SUBTASK, QA])
def test_batches_of_other_sizes_give_the_same_numbers(evaluator: Evaluator, data: Pi05DataModule, name: str) -> None:
    expected = values(evaluator, name, *batches(data, name))
    data.batch_size = 3
    assert values(evaluator, name, *batches(data, name)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", [SUBTASK, QA, FAST])
def test_perplexity_of_an_indifferent_model_is_its_vocabulary(
    indifferent: Evaluator, data: Pi05DataModule, name: str
) -> None:
    found = values(indifferent, name, *batches(data, name))
    vocabulary = indifferent.model.config.vocab_size
    assert found["cross_entropy"] == pytest.approx(math.log(vocabulary), rel=1e-5)
    assert found["perplexity"] == pytest.approx(vocabulary, rel=1e-4)


def truth(batch: Batch, kind: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """The true tokens of a kind, left-aligned as a head writes them, and which are valid."""
    rows = [ids[of == kind] for ids, of in zip(batch.tokens, batch.target_kind, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def test_exact_match_counts_texts_that_are_generated_as_they_should(
    evaluator: Evaluator, data: Pi05DataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch, *_) = batches(data, SUBTASK)
    tokens, valid = truth(batch, Target.SUBTASK)
    tokens[0, 0] = tokens[0, 1]
    monkeypatch.setattr(evaluator.model.subtask_head, "generate", lambda *_, **__: (tokens, valid, None))
    assert values(evaluator, SUBTASK, batch)["exact_match"] == 1 - 1 / len(batch)


def test_box_iou_counts_answers_with_boxes_alone(
    evaluator: Evaluator, data: Pi05DataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = data.validation
    entry = samples.subsets.index(Subset.parse(QA))
    frame = samples.sources["robot"][int(samples.indices[entry][0])]
    asked = [data.processor.sample(frame, Subset.parse(QA), key) for key in range(8)]
    batch = data.processor.collate(asked)
    tokens, valid = truth(batch, Target.TEXT)
    monkeypatch.setattr(evaluator.model.subtask_head, "generate", lambda *_, **__: (tokens, valid, None))
    found = values(evaluator, QA, batch)
    assert found["box_iou"] == pytest.approx(1)
    assert found["exact_match"] == 1


def test_answers_that_are_boxes_do_not_count_in_exact_match(
    evaluator: Evaluator, data: Pi05DataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = data.validation
    frame = samples.sources["robot"][int(samples.indices[samples.subsets.index(Subset.parse(QA))][0])]
    asked = [data.processor.sample(frame, Subset.parse(QA), key) for key in range(8)]
    tokenizer, batch = data.processor.tokenizer, data.processor.collate(asked)
    tokens, valid = truth(batch, Target.TEXT)
    for row in tokens:  # every box is missed by one step
        row[0] += row[0] in tokenizer.loc_ids
    monkeypatch.setattr(evaluator.model.subtask_head, "generate", lambda *_, **__: (tokens, valid, None))
    found = values(evaluator, QA, batch)
    assert found["exact_match"] == 1
    assert found["box_iou"] < 1


def test_answers_without_boxes_have_no_iou(
    evaluator: Evaluator, data: Pi05DataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "box_iou" not in values(evaluator, SUBTASK, *batches(data, SUBTASK))


def scripted(batch: Batch, evaluator: Evaluator, free_is_broken: int) -> Any:
    """A FAST head that says the truth, but breaks off in its first rows when nothing holds it to what decodes."""
    ids = evaluator.model.fast_head.ids
    rows = [[i for i in row.tolist() if i in ids] for row in batch.tokens]

    def generate(*_: Any, closing_id: int | None = None, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        said = [row[:1] if closing_id is not None and n < free_is_broken else row for n, row in enumerate(rows)]
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in said], batch_first=True)
        valid = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in said])[:, None]
        return torch.where(valid, evaluator.model.fast_head.top - tokens, 0), valid

    return generate


@pytest.mark.parametrize("broken", [0, 1])
def test_decode_success_is_of_what_is_written_freely(
    evaluator: Evaluator, data: Pi05DataModule, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    (batch, *_) = batches(data, FAST)
    monkeypatch.setattr(evaluator.model.fast_head, "generate", scripted(batch, evaluator, broken))
    assert values(evaluator, FAST, batch)["decode_success"] == 1 - broken / len(batch)


def test_action_error_of_true_tokens_is_what_fast_loses(
    evaluator: Evaluator, data: Pi05DataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch, *_) = batches(data, FAST)
    monkeypatch.setattr(evaluator.model.fast_head, "generate", scripted(batch, evaluator, 1))
    fast = data.processor.fast
    assert fast is not None
    frames = [
        data.validation.sources["robot"][
            int(data.validation.indices[data.validation.subsets.index(Subset.parse(FAST))][k])
        ]
        for k in batch.key
    ]
    chunks = torch.stack([torch.from_numpy(data.processor.normalize(f, "robot").actions) for f in frames])
    lost = (torch.from_numpy(fast.reconstruct(chunks.numpy())) - chunks).abs()[batch.fast_action_mask[..., :2]]
    assert values(evaluator, FAST, batch)["action_mae"] == pytest.approx(float(lost.mean()), rel=1e-4)


def test_subtask_that_fast_tokens_follow_is_not_measured_with_them(evaluator: Evaluator, data: Pi05DataModule) -> None:
    (batch, *_) = batches(data, FAST)
    alone = evaluator.measure(batch, Subset.parse(FAST)).values
    prefix = evaluator.model.backbone(batch)
    nll = evaluator.model.fast_head.score(batch, prefix, evaluator.model.backbone, Target.FAST).nll
    batch.target_index[Target.SUBTASK] = batch.target_index[Target.FAST][:5] - 1
    with_subtask = evaluator.measure(batch, Subset.parse(FAST)).values
    for found in (alone, with_subtask):
        torch.testing.assert_close(found["cross_entropy"].values, nll)
        targets = batch.tokens.flatten()[batch.target_index[Target.FAST]]
        own = torch.tensor([int(token) in evaluator.model.fast_head.ids for token in targets])
        assert 0 < own.sum() < len(own)
        assert (found["token_accuracy"].mask == own).all()


def test_subtask_that_actions_follow_is_not_hidden_with_the_actions(evaluator: Evaluator, data: Pi05DataModule) -> None:
    (batch, *_) = batches(data, FAST)
    batch.target_kind[:, 3] = Target.SUBTASK
    hidden = batch.token_mask & ~without_targets(batch).token_mask
    assert (batch.target_kind[hidden] == Target.FAST).all()
    assert hidden.sum() == (batch.target_kind == Target.FAST).sum()


def test_example_of_a_chunk_is_of_its_own_row(evaluator: Evaluator, data: Pi05DataModule) -> None:
    (batch, *_) = batches(data, CONTINUOUS)
    measured = evaluator.measure(batch, Subset.parse(CONTINUOUS))
    last, alone = len(batch) - 1, measured.examples([len(batch) - 1])[0].draws
    every = measured.examples([*range(len(batch))])[last].draws
    assert alone == pytest.approx(every, abs=1e-5)


def test_example_of_a_chunk_has_draws_in_real_units_without_padded_steps(
    still: Evaluator, data: Pi05DataModule
) -> None:
    batch = batches(data, CONTINUOUS)[-1]
    (example,) = still.measure(batch, Subset.parse(CONTINUOUS)).examples([len(batch) - 1])
    steps = int(batch.action_mask[-1].any(-1).sum())
    quantiles = data.processor.robots["robot"].normalize.action
    assert example.actions is not None
    assert example.draws is not None
    assert example.actions.shape == (steps, 2)
    assert example.draws.shape == (8, steps, 2)
    assert still.measure(batch, Subset.parse(CONTINUOUS)).examples([]) == []
    assert example.draws == pytest.approx(quantiles.unnormalize(noise_of(batch)[-1, :, :steps, :2].numpy()), abs=1e-4)


def test_example_shows_what_was_asked_and_the_pictures_it_was_asked_about(
    evaluator: Evaluator, data: Pi05DataModule
) -> None:
    (batch, *_) = batches(data, SUBTASK)
    (example,) = evaluator.measure(batch, Subset.parse(SUBTASK)).examples([0])
    assert example.prompt.startswith("Task: ")
    assert example.truth.startswith("Subtask: ")
    assert len(example.images) == 2


class Twice(LocationHead):
    metrics: ClassVar = {"samples": frozenset({Modality.QA})}


def test_metrics_of_one_name_are_refused(evaluator: Evaluator) -> None:
    evaluator.model.auxiliary["own"] = Twice()
    with pytest.raises(ValueError, match=r"model\.heads\.own measures samples, as others do"):
        SubsetMetrics(Subset.parse(QA), evaluator.model)
