"""Cross-entropy in chunks, and generation with a cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pi05_lightning.models.heads import token
from pi05_lightning.models.heads.token import generate, score_tokens
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Prefix, Target, index_targets

from .small import make_batch, small_config, small_model

PROMPTS = ["iippp", "p", "ipppppp", "iip"]


@pytest.fixture(scope="module")
def model() -> Pi05:
    return small_model(small_config(depth=3))


@pytest.fixture(scope="module")
def batch(model: Pi05) -> Batch:
    return make_batch(model.config, PROMPTS)


@pytest.fixture(scope="module")
def prefix(model: Pi05, batch: Batch) -> Prefix:
    with torch.no_grad():
        return model.backbone(batch)


# --- cross-entropy

VOCAB = 50


def plain_and_chunked(rows: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """(loss per token, gradient of hidden, gradient of embedding), plain and in chunks of `rows` positions."""
    torch.manual_seed(0)
    hidden, embedding, targets = torch.randn(23, 16), torch.randn(VOCAB, 16), torch.randint(0, VOCAB, (23,))
    weight = torch.rand(23)
    results = []
    for chunked in (False, True):
        h, e = hidden.clone().requires_grad_(), embedding.clone().requires_grad_()
        if chunked:
            monkeypatch.setattr(token, "CHUNK_BYTES", 4 * VOCAB * rows)
            nll = score_tokens(h, e, targets).nll
        else:
            nll = F.cross_entropy(h @ e.T, targets, reduction="none")
        (nll * weight).sum().backward()
        assert h.grad is not None
        assert e.grad is not None
        results.append((nll.detach(), h.grad, e.grad))
    return results


@pytest.mark.parametrize("rows", [1, 5, 22, 23])
def test_chunked_cross_entropy_and_its_gradients_equal_plain_ones(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, chunked = plain_and_chunked(rows, monkeypatch)
    for expected, found in zip(plain, chunked, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_scores_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, embedding, targets = torch.randn(23, 16), torch.randn(VOCAB, 16), torch.randint(0, VOCAB, (23,))
    whole = score_tokens(hidden, embedding, targets)
    monkeypatch.setattr(token, "CHUNK_BYTES", 4 * VOCAB * 3)
    for expected, found in zip(whole, score_tokens(hidden, embedding, targets), strict=True):
        torch.testing.assert_close(found, expected)


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token, "CHUNK_BYTES", 4 * VOCAB * 4)
    hidden, embedding = torch.randn(23, 16, requires_grad=True), torch.randn(VOCAB, 16, requires_grad=True)
    widest = []
    linear = F.linear

    def watched(*args: Tensor) -> Tensor:
        widest.append(len(args[0]))
        return linear(*args)

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    monkeypatch.setattr(F, "linear", watched)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        nll = score_tokens(hidden, embedding, torch.randint(0, VOCAB, (23,))).nll
    nll.sum().backward()
    assert max(widest) == 4
    assert max(saved) < 23 * VOCAB


def test_correct_marks_the_most_likely_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token, "CHUNK_BYTES", 4 * 4 * 2)
    embedding = torch.eye(4)
    scores = score_tokens(embedding[[0, 1, 2, 0]], embedding, torch.tensor([0, 1, 1, 2]))
    assert scores.correct.tolist() == [True, True, False, False]


def test_loss_of_a_token_is_read_at_the_token_before_it(model: Pi05) -> None:
    batch = make_batch(model.config, ["ipptt", "pff"])
    out = model(batch)
    hidden = model.backbone(batch).hidden
    logits = hidden @ model.backbone.embed_tokens.weight.T
    expected = [
        F.cross_entropy(logits[row, column - 1], batch.tokens[row, column])
        for row, column in ((0, 2), (0, 3), (1, 1), (1, 2))
    ]
    torch.testing.assert_close(torch.cat([out["text"].values, out["fast"].values]), torch.stack(expected))


# --- generation


@torch.no_grad()
def recompute(model: Pi05, batch: Batch, steps: int, temperature: float = 0, seed: int = 0) -> Tensor:
    """What `generate` says, by running the whole sequence again for every token; no stop."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(batch)
    said = torch.zeros(rows, 0, dtype=torch.long)
    for _ in range(steps):
        whole = with_tokens(batch, said)
        hidden = model.backbone(whole).hidden
        assert hidden is not None
        last = hidden[torch.arange(rows), whole.token_mask.sum(1) - 1]
        logits = last @ model.backbone.embed_tokens.weight.T
        if temperature:
            following = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            following = logits.argmax(-1, keepdim=True)
        said = torch.cat([said, following], 1)
    return said


