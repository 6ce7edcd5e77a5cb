"""A controller that never waits: the next chunk is asked for while the last one is executed."""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Literal, get_args

import numpy as np

from pi05_lightning.serving.client.actions import ActionQueue, Due
from pi05_lightning.serving.client.connection import Answer, Busy, Connection, Lost, Refused, ServerError
from pi05_lightning.serving.client.latencies import Latencies
from pi05_lightning.serving.client.served import Served
from pi05_lightning.serving.wire import PREFIX_KEY, RESET_KEY, TOKEN_VARIABLE, checked_token, pack

Mode = Literal["waiting", "asynchronous", "rtc"]
Observation = Mapping[str, Any]
Seen = Observation | Callable[[], Observation]
Fallback = Callable[[Seen, np.ndarray | None], Any]

REMEMBERED = 20  # the newest delays, of which the longest is expected next
RETRY = 0.2  # seconds after an error of the server before it is asked again

log = logging.getLogger(__name__)


def hold_last(first: Any) -> Fallback:
    """The last action again, for robots that are sent positions.

    first: an episode's before there is one: an action, or what returns it, such as where the robot is now.
    """
    return lambda observation, last: last if last is not None else first() if callable(first) else first


def always(action: Any) -> Fallback:
    """The same action every time, such as no velocity at all."""
    return lambda observation, last: action


@dataclass
class _Asked:
    """A question that is on its way: from which step its observation is, and what it was told."""

    future: Future[Answer]
    seen: float
    """When the observation was taken, by `monotonic`."""
    step: int
    given: int
    moving: bool
    """Whether there were actions to execute meanwhile."""
    resets: bool
    dropped: bool = False
    """Whether its episode is over."""
    stood: int = 0
    """Control steps without an action of the policy meanwhile."""


