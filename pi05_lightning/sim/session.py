"""Players side by side in a thread of their own, which does what it is told between two actions."""

from __future__ import annotations

import base64
import io
import logging
import math
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Any

import numpy as np
from PIL import Image

from pi05_lightning.data.images import as_bytes
from pi05_lightning.sim.player import WAYS, Player

log = logging.getLogger(__name__)

SPEEDS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of simulated time; beyond them as fast as it can."""
MOST_SHOWN = 15
"""States per second that are shown of what moves: drawing takes as long as acting."""
State = dict[str, Any]
"""What a page shows, in JSON's types, see `Session.state`."""


class Session:
    """One scene for one policy or several, which everybody who looks shares.

    open_players: makes the players, in the thread that they are then played in.  changed: told of every new state, or
    why it cannot be shown, in that thread.
    """

    def __init__(
        self, open_players: Callable[[], Sequence[Player]], changed: Callable[[State | Exception], None]
    ) -> None:
        self._open, self._changed = open_players, changed
        self._unshown = ""  # why the last state was not shown
        self.paused, self.speed = True, 1.0
        self.players: Sequence[Player] = ()
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        self._opened: Future[None] = Future()
        self._shown_at = -math.inf  # when, by the monotonic clock
        self._pictures: dict[Player, tuple[int, dict[str, Any]]] = {}
        self._thread = threading.Thread(target=self._run, name="simulator", daemon=True)

    # --- from any thread

    def begin(self) -> None:
        """Open the players and begin to play. Raises what opening them raises."""
        self._thread.start()
        self._opened.result()

    def do(self, what: Callable[[], None]) -> Future[None]:
        """Have one of the methods below called between two actions; its error is the future's."""
        done: Future[None] = Future()
        self._jobs.put((what, done))
        return done

    def end(self) -> None:
        """End after the action that is being taken."""
        self._jobs.put(None)
        self._thread.join()

    # --- what can be done, in the players' thread

    def tell(self, text: str, stay: bool = False, task: str | None = None) -> None:
        """An instruction for all, who go on. ValueError where it says nothing, and for a task that there is not.

        task: the one that it is of, where several share their instruction; by default the judged one of them.
        One of another scene opens that one, at the initial state of the same number, unless we `stay`; what was just
        done begins anew. One that no task has is told in the scene as it is, where the same task is judged as before;
        it begins anew where the environment ended the episode.
        All begin anew where one has to: side by side they stay comparable.
        """
        sentence, first = text.strip(), self.players[0]
        if not sentence:
            raise ValueError("the instruction is blank: say what to do")
        task = None if stay else task or first.start.task_of(sentence, first.judged)
        if task is not None:
            first.start.check(task, first.number)
        apart = len({(player.task, player.judged, player.number) for player in self.players}) > 1
        if apart or not all(player.go_on(task) for player in self.players):
            self.reset(first.number, task)
        for player in self.players:
            player.tell(sentence)
        self.paused = False

    def reset(self, number: int, task: str | None = None, anew: bool = False) -> None:
        """Begin at a numbered initial state, by default of the judged task. ValueError for what there is not.

        anew: with the task's own instruction, whatever was told.
        """
        task = self.players[0].judged if task is None else task
        for player in self.players:
            player.reset(task, number, anew)

    def pause(self, on: bool) -> None:
        self.paused = on
        self._measure_anew()

    def step(self) -> None:
        """One action of each that runs, and pause."""
        self.pause(True)
        for player in self._running():
            player.step()

    def set_speed(self, value: float) -> None:
        """Simulated seconds per second; 0 for as fast as it can. ValueError for no such speed."""
        if value not in (0, *SPEEDS):
            raise ValueError(f"speed: {value} is none of {', '.join(map(str, SPEEDS))}, or 0 for as fast as it can")
        self.speed = value
        self._measure_anew()

    def push(self, way: str) -> None:
        for player in self.players:
            player.push(way)

    def ask(self, text: str) -> None:
        """A question to all. ValueError where it says nothing, or, once all were asked, where one cannot answer."""
        if not text.strip():
            raise ValueError("the question is blank: ask something, such as where the gripper is")
        for player in self.players:
            player.answers = []
        wrong = []
        for player in self.players:
            try:
                player.ask(text.strip())
            except ValueError as error:
                wrong.append(f"{player.name}: {error}")
            except Exception as error:  # as out of memory: the others are asked all the same
                log.warning("%s cannot answer", player.name, exc_info=error)
                wrong.append(f"{player.name}: {type(error).__name__}: {error}")
        self._measure_anew()
        if wrong:
            raise ValueError("; ".join(wrong))

    # --- the thread

    def _measure_anew(self) -> None:
        for player in self.players:
            player.measure_anew()

    def _running(self) -> list[Player]:
        return [player for player in self.players if player.running]

    def _run(self) -> None:
        try:
            self.players = self._open()
            self._show()
        except BaseException as error:
            self._opened.set_exception(error)
            return
        self._opened.set_result(None)
        while self._turn():
            if self._is_still() or monotonic() - self._shown_at > 1 / MOST_SHOWN:
                self._show()
        for player in self.players:
            player.close()

    def _show(self) -> None:
        self._shown_at = monotonic()
        try:
            self._changed(self.state())
            self._unshown = ""
        except Exception as error:  # a renderer's: the next state may be drawn again, and who asks is to be answered
            if (unshown := f"{type(error).__name__}: {error}") != self._unshown:
                self._unshown = unshown
                log.exception("the state cannot be shown")
                self._changed(error)

    def _is_still(self) -> bool:
        return self.paused or not self._running()

    def _turn(self) -> bool:
        """Do what is to be done, or take the next action when it is due; False at the end."""
        running = [] if self.paused else self._running()
        due = min((player.due for player in running), default=None)
        try:
            job = self._jobs.get(timeout=None if due is None else max(0.0, due - monotonic()))
        except queue.Empty:
            player = min(running, key=lambda player: player.due)
            player.step()
            lasts = 1 / player.course.result.fps / self.speed if self.speed else 0.0
            player.due = max(player.due + lasts, monotonic())
            return True
        if job is None:
            return False
        what, done = job
        try:
            what()
        except Exception as error:  # whatever is wrong is the answer to who asked, and the others play on
            done.set_exception(error)
        else:
            done.set_result(None)
        self._shown_at = -math.inf  # what was done is to be seen before the next action, which may take long
        return True

    # --- what a page shows

    def scene(self) -> State:
        """What stays the same: {tasks: {task: instruction, or None}, states: their number, ways, speeds}."""
        start = self.players[0].start
        said = {task: next(iter(start.env.sentences(task)), None) for task in start.seeds}
        return {
            "simulator": type(start.env).__name__,
            "tasks": said,
            "states": min(map(len, start.seeds.values())),
            "ways": list(WAYS) if self.players[0].pushable else [],
            "speeds": [*SPEEDS, 0],
        }

    def state(self) -> State:
        """{paused, speed, players: [see `_shown`]}."""
        return {"paused": self.paused, "speed": self.speed, "players": [self._shown(p) for p in self.players]}

    def _shown(self, player: Player) -> State:
        """A player in JSON's types; pictures are `data:` addresses, times seconds and milliseconds."""
        course, result = player.course, player.course.result
        low, high = player.bounds
        policy, simulator = player.milliseconds
        return {
            "name": player.name,
            "task": player.task,
            "number": player.number,
            "told": course.told,
            "judged": player.judged,
            "subtask": result.subtask,
            "success": result.success,
            "outcome": result.outcome,
            "seconds": result.decisions / result.fps,
            "max_seconds": result.max_seconds,
            "chunk": None if player.chunk is None else _numbers(player.chunk),
            "place": player.place,
            "due": player.left,
            "executed": [_numbers(action) for action in player.executed],
            "low": _numbers(low),
            "high": _numbers(high),
            "rate": player.rate,
            "milliseconds": {"policy": policy, "simulator": simulator},
            "answers": [vars(said) | {"picture": data_uri(said.picture)} for said in player.answers],
            **self._seen(player),
        }

    def _seen(self, player: Player) -> dict[str, Any]:
        """The picture for people, and the images that the policy sees, drawn once."""
        version, seen = self._pictures.get(player, (-1, {}))
        if version != player.version:
            images = {camera: data_uri(image.transpose(1, 2, 0)) for camera, image in player.frame.images.items()}
            seen = {"picture": data_uri(player.picture.transpose(1, 2, 0)), "images": images}
            self._pictures[player] = player.version, seen
        return seen


def data_uri(image: np.ndarray) -> str:
    """An address that holds an image [h w 3] of 0..255: small ones as they are, large ones as JPEG."""
    buffer, kind = io.BytesIO(), "PNG" if len(image) <= 128 else "JPEG"
    Image.fromarray(as_bytes(image)).save(buffer, kind, quality=88, compress_level=1)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _numbers(array: np.ndarray) -> list[Any]:
    return (
        [None if not np.isfinite(x) else round(float(x), 4) for x in array]
        if array.ndim == 1
        else [_numbers(row) for row in array]
    )