def with_tokens(batch: Batch, said: Tensor, kind: Target = Target.SUBTASK) -> Batch:
    """The batch with predicted tokens behind each row's last one."""
    count, more = batch.token_mask.sum(1), said.shape[1]
    tokens = F.pad(batch.tokens, (0, more))
    place = count[:, None] + torch.arange(more)
    tokens = tokens.scatter(1, place, said)
    predicted = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, place, True)
    return replace(
        batch,
        tokens=tokens,
        token_mask=F.pad(batch.token_mask, (0, more)) | predicted,
        causal=predicted,
        target_kind=predicted.to(torch.uint8) * int(kind),
        target_index=index_targets(predicted.to(torch.uint8) * int(kind)),
    )


NEVER = -1


def test_greedy_generation_equals_recomputing_without_a_cache(model: Pi05, batch: Batch, prefix: Prefix) -> None:
    tokens, valid, _ = generate(model.backbone, prefix, max_tokens=12, stop_id=NEVER, flow_visible=True)
    expected = recompute(model, batch, 12)
    assert len(expected.unique()) > 10  # else the comparison says little
    assert valid.all()
    assert tokens.tolist() == expected.tolist()


def test_sampled_generation_equals_recomputing_without_a_cache(model: Pi05, batch: Batch, prefix: Prefix) -> None:
    tokens, _, _ = generate(
        model.backbone,
        prefix,
        max_tokens=8,
        stop_id=NEVER,
        flow_visible=True,
        temperature=2.0,
        generator=torch.Generator().manual_seed(3),
    )
    assert tokens.tolist() == recompute(model, batch, 8, temperature=2.0, seed=3).tolist()


def test_each_row_stops_at_its_own_stop_token(model: Pi05, batch: Batch, prefix: Prefix) -> None:
    free = recompute(model, batch, 12).tolist()
    stop = free[0][3]
    tokens, valid, _ = generate(model.backbone, prefix, max_tokens=12, stop_id=stop, flow_visible=True)
    lengths = [row.index(stop) + 1 if stop in row else 12 for row in free]
    assert min(lengths) < max(lengths)
    assert valid.sum(1).tolist() == lengths
    for row, length, expected in zip(tokens.tolist(), lengths, free, strict=True):
        assert row[:length] == expected[:length]


def test_generation_ends_when_all_rows_have_stopped(model: Pi05, prefix: Prefix) -> None:
    tokens, _, _ = generate(
        model.backbone, prefix, max_tokens=12, stop_id=5, flow_visible=True, forced=torch.tensor([9, 5])
    )
    assert tokens.tolist() == [[9, 5]] * len(PROMPTS)


def test_forced_tokens_open_what_is_said(model: Pi05, batch: Batch, prefix: Prefix) -> None:
    opening = torch.tensor([11, 40, 8])
    tokens, _, _ = generate(model.backbone, prefix, max_tokens=6, stop_id=NEVER, flow_visible=True, forced=opening)
    assert tokens[:, :3].tolist() == [opening.tolist()] * len(PROMPTS)
    expected = with_tokens(batch, tokens[:, :5])
    hidden = model.backbone(expected).hidden
    assert hidden is not None
    last = hidden[torch.arange(4), expected.token_mask.sum(1) - 1]
    assert tokens[:, 5].tolist() == (last @ model.backbone.embed_tokens.weight.T).argmax(-1).tolist()


