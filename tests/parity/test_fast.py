"""FAST cross-entropy and greedy decoding against LeRobot's pi0_fast on the same weights."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPytorch
from torch import Tensor

from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.token import generate
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch, Target, index_targets
from pi05_lightning.weights.lerobot import LM_HEAD, to_ours

from .reference import Inputs, build_lerobot_fast, make_inputs, relative_error

BOS, BAR, FAST_LENGTH = 2, 7, 9
SKIP = 128  # pi0_fast's
PRESENT = [[True, False], [True, True], [False, True]]
PROMPT = [1, 12, 5]
TARGETS = [9, 4, 6]


@pytest.fixture(scope="module")
def lerobot_fast(config: ModelConfig) -> PI0FastPytorch:
    tokenizer = SimpleNamespace(bos_token_id=BOS, convert_tokens_to_ids=lambda token: BAR)
    model = build_lerobot_fast(config, tokenizer)
    embedding = model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight
    embedding.data.mul_(0.05)  # else the residual stream carries each token to the output, to be said again
    model.get_parameter(LM_HEAD).data.copy_(embedding.data)  # tied in π0.5, drawn apart here
    return model


@pytest.fixture(scope="module")
def ours_fast(config: ModelConfig, lerobot_fast: PI0FastPytorch) -> Pi05:
    model = Pi05(replace(config, fast_skip_tokens=SKIP))
    weights = {to_ours(key): tensor for key, tensor in lerobot_fast.state_dict().items() if to_ours(key)}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(key.startswith("flow_head.") for key in missing)
    return model


@pytest.fixture(scope="module")
def inputs(config: ModelConfig) -> Inputs:
    return make_inputs(config, PRESENT, PROMPT, padded_length=16)


@pytest.fixture(scope="module")
def fast_tokens(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """<bos>, then ids that FAST tokens land on; and which are no padding."""
    tokens = torch.randint(0, config.fast_vocab_size, (3, FAST_LENGTH), generator=torch.Generator().manual_seed(1))
    tokens = config.vocab_size - 1 - SKIP - tokens
    tokens[:, 0] = BOS
    mask = torch.arange(FAST_LENGTH) < torch.tensor(TARGETS)[:, None]
    return tokens.where(mask, 0), mask


def with_segment(x: Inputs, segment: Tensor, mask: Tensor, *, causal: bool) -> Batch:
    """Our batch with a segment after each row's prompt, without the gap that LeRobot's padding leaves."""
    rows = [
        torch.cat([prompt[keep], new[new_keep]])
        for prompt, keep, new, new_keep in zip(x.tokens, x.token_mask, segment, mask, strict=True)
    ]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    column = torch.arange(tokens.shape[1])
    start = x.token_mask.sum(1, keepdim=True)
    token_mask = column < start + mask.sum(1, keepdim=True)
    after = token_mask & (column >= start)
    # <bos>, the segment's first, is given
    kind = (
        torch.where(after & (column > start), int(Target.FAST), int(Target.NONE))
        if causal
        else torch.zeros_like(tokens)
    )
    return replace(
        x.batch,
        tokens=tokens,
        token_mask=token_mask,
        causal=after & causal,
        target_kind=kind.to(torch.uint8),
        target_index=index_targets(kind),
        actions=x.actions[:0],
        noise=x.batch.noise[:0],
        action_mask=x.batch.action_mask[:0],
        time=x.batch.time[:0],
    )


def lerobot_loss(model: PI0FastPytorch, x: Inputs, fast_tokens: tuple[Tensor, Tensor]) -> Tensor:
    return model(x.images, x.image_masks, x.tokens, x.token_mask, *fast_tokens)["ce_loss"]


def test_cross_entropy_is_pi0_fasts(
    lerobot_fast: PI0FastPytorch, ours_fast: Pi05, inputs: Inputs, fast_tokens: tuple[Tensor, Tensor]
) -> None:
    batch = with_segment(inputs, *fast_tokens, causal=True)
    with torch.no_grad():
        expected = lerobot_loss(lerobot_fast, inputs, fast_tokens)
        nll = ours_fast(batch)["fast"].values
    assert len(nll) == sum(TARGETS) - len(TARGETS)
    assert relative_error(nll.mean(), expected) < 1e-5


def test_gradients_of_the_cross_entropy_are_pi0_fasts(
    lerobot_fast: PI0FastPytorch, ours_fast: Pi05, inputs: Inputs, fast_tokens: tuple[Tensor, Tensor]
) -> None:
    lerobot_fast.zero_grad()
    ours_fast.zero_grad()
    lerobot_loss(lerobot_fast, inputs, fast_tokens).backward()
    nll = ours_fast(with_segment(inputs, *fast_tokens, causal=True))["fast"].values
    nll.mean().backward()
    expected = {to_ours(name): p.grad for name, p in lerobot_fast.named_parameters() if to_ours(name)}
    # the head is the embedding here, so its gradient is the sum of both of theirs
    expected["backbone.embed_tokens.weight"] += lerobot_fast.get_parameter(LM_HEAD).grad
    scale = max(grad.abs().max() for grad in expected.values())
    for name, reference in expected.items():
        found = ours_fast.get_parameter(name).grad
        assert found is not None, name
        if reference.abs().max() < 1e-7 * scale:  # SigLIP's k_proj.bias: zero in theory
            assert found.abs().max() < 1e-6 * scale, name
        else:
            assert relative_error(found, reference) < 1e-4, name


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_decoding_is_pi0_fasts_token_for_token(
    lerobot_fast: PI0FastPytorch, ours_fast: Pi05, inputs: Inputs, cached: bool
) -> None:
    decode = lerobot_fast.sample_actions_fast_kv_cache if cached else lerobot_fast.sample_actions_fast
    expected = decode(inputs.images, inputs.image_masks, inputs.tokens, inputs.token_mask, max_decoding_steps=20)
    bos = torch.full((3, 1), BOS)
    batch = with_segment(inputs, bos, torch.ones_like(bos, dtype=torch.bool), causal=False)
    with torch.no_grad():
        prefix = ours_fast.backbone(batch)
    tokens, valid, _ = generate(ours_fast.backbone, prefix, max_tokens=20, stop_id=BAR, flow_visible=False)
    assert len(set(expected.flatten().tolist())) > 5  # else the comparison says little
    for found, keep, reference in zip(tokens, valid, expected, strict=True):
        assert found[keep].tolist() == reference[: keep.sum()].tolist()
        assert keep.sum() == 20 or found[keep][-1] == BAR


def test_logits_are_of_the_tied_embedding(ours_fast: Pi05, inputs: Inputs, fast_tokens: tuple[Tensor, Tensor]) -> None:
    batch = with_segment(inputs, *fast_tokens, causal=True)
    with torch.no_grad():
        hidden = ours_fast.backbone(batch).hidden
        out = ours_fast(batch)
    assert hidden is not None
    logits = F.linear(hidden, ours_fast.backbone.embed_tokens.weight).flatten(0, 1)
    targets = batch.tokens.flatten()[batch.target_index[Target.FAST]]
    expected = F.cross_entropy(logits[batch.target_index[Target.FAST] - 1], targets, reduction="none")
    torch.testing.assert_close(out["fast"].values, expected)
