"""What can be asked for at the desk: instructions, when they are done, who shows how, and which may follow one another.

Every instruction of one step is possible in every initial state, so the picture never tells which one is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from pi05_lightning.sim.desk import experts
from pi05_lightning.sim.desk.experts import Expert, Move
from pi05_lightning.sim.desk.scene import BLOCK, BLOCKS, BUTTONS, DRAWER_WIDTH, State

OPEN, SHUT = 0.93, 0.07  # of the drawer's way
TURNED = 55.0  # degrees
PUSHED = 0.06  # metres to a side
_ON_DESK = BLOCK + 0.01
_PRESSED = 0.7  # of a button's way
_SIDES = {"left": -1.0, "right": 1.0}
CHAIN = "chain"
CHAIN_LENGTH = 5  # as in CALVIN


@dataclass(frozen=True)
class Episode:
    """What happened since an instruction was given: how it was then and is now, and the buttons pressed meanwhile.

    held: buttons that were down then and still are, which is no pressing.
    """

    start: State
    now: State
    pressed: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()

    @classmethod
    def beginning(cls, state: State) -> Episode:
        return cls(state, state, held=_down(state))

    def after(self, state: State) -> Episode:
        down = _down(state)
        return replace(self, now=state, pressed=self.pressed | (down - self.held), held=self.held & down)


def _down(state: State) -> frozenset[str]:
    return frozenset(colour for colour, depth in state.pressed.items() if depth > _PRESSED)


@dataclass(frozen=True)
class Task:
    """An instruction.

    target  the thing that it is about, if it is one
    steps   the instructions that have to be done for it, where they are several
    solved  whether it is done
    expert  what to do next for it
    needs   whether it can be done on a desk that was left so
    leaves  the desk as it is once it is done
    others  the sentence in other words, for training data that shall have them
    seconds simulated time after which it has failed
    """

    sentence: str
    solved: Callable[[Episode], bool]
    expert: Callable[[Episode], Move]
    needs: Callable[[Left], bool] = lambda left: True
    leaves: Callable[[Left], Left] = lambda left: left
    others: tuple[str, ...] = ()
    seconds: float = 6.0
    target: str | None = None
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Left:
    """How instructions leave the desk, in words: enough to say which can follow.

    blocks: {colour: pushes to the right, less those to the left; None in the drawer}
    """

    drawer: str = "half"
    faucet: str = "middle"
    blocks: tuple[tuple[str, int | None], ...] = tuple((colour, 0) for colour in BLOCKS)

    def block(self, colour: str) -> int | None:
        return dict(self.blocks)[colour]

    def with_block(self, colour: str, place: int | None) -> Left:
        return replace(self, blocks=tuple({**dict(self.blocks), colour: place}.items()))


def _of_state(expert: Expert) -> Callable[[Episode], Move]:
    return lambda episode: expert(episode.now)


def _said(*parts: Iterable[str]) -> list[str]:
    """Every sentence with one of each of the parts."""
    return [" ".join(words) for words in product(*parts)]


def _press(colour: str) -> Task:
    return Task(
        f"press the {colour} button",
        solved=lambda episode: colour in episode.pressed,
        expert=_of_state(experts.press(colour)),
        others=(
            *_said(("push", "hit", "press down"), (f"the {colour} button", f"the {colour} one of the buttons")),
            *_said(("press", "push"), (f"the button that is {colour}",)),
            f"the {colour} button should be pressed",
        ),
        target=f"{colour} button",
    )


def _turn(way: str) -> Task:
    side = _SIDES[way]
    return Task(
        f"turn the faucet to the {way}",
        solved=lambda episode: side * episode.now.faucet_angle > TURNED,
        expert=_of_state(experts.turn_faucet(side)),
        needs=lambda left: left.faucet != way,
        leaves=lambda left: replace(left, faucet=way),
        others=(
            *_said(("turn", "swing"), ("the tap", "the faucet handle"), (f"{way}wards", f"to the {way} side")),
            *_said(("rotate",), ("the faucet", "the tap"), (f"to the {way}",)),
            f"the faucet should point to the {way}",
        ),
        target="faucet handle",
    )


def _push(colour: str, way: str) -> Task:
    side = _SIDES[way]

    def solved(episode: Episode) -> bool:
        before, now = episode.start.blocks[colour], episode.now.blocks[colour]
        return bool(side * (now[0] - before[0]) > PUSHED and now[2] < _ON_DESK)

    def needs(left: Left) -> bool:
        place = left.block(colour)
        return place is not None and abs(place + side) <= 1

    return Task(
        f"push the {colour} block to the {way}",
        solved,
        _of_state(experts.push_block(colour, side)),
        needs,
        lambda left: left.with_block(colour, (left.block(colour) or 0) + int(side)),
        others=(
            *_said(
                ("push", "move", "shove"),
                (f"the {colour} cube",),
                (f"to the {way}", f"{way}wards", f"over to the {way} side"),
            ),
            *_said(("slide", "move"), (f"the {colour} block",), (f"to the {way}", way)),
        ),
        target=f"{colour} block",
    )


def _store(colour: str) -> Task:
    aside = (-0.5 if colour == BLOCKS[0] else 0.5) * DRAWER_WIDTH
    return Task(
        f"put the {colour} block into the drawer",
        solved=lambda episode: episode.now.in_drawer(colour),
        expert=_of_state(experts.store_block(colour, aside)),
        needs=lambda left: left.drawer != "shut" and left.block(colour) is not None,
        leaves=lambda left: left.with_block(colour, None),
        others=(
            *_said(("place", "store", "put"), (f"the {colour} cube",), ("in the drawer", "inside the drawer")),
            *_said(("drop", "place"), (f"the {colour} block",), ("into the drawer", "inside the drawer")),
            f"the {colour} cube belongs into the drawer",
            f"the {colour} block should be in the drawer",
        ),
        target=f"{colour} block",
    )


INSTRUCTIONS: Mapping[str, Task] = {
    "drawer-open": Task(
        "open the drawer",
        solved=lambda episode: episode.now.drawer_open > OPEN,
        expert=_of_state(experts.open_drawer),
        needs=lambda left: left.drawer != "open",
        leaves=lambda left: replace(left, drawer="open"),
        others=(
            *_said(("pull the drawer", "slide the drawer", "could you pull the drawer"), ("open", "out by its handle")),
            "slide the drawer out",
            "get the drawer all the way open",
            "the drawer should be open",
        ),
        target="drawer handle",
    ),
    "drawer-close": Task(
        "close the drawer",
        solved=lambda episode: episode.now.drawer_open < SHUT,
        expert=_of_state(experts.close_drawer),
        needs=lambda left: left.drawer != "shut",
        leaves=lambda left: replace(left, drawer="shut"),
        others=(
            *_said(("push the drawer", "slide the drawer", "could you push the drawer"), ("shut", "closed")),
            "push the drawer back in",
            "get the drawer shut",
            "the drawer should be shut",
        ),
        target="drawer handle",
    ),
    **{f"button-{colour}": _press(colour) for colour in BUTTONS},
    **{f"faucet-{way}": _turn(way) for way in _SIDES},
    **{f"block-{colour}-{way}": _push(colour, way) for colour in BLOCKS for way in _SIDES},
    **{f"block-{colour}-drawer": _store(colour) for colour in BLOCKS},
}
"""Of one step each."""


def _steps(sentence: str, *names: str, others: tuple[str, ...]) -> Task:
    """An instruction for which several of the others have to be done, in any order: about no one thing.

    The desk shows which of them are done, so that a policy without memory can tell what is next.
    """
    steps = [INSTRUCTIONS[name] for name in names]

    def solved(episode: Episode) -> bool:
        return all(step.solved(episode) for step in steps)

    def expert(episode: Episode) -> Move:
        return next((step for step in steps if not step.solved(episode)), steps[-1]).expert(episode)

    def needs(left: Left) -> bool:
        return all(step.needs(left) for step in steps)

    return Task(sentence, solved, expert, needs, others=others, seconds=6.0 * len(steps), steps=names)


def _store_and_close(colour: str) -> Task:
    return _steps(
        f"put the {colour} block into the drawer and close it",
        f"block-{colour}-drawer",
        "drawer-close",
        others=(
            f"put the {colour} cube in the drawer and then close it",
            f"place the {colour} block inside the drawer and shut it",
            f"store the {colour} block in the drawer and then push it shut",
            f"the {colour} cube belongs in the drawer and the drawer should be closed",
        ),
    )


SEVERAL_STEPS: Mapping[str, Task] = {
    "tidy-up": _steps(
        "tidy up: put the blocks into the drawer and close it",
        *(f"block-{colour}-drawer" for colour in BLOCKS),
        "drawer-close",
        others=(
            "clean the desk: put both blocks in the drawer and shut it",
            "store both cubes in the drawer and then close it",
            "both blocks belong in the drawer and the drawer should be closed",
        ),
    ),
    **{f"store-{colour}": _store_and_close(colour) for colour in BLOCKS},
    "turn-and-open": _steps(
        "turn the faucet to the left and open the drawer",
        "faucet-left",
        "drawer-open",
        others=(
            "turn the tap leftwards and pull the drawer open",
            "swing the faucet handle to the left side and slide the drawer out",
            "the faucet should point to the left and the drawer should be open",
        ),
    ),
}
TASKS: Mapping[str, Task] = {**INSTRUCTIONS, **SEVERAL_STEPS}
PARTNERS = {
    "tidy-up": "turn-and-open",
    "turn-and-open": "store-green",
    "store-green": "store-purple",
    "store-purple": "store-green",
}
"""For each of several steps another one, of which neither is done by doing the other."""


def holds(name: str, other: str) -> bool:
    """Whether one of two tasks is done by doing the other."""
    one, two = ({*TASKS[task].steps} or {task} for task in (name, other))
    return one <= two or two <= one


def draw_chain(rng: np.random.Generator, length: int = CHAIN_LENGTH) -> list[str]:
    """Instructions of one step, each of which is possible after those before it, and none that was just given."""
    return [name for name, _ in _chain(rng, length)]


def draw_before(rng: np.random.Generator, task: Task) -> list[str]:
    """Fewer instructions of one step than a chain has, after which a task is possible and was not just done."""
    while True:
        chain = list(_chain(rng, int(rng.integers(1, CHAIN_LENGTH))))
        last, left = chain[-1]
        if task.needs(left) and INSTRUCTIONS[last] is not task:
            return [name for name, _ in chain]


def _chain(rng: np.random.Generator, length: int) -> Iterator[tuple[str, Left]]:
    """Each instruction, and how it leaves the desk."""
    left, last = Left(), ""
    for _ in range(length):
        last = str(rng.choice([n for n, task in INSTRUCTIONS.items() if n != last and task.needs(left)]))
        left = INSTRUCTIONS[last].leaves(left)
        yield last, left