class Controller:
    """Actions at the rate of a control loop from a policy that takes longer to answer.

    `step` is called once per control step. It sends an observation when a chunk is due, in a thread of its own, takes
    in what has come, and returns the action that is due now. Action k of a chunk is due k actions after the step that
    its observation is from. When there is none, `fallback` decides, and the policy's time stands still: what the policy
    counts on is what was executed, not what the clock says.

    Args:
        url: ws://host:port of a server of openpi's protocol, or wss://host:port.
        fallback: (observation as given to `step`, last action f32[A] or None) -> the action f32[A] to take when there
            is none. That is so until the first chunk of an episode has come, and when the queue has run dry. See
            `hold_last` and `always`; it may raise to end the loop.
        rate: control steps per second; by default one per action of the policy. Each action lasts `rate / fps` steps,
            and one step where `fps` is not known.
        fps: actions per second that the policy was trained at; by default what the server says, if it does.
        mode: `waiting` executes a chunk, then asks for the next one and waits for it. `asynchronous` asks earlier,
            goes on meanwhile, and joins the new chunk at the step that is due. `rtc` does so too and tells the server
            which actions are executed meanwhile, so that the new chunk goes on from them. By default `rtc` where the
            server can, else `asynchronous`.
        execution_horizon: actions of a chunk that are executed before the next is asked for, if the queue lasts that
            long; by default what the server says, else half a chunk.
        blend: of `asynchronous`: actions over which the last chunk fades into the new one.
        token: what the server was started with, if it was; by default the environment variable PI05_TOKEN.
        max_wait: seconds that `step` may wait where no action is there; by default 0, and in the mode `waiting`
            `answer_timeout`, while the server is there.
        on_error: gets the server's errors (`ServerError`, `Refused`) and a ValueError where it cannot do what is asked
            of it; `step` then goes on with the fallback. By default `step` raises them. A lost connection and a busy
            server are no errors: they are logged, and asked again.
        answer_timeout: seconds after which an answer counts as lost.
        max_age: seconds after which an observation is too old: its answer is dropped, and asked anew. By default none
            is, as a policy that computes for longer than that would never act.
        log_every: seconds between two lines of the log that say how long answers take; None: none.

    executed   the `Due` action of the last step; None if it was the fallback's
    delay      actions that were executed while the last answer was computed
    subtask    that the policy predicted last, if it predicts any
    latencies  percentiles and counts: `latencies.summary()`

    Use it in one thread. Close it, or use it as a context. Raises ValueError for options that no server could serve.
    """

    def __init__(
        self,
        url: str,
        fallback: Fallback,
        *,
        rate: float | None = None,
        fps: float | None = None,
        mode: Mode | None = None,
        execution_horizon: int | None = None,
        blend: int = 0,
        token: str | None = None,
        max_wait: float | None = None,
        on_error: Callable[[Exception], object] | None = None,
        answer_timeout: float = 60.0,
        max_age: float | None = None,
        log_every: float | None = 60.0,
    ) -> None:
        if mode not in (None, *get_args(Mode)):
            raise ValueError(f"mode is {mode!r}: expected {', '.join(get_args(Mode))}")
        if blend and mode in ("waiting", "rtc"):
            raise ValueError(f"blend: in the mode {mode} no two chunks have to be joined; leave it out")
        if blend < 0 or (execution_horizon is not None and execution_horizon < 1):
            raise ValueError(f"blend is {blend} and execution_horizon {execution_horizon}: at least 0 and 1")
        if max_age is not None and not max_age > 0:
            raise ValueError(f"max_age is {max_age!r}: give seconds above 0, or leave it out")
        for name, value, what in (("rate", rate, "control steps"), ("fps", fps, "actions")):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}: give {what} per second")
        self.fallback, self.rate, self.fps, self.blend, self.on_error = fallback, rate, fps, blend, on_error
        self.latencies = Latencies(log_every)
        self.executed: Due | None = None
        self.delay: int | None = None
        self.subtask: str | None = None
        self._mode, self._horizon = mode, execution_horizon
        self._max_wait, self._answer_timeout, self._max_age = max_wait, answer_timeout, max_age
        self._metadata: dict[str, Any] | None = None
        self._served: Served | None = None
        self._queue = ActionQueue()
        self._delays: deque[int] = deque(maxlen=REMEMBERED)
        self._asked: _Asked | None = None
        self._not_before = self._seconds = 0.0
        self._has_failed = False  # `on_error` was told, and the server has not been asked since
        self._chunks = self._length = self._origin = 0
        self._warned: set[str] = set()
        self._closed = False
        self._last: np.ndarray | None = None  # of the episode, whichever server it is from
        self._begin()
        if token is None and (told := os.environ.get(TOKEN_VARIABLE)):
            token = checked_token(told, TOKEN_VARIABLE)
        self._connection = Connection(url, token, answer_timeout)

    def _begin(self) -> None:
        self._queue.clear()
        self._ticks = 0  # control steps with an action of the policy
        self._current: Due | None = None  # the action that has begun, and may last several control steps
        self._resets = True

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._connection.close()
            self.latencies.log()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the controller is closed: make a new one")

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- what a control loop calls

    def connect(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait until the server is there; returns its metadata.

        Raises TimeoutError with the reason, Refused, and ValueError where the server cannot do what is asked of it.
        """
        self._check_open()
        deadline = math.inf if timeout is None else monotonic() + timeout
        while True:
            self._connection.news.clear()
            if refused := self._connection.refusal():
                raise refused
            self._meet()
            if self._metadata is not None:
                return self._metadata
            if (left := deadline - monotonic()) <= 0:
                raise TimeoutError(f"no policy at {self._connection.url}: {self._connection.problem}")
            self._connection.news.wait(None if left == math.inf else left)

    def step(self, observation: Seen, max_wait: float | None = None) -> np.ndarray:
        """The action f32[A] of this control step.

        observation: openpi's dictionary for the server, or what returns it: then it is only asked for when it is sent.
        max_wait: as of the constructor, for this step.

        Raises what `on_error` would get, if there is none; ValueError for an observation that cannot be sent, and for
        what the fallback gives and no robot can execute.
        """
        self._check_open()
        begin, given = monotonic(), self._max_wait if max_wait is None else max_wait
        while True:
            self._connection.news.clear()
            self._take_in()
            seen = monotonic() if callable(observation) else begin
            can_ask = not self._is_too_old(seen)
            if can_ask and self._is_due():
                self._ask(observation() if callable(observation) else observation, seen)
            wait = given if given is not None else self._answer_timeout if self._is_patient() else 0.0
            if self._has_failed or not (can_ask or self._asked):
                wait = 0.0
            if self._action_now() is not None or (left := begin + wait - monotonic()) <= 0:
                break
            self._connection.news.wait(min(left, RETRY))
        self.latencies.counts["steps"] += 1
        self.latencies.log_when_due()
        self.executed = self._action_now()
        if self.executed is None:
            if self._asked is not None:
                self._asked.stood += 1
            return self._fall_back(observation)
        self._current = self.executed
        self._queue.forget(self.executed.step)
        self._ticks += 1
        self._last = self.executed.action
        return self._last.copy()

    def reset(self) -> None:
        """Begin an episode: forget the queue, and tell the server with the next observation."""
        self._begin()
        self.executed = self.subtask = self._last = None
        if self._asked is not None:
            self._asked.dropped = True

    @property
    def mode(self) -> Mode | None:
        """The mode it is in; None until it has met the server, if none was chosen."""
        if self._mode is None and self._served is not None:
            return "rtc" if self._served.given else "asynchronous"
        return self._mode

    # --- time, in the policy's actions

    @property
    def _step(self) -> int:
        """The action that is due at this control step, counted from the begin of the episode."""
        return math.floor(self._ticks * self._actions_per_step() + 1e-6)

    def _actions_per_step(self) -> float:
        fps = None if self._served is None else self._served.fps
        return 1.0 if self.rate is None or fps is None else fps / self.rate

    def _has_begun(self) -> bool:
        return self._current is not None and self._current.step == self._step

    def _action_now(self) -> Due | None:
        """An action lasts as it was when it began, whatever has come since."""
        return self._current if self._has_begun() else self._queue.at(self._step)

    def _expected(self) -> int:
        """Actions that will be executed until an answer comes, as far as the last ones tell."""
        return max(self._delays, default=0)

    def _is_patient(self) -> bool:
        """Whether an answer is worth waiting for: one that nothing is heard of may never come."""
        return self.mode == "waiting" and self._metadata is not None

    def _is_too_old(self, seen: float) -> bool:
        return self._max_age is not None and monotonic() - seen > self._max_age

    # --- asking

    def _is_due(self) -> bool:
        if self._metadata is None or self._asked is not None or self._has_begun() or monotonic() < self._not_before:
            return False
        left = self._queue.left(self._step)
        if self.mode == "waiting" or not left:
            return not left
        # beyond half a chunk the answer would repeat what is executed meanwhile, and add ever less
        return self._step - self._origin >= self._executed() or left <= min(self._expected(), self._length // 2)

    def _executed(self) -> int:
        """Actions of a chunk that are executed before the next."""
        served = None if self._served is None else self._served.execution_horizon
        return self._horizon or served or math.ceil(self._length / 2)

    def _ask(self, observation: Observation, seen: float) -> None:
        assert self._served is not None
        prefix: list[np.ndarray] = []
        if self.mode == "rtc":
            most = self._served.given
            prefix = self._queue.upcoming(self._step, min(most, self._expected()) if self._delays else most)
        resets = self._resets and self._served.has_episodes
        message = dict(observation)
        if prefix:
            message[PREFIX_KEY] = np.stack(prefix)
        if resets:
            message[RESET_KEY] = True
        packed = pack(message)
        self._has_failed = False
        self._asked = _Asked(
            self._connection.ask(packed), seen, self._step, len(prefix), bool(self._queue.left(self._step)), resets
        )

    # --- what has come

    def _take_in(self) -> None:
        try:
            if refused := self._connection.refusal():
                raise refused
            self._receive()
            if monotonic() >= self._not_before:
                self._meet()
        except (ServerError, Refused, ValueError) as error:
            self.latencies.counts["errors"] += 1
            self._not_before = monotonic() + RETRY
            if self.on_error is None:
                raise
            self._has_failed = True
            self.on_error(error)

    def _meet(self) -> None:
        """Look at what the server says about itself, if the connection is another one than before.

        Raises ValueError where it cannot do what is asked of it.
        """
        metadata = self._connection.metadata
        if metadata is self._metadata:
            return
        self._metadata = None
        if metadata is None:
            return
        served = Served.of(metadata)
        if self.fps is not None:
            served = replace(served, fps=self.fps)
        if self._mode == "rtc" and not served.given:
            raise ValueError(
                f"mode rtc: {self._connection.url} does not go on from actions; start it with --inference_delay, where"
                " the policy was trained for it, or leave out the mode"
            )
        if self.rate is not None and served.fps is not None and self.rate < served.fps:
            raise ValueError(f"rate is {self.rate:g}, and the policy gives {served.fps:g} actions per second: raise it")
        if self.rate is not None and served.fps is None:
            self._warn(
                "the server does not say its rate: an action lasts one step. Give fps if it is not %g", self.rate
            )
        if self._served not in (None, served):
            self._warn("%s serves another policy than before: its actions are new ones", self._connection.url)
            self._begin()
        self._metadata, self._served = metadata, served
        log.info("%s: mode %s, of %s", self._connection.url, self.mode, served)

    def _receive(self) -> None:
        asked = self._asked
        if asked is None or not asked.future.done():
            return
        self._asked = None
        error = asked.future.exception()
        if isinstance(error, Lost):
            self.latencies.counts["lost"] += 1
            return
        if isinstance(error, Busy):
            self.latencies.counts["busy"] += 1
            self._not_before = monotonic() + RETRY
            self._warn("%s (it is asked again)", error)
            return
        if asked.dropped:
            return
        if error is not None:
            raise error
        answer = asked.future.result()
        if self._is_too_old(asked.seen):
            self.latencies.counts["late"] += 1
            self._warn(
                "an answer is of an observation %.2f s old, and is dropped: max_age is %g s",
                monotonic() - asked.seen,
                self._max_age,
            )
            return
        assert self._served is not None
        chunk = self._served.actions(answer.message)
        self._resets = self._resets and not asked.resets
        self.subtask = answer.message.get("subtask")
        self._length = len(chunk)
        if self.mode == "waiting":
            chunk = chunk[: self._executed()]
        now = self._step + self._has_begun()
        blend = self.blend if self.mode == "asynchronous" else 0
        self._queue.merge(chunk, asked.step, now, self._chunks, asked.given, blend)
        self._origin = asked.step
        self._chunks += 1
        self._note(answer, asked, now - asked.step)

    def _note(self, answer: Answer, asked: _Asked, delay: int) -> None:
        """Remember how long an answer took: by the actions executed, or else by the clock, or the steps."""
        assert self._served is not None
        timing = answer.message.get("server_timing") or {}
        self.latencies.add(answer.seconds, timing.get("infer_ms"), delay)
        fps = self._served.fps or self.rate
        if asked.moving:
            self._delays.append(delay + math.ceil(asked.stood * self._actions_per_step()))
        else:  # where nobody knows the rate, an action lasts a step
            self._delays.append(max(1, asked.stood) if fps is None else math.ceil(answer.seconds * fps))
        self.delay, self._seconds = delay, answer.seconds
        if asked.given and delay > asked.given:
            self.latencies.counts["late"] += 1
            if asked.given == self._served.given:
                self._warn(
                    "an answer took %d actions, and the server goes on from %d at most: the chunk is joined late, with"
                    " a jump; start it with a longer --inference_delay, if the policy was trained for it",
                    delay,
                    asked.given,
                )

    def _fall_back(self, observation: Seen) -> np.ndarray:
        self.latencies.counts["fallback_steps"] += 1
        if self._metadata is None:
            self._warn("no answers, and the fallback acts: %s", self._connection.problem)
        elif self._last is not None and self.mode != "waiting":
            self._warn(
                "the queue ran dry, and the fallback acts: the last answer took %.2f s and held %d actions; let the"
                " server send more (--execution_horizon), or answer sooner",
                self._seconds,
                self._length,
            )
        given = self.fallback(observation, None if self._last is None else self._last.copy())
        try:
            action = np.array(given, np.float32)  # of None it is a NaN without a dim
        except (TypeError, ValueError):  # a dictionary, a text, lists of several lengths
            action = np.empty(0, np.float32)
        dims = None if self._served is None else self._served.action_dim
        if dims is None and self._last is not None:
            dims = len(self._last)
        if action.ndim != 1 or not len(action) or dims not in (None, len(action)) or not np.isfinite(action).all():
            expected = "an action" if dims is None else f"an action of {dims} dims"
            raise ValueError(f"the fallback gave {given!r}: it must be {expected}, of finite numbers")
        return action

    def _warn(self, message: str, *values: object) -> None:
        """Say it once."""
        if message not in self._warned:
            self._warned.add(message)
            log.warning(message, *values)