def test_flow_head_reads_what_was_said_as_if_it_had_been_given(model: Pi05, batch: Batch, prefix: Prefix) -> None:
    stop = recompute(model, batch, 6).tolist()[0][2]
    tokens, valid, extended = generate(model.backbone, prefix, max_tokens=6, stop_id=stop, flow_visible=True)
    noise = torch.randn(len(batch), 1, model.config.horizon, model.config.action_dim)
    chunks = model.flow_head.sample(extended, noise, 2)
    for row in range(len(batch)):
        one = make_batch(model.config, PROMPTS[: row + 1])
        said = with_tokens(one, tokens[: row + 1, : valid[row].sum()])
        with torch.no_grad():
            expected = model.flow_head.sample(model.backbone(said), noise[: row + 1], 2)[row]
        torch.testing.assert_close(chunks[row], expected)


def test_flow_head_does_not_read_what_is_not_for_it(model: Pi05, prefix: Prefix) -> None:
    _, _, extended = generate(model.backbone, prefix, max_tokens=5, stop_id=NEVER, flow_visible=False)
    noise = torch.randn(len(PROMPTS), 1, model.config.horizon, model.config.action_dim)
    torch.testing.assert_close(model.flow_head.sample(extended, noise, 2), model.flow_head.sample(prefix, noise, 2))


# --- heads


def test_subtask_head_never_says_a_fast_token(model: Pi05, prefix: Prefix) -> None:
    tokens, _, _ = model.subtask_head.generate(
        model.backbone, prefix, max_tokens=40, temperature=50.0, generator=torch.Generator().manual_seed(0)
    )
    assert not set(tokens.flatten().tolist()) & set(model.fast_head.ids)


def test_fast_head_says_exactly_as_many_coefficients_as_a_chunk_has(model: Pi05, prefix: Prefix) -> None:
    lengths = torch.tensor([1, 2, 3, 5] * 8)
    tokens, valid = model.fast_head.generate(model.backbone, prefix, lengths, 17, torch.tensor([20, 21]))
    assert (lengths[tokens] * valid).sum(1).tolist() == [17] * len(PROMPTS)


def test_fast_head_leaves_nothing_that_no_token_can_fill(model: Pi05, prefix: Prefix) -> None:
    """Tokens of 3 and 5 coefficients: after any first choice, 11 must still come out, which is 3 + 3 + 5."""
    lengths = torch.tensor([3, 5, 0, 3] * 8)
    tokens, valid = model.fast_head.generate(model.backbone, prefix, lengths, 11, torch.tensor([20]), temperature=9.0)
    assert [sorted(lengths[row[mask]].tolist()) for row, mask in zip(tokens, valid, strict=True)] == [[3, 3, 5]] * 4


def test_fast_head_refuses_a_chunk_that_no_tokens_make(model: Pi05, prefix: Prefix) -> None:
    lengths = torch.tensor([3, 5, 0, 3] * 8)
    with pytest.raises(ValueError, match="expands to 7 coefficients"):
        model.fast_head.generate(model.backbone, prefix, lengths, 7, torch.tensor([20]))


def test_free_fast_generation_is_plain_generation(model: Pi05, prefix: Prefix) -> None:
    lengths, opening = torch.ones(32, dtype=torch.long), torch.tensor([20, 21])
    plain, kept, _ = generate(model.backbone, prefix, max_tokens=10, stop_id=NEVER, flow_visible=False, forced=opening)
    tokens, valid = model.fast_head.generate(model.backbone, prefix, lengths, 7, opening, closing_id=NEVER)
    assert torch.equal(valid, kept[:, 2:])
    assert torch.equal(model.fast_head.top - tokens, plain[:, 2:])


def test_fast_head_says_the_likeliest_token_that_still_fits(model: Pi05, prefix: Prefix) -> None:
    lengths = torch.ones(32, dtype=torch.long)
    tokens, _ = model.fast_head.generate(model.backbone, prefix, lengths, 1, torch.tensor([], dtype=torch.long))
    assert prefix.hidden is not None
    token_mask = prefix.mask[:, -prefix.hidden.shape[1] :]
    last = (token_mask * torch.arange(token_mask.shape[1])).argmax(1)
    logits = prefix.hidden[torch.arange(len(PROMPTS)), last] @ model.backbone.embed_tokens.weight.T
    ids = model.fast_head.ids
    expected = ids.stop - 1 - (ids.start + logits[:, ids.start : ids.stop].argmax(-1))
    assert tokens[:, 0].tolist() == expected.tolist()
