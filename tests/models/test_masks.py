"""Who attends to whom, found by changing one token at a time and looking at what else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.types import Batch

from .small import change_column, make_batch, small_config, small_model, token_nll

# rows attend to columns; the flow head's row is last
DRAWINGS = {
    "text": """
          i i p p t t
        i 1 1 1 1 . .
        i 1 1 1 1 . .
        p 1 1 1 1 . .
        p 1 1 1 1 . .
        t 1 1 1 1 1 .
        t 1 1 1 1 1 1
        a 1 1 1 1 . .
    """,
    "subtask_then_fast": """
          i p p s s f f
        i 1 1 1 . . . .
        p 1 1 1 . . . .
        p 1 1 1 . . . .
        s 1 1 1 1 . . .
        s 1 1 1 1 1 . .
        f 1 1 1 1 1 1 .
        f 1 1 1 1 1 1 1
        a 1 1 1 1 1 . .
    """,
    "advantage_after_the_subtask": """
          i p s s p p f f
        i 1 1 . . . . . .
        p 1 1 . . . . . .
        s 1 1 1 . . . . .
        s 1 1 1 1 . . . .
        p 1 1 1 1 1 . . .
        p 1 1 1 1 1 1 . .
        f 1 1 1 1 1 1 1 .
        f 1 1 1 1 1 1 1 1
        a 1 1 1 1 1 1 . .
    """,
    "boxes_then_subtask": """
          i p t t s s
        i 1 1 . . . .
        p 1 1 . . . .
        t 1 1 1 . . .
        t 1 1 1 1 . .
        s 1 1 1 1 1 .
        s 1 1 1 1 1 1
        a 1 1 . . 1 1
    """,
    "no_image": """
          p p f f
        p 1 1 . .
        p 1 1 . .
        f 1 1 1 .
        f 1 1 1 1
        a 1 1 . .
    """,
}


def flow(model: Pi05, batch: Batch) -> Tensor:
    return model(batch, ["flow"])["flow"].values


def test_own_words_are_acted_on_like_a_subtask_and_not_learned() -> None:
    model, config = small_model(), small_config()
    own, subtask = (make_batch(config, [row], acting=1) for row in ("ipoof", "ipssf"))
    terms = {"subtask", "fast", "flow"}
    found, expected = model(own, terms), model(subtask, terms)
    assert "subtask" in expected.keys() - found.keys()
    for name in ("fast", "flow"):
        torch.testing.assert_close(found[name].values, expected[name].values, rtol=0, atol=0)


def nll(model: Pi05, batch: Batch) -> Tensor:
    return token_nll(model(batch, ["text", "subtask", "fast"]))


@pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS.keys())
@torch.no_grad()
def test_attention_is_as_drawn(drawing: str) -> None:
    # what one layer computes depends on what is attended to, nothing indirect; keys of a second show it, of all tokens
    one, two = (small_model(small_config(depth=depth)) for depth in (1, 2))
    columns, *lines = [line.split() for line in drawing.split("\n") if line.strip()]
    expected = torch.tensor([[cell == "1" for cell in line[1:]] for line in lines])
    batch = make_batch(one.config, ["".join(columns)], acting=1)
    keys, velocity = two.backbone(batch).kv[1][0], flow(one, batch)

    attends = torch.zeros_like(expected)
    for column in range(len(columns)):
        changed = change_column(batch, column)
        attends[:-1, column] = (two.backbone(changed).kv[1][0] != keys).any(-1)[0].any(0)
        attends[-1, column] = (flow(one, changed) != velocity).any()
    assert attends.tolist() == expected.tolist()


@pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS.keys())
@torch.no_grad()
def test_hidden_states_are_the_tokens_and_see_what_is_drawn(drawing: str) -> None:
    model = small_model(small_config(depth=1))
    columns, *lines = [line.split() for line in drawing.split("\n") if line.strip()]
    images = columns.count("i")
    expected = torch.tensor([[cell == "1" for cell in line[1:]] for line in lines[images:-1]])
    batch = make_batch(model.config, ["".join(columns)])
    hidden = model.backbone(batch).hidden
    assert hidden is not None
    seen = [
        (model.backbone(change_column(batch, column)).hidden != hidden).any(-1)[0] for column in range(len(columns))
    ]
    assert torch.stack(seen, 1).tolist() == expected.tolist()


@torch.no_grad()
def test_fast_tokens_never_reach_the_flow_head_however_deep() -> None:
    model = small_model(small_config(depth=4))
    batch = make_batch(model.config, ["iippssff"], acting=1)
    before = flow(model, batch)
    for column in (6, 7):
        assert torch.equal(flow(model, change_column(batch, column)), before)


@torch.no_grad()
def test_actions_and_noise_never_reach_the_backbone() -> None:
    model = small_model()
    batch = make_batch(model.config, ["ippss", "ipt"], acting=1)
    assert batch.noise is not None
    other = replace(batch, actions=batch.actions + 1, noise=-batch.noise)
    assert torch.equal(nll(model, batch), nll(model, other))


@torch.no_grad()
def test_noise_draws_do_not_see_each_other() -> None:
    model = small_model()
    batch = make_batch(model.config, ["ipps"], acting=1, draws=3)
    assert batch.noise is not None
    noise = batch.noise.clone()
    noise[:, 1] += 1
    before, after = flow(model, batch), flow(model, replace(batch, noise=noise))
    assert not torch.equal(after[:, 1], before[:, 1])
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])


@torch.no_grad()
def test_all_actions_of_a_chunk_see_each_other() -> None:
    model = small_model(small_config(depth=1))
    batch = make_batch(model.config, ["ip"], acting=1)
    assert batch.noise is not None
    before = flow(model, batch)
    for step in range(model.config.horizon):
        noise = batch.noise.clone()
        noise[:, :, step] += 1
        assert (flow(model, replace(batch, noise=noise)) != before).any(-1).all()


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch() -> None:
    """Not on other rows, their length, their cameras, or the padding that they bring."""
    model = small_model()
    alone = make_batch(model.config, ["ippss"], acting=1)
    beside = make_batch(model.config, ["ippss", "iiippppppttttttt", "pff", "ip"], acting=1)
    torch.testing.assert_close(flow(model, beside), flow(model, alone))
    together, by_itself = (model(batch, ["subtask"])["subtask"].values for batch in (beside, alone))
    torch.testing.assert_close(together[:2], by_itself)


@torch.no_grad()
def test_padding_is_read_by_nothing() -> None:
    model = small_model()
    batch = make_batch(model.config, ["ippss", "iippppss"], acting=2)
    tokens = torch.where(batch.token_mask, batch.tokens, 77)
    other = replace(batch, tokens=tokens)
    assert torch.equal(flow(model, other), flow(model, batch))
    assert torch.equal(nll(model, other), nll(model, batch))
