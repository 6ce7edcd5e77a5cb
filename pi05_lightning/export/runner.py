"""A π0.5 policy that `pi05 export` wrote, without the package that wrote it.

It needs Python 3.10 or later, NumPy, tokenizers, and the engine of its format: openvino, onnxruntime, or torch (pt2).

    from runner import Policy

    policy = Policy()  # of the folder that this file is in
    actions = policy.act({"top": image}, state, "open the drawer")  # f32[T A] in the robot's units
    print(policy.subtask)  # what it said before it acted, if it was trained to

Shapes: T steps of a chunk, A dims of the robot's action, D of the model's, S state dims, W width of the language model.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

Graph = Callable[..., list[np.ndarray]]
LOCATION = re.compile(r"<loc(\d+)>")
LOCATIONS = re.compile(r"(?:<loc\d+>)+")
ABILITIES = {
    "flow": "to act with the flow head",
    "fast": "to act by FAST tokens",
    "subtask": "to say subtasks",
    "text": "to answer questions",
}
"""What a policy may have been trained to do, by the name that the manifest has for it."""
STATE_BINS = np.linspace(-1, 1, 257)[:-1]
MAX_WORDS = 128
"""Tokens of what it says at most."""


# --- engines


@cache
def _openvino_core() -> Any:
    """One for all graphs, and for as long as the process lives.

    Each maps a stack for signals, and unmaps it at its end. Of several that do not end in the reverse order, one that
    is gone stays in use, and the next signal ends the process.
    """
    import openvino

    return openvino.Core()


def open_openvino(path: Path, **options: Any) -> Graph:
    compiled = _openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", **options})
    return lambda **inputs: list(compiled(inputs).values())


def open_onnx(path: Path, **options: Any) -> Graph:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    for name, value in options.items():
        setattr(settings, name, value)
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return lambda **inputs: session.run(None, inputs)


def open_pt2(path: Path) -> Graph:
    import torch

    with warnings.catch_warnings():  # it reads its own file into memory that it does not write to, and warns of that
        warnings.simplefilter("ignore")
        module = torch.export.load(path).module()

    def run(**inputs: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(np.ascontiguousarray(value)) for value in inputs.values()))
        return [x.numpy() for x in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return run


ENGINES: Mapping[str, Callable[..., Graph]] = {"openvino": open_openvino, "onnx": open_onnx, "pt2": open_pt2}


class Policy:
    """The policy of a folder. options: the engine's own, such as INFERENCE_NUM_THREADS=2 for OpenVINO.

    Raises ValueError where a file of the folder is missing, or is not the one that was written.
    """

    def __init__(self, folder: str | Path = Path(__file__).parent, seed: int = 0, **options: Any) -> None:
        folder = Path(folder)
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        check_files(folder, self.manifest["files"])
        graphs, open_graph = self.manifest["graphs"], ENGINES[self.manifest["format"]]
        self.graphs = {name: open_graph(folder / graph["file"], **options) for name, graph in graphs.items()}
        self.model, self.robot, self.acting = (self.manifest[part] for part in ("model", "robot", "acting"))
        self.prompts, self.tokens, self.fast = (self.manifest[part] for part in ("prompts", "tokens", "fast"))
        self.embedding = np.load(folder / "embedding.npy", mmap_mode="r")
        self.modulations = np.load(folder / "modulations.npy")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True
        self.advantage = None if self.acting["advantage"] == "none" else self.acting["advantage"]
        self.random = np.random.default_rng(seed)
        self.reset()

    def reset(self) -> None:
        """Forget the subtask: call it between episodes."""
        self.subtask: str | None = None
        self._task: str | None = None
        self._chunks = 0

    # --- what a robot calls

    def act(
        self,
        images: Mapping[str, np.ndarray],
        state: np.ndarray | None = None,
        task: str = "",
        *,
        subtask: str | None = None,
        noise: np.ndarray | None = None,
        prefix_actions: np.ndarray | None = None,
        actions: str | None = None,
    ) -> np.ndarray:
        """A chunk f32[T A] in the robot's units, of as many actions as its data's chunks had.

        images: {camera: u8, or floats of 0..1, [3 h w] or [h w 3]}.  state: f32[S] in the robot's units.
        subtask: what to act on instead of what it says itself.  noise: f32[horizon D] that the flow starts from.
        prefix_actions: f32[d A] that the robot executes meanwhile; the chunk begins with them and goes on from them.
        actions: `flow` or `fast`, by default as it was exported.

        Raises ValueError for what the policy was not made for.
        """
        actions = actions or self.acting["actions"]
        if actions not in ("flow", "fast"):
            raise ValueError(f"actions is {actions!r}: expected flow or fast")
        self._check_able(actions)
        if actions == "fast" and prefix_actions is not None:
            raise ValueError("prefix_actions need the flow head: leave them out, or set actions to flow")
        seen = self._read(images, state, task)
        if seen.task != self._task:
            self.reset()
            self._task = seen.task
        said = None
        if subtask is not None or not self.acting["hierarchical"]:
            self.subtask = subtask
        elif self._chunks % self.acting["replan_subtask_every"] == 0:
            self.subtask, said = self._say(seen)
        self._chunks += 1
        if actions == "fast":
            chunk = self._fast_chunk(seen, said)
        else:
            chunk = self._flow_chunk(seen, noise, prefix_actions, said)
        real = self._real(chunk[: self.robot["horizon"], : len(self.robot["action"]["q01"])], seen)
        if prefix_actions is not None:
            real[: len(prefix_actions)] = prefix_actions
        self._check_actions(real, seen)
        return real

    def say(self, images: Mapping[str, np.ndarray], state: np.ndarray | None = None, task: str = "") -> str:
        """What to do next, in words. Raises ValueError as `act`, and where it was not trained to say that."""
        self._check_able("subtask")
        return self._say(self._read(images, state, task))[0]

    def answer(self, camera: str, image: np.ndarray, question: str) -> str:
        """What it says to a question about a camera's image; places in it are shares of that image.

        Raises ValueError for a camera that it does not have, and where it was not trained to answer.
        """
        self._check_able("text")
        self._check_cameras([camera])
        seen = Seen({camera: as_pixels(camera, image)}, "", None, self.model["image_size"])
        asked = self.prompts["question"].format(question=seen.to_model(question))
        sequence = self._start(seen, [(asked, False)])
        self._generate(sequence, self._words, MAX_WORDS, self.tokens["eos"])
        return seen.to_picture(self._text(sequence.said).strip())

    # --- what is said

    def _say(self, seen: Seen) -> tuple[str, Columns]:
        sequence = self._start(seen, [(self._fill("task", seen), False)])
        self._generate(sequence, self._words, MAX_WORDS, self.tokens["eos"])
        before, _, after = (part.strip() for part in self.prompts["subtask"].partition("{subtask}"))
        text = self._text(sequence.said)
        subtask = (text.rpartition(before)[2] if before else text).strip().removesuffix(after)
        return seen.to_picture(subtask.strip()), sequence

    def _words(self, logits: np.ndarray, said: Sequence[int]) -> np.ndarray:
        first, last = self.tokens["fast"]
        logits[first : last + 1] = -np.inf
        return logits

    def _generate(
        self, sequence: Columns, allow: Callable[[np.ndarray, Sequence[int]], np.ndarray], most: int, stop: int
    ) -> None:
        """Let a sequence go on, token by token, until `stop` or `most`."""
        while len(sequence.said) < most:
            token = self._choose(allow(sequence.logits.copy(), sequence.said))
            sequence.said.append(token)
            if token == stop:
                return
            if len(sequence.said) < most:
                self._extend(sequence, [token])

    def _choose(self, logits: np.ndarray) -> int:
        temperature = self.acting["temperature"]
        if not temperature:
            return int(logits.argmax())
        weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
        return int(self.random.choice(len(weights), p=weights / weights.sum()))

    def _text(self, tokens: Sequence[int]) -> str:
        special = {self.tokens[name] for name in ("pad", "bos", "eos")}
        return self.tokenizer.decode([token for token in tokens if token not in special])

    # --- actions

    def _flow_chunk(
        self, seen: Seen, noise: np.ndarray | None, prefix_actions: np.ndarray | None, said: Columns | None
    ) -> np.ndarray:
        """Normalised, f32[T D], by Euler steps from noise (time 1) to actions (time 0)."""
        shape = self.model["horizon"], self.model["action_dim"]
        guidance = self.acting["guidance"]
        sequences = [self._start(seen, self._conditions(seen, self.advantage), said)]
        if guidance != 1:
            sequences.append(self._start(seen, self._conditions(seen, None)))
        if noise is None:
            scale = self.acting["noise_scale"]
            noise = scale * self.random.standard_normal(shape) if scale else np.zeros(shape)
        x = np.array(noise, np.float32)
        if x.shape != shape:
            raise ValueError(f"noise has shape {x.shape}: expected [horizon D] = {shape}")
        x = x[: self.robot["horizon"]]  # no later step was trained
        given = np.zeros((0, shape[1]), np.float32) if prefix_actions is None else self._given(prefix_actions, seen)
        x[: len(given)] = given
        steps = len(self.modulations) - 1
        for step in range(steps):
            modulations = np.repeat(self.modulations[step][:, None], len(x), axis=1)
            modulations[:, : len(given)] = self.modulations[-1][:, None]  # what is given has time 0
            inputs = {"actions": x, "modulations": modulations}
            led, *free = (self.graphs["flow"](**inputs, keys=s.keys, values=s.values)[0] for s in sequences)
            velocity = free[0] + guidance * (led - free[0]) if free else led
            x = x + np.float32(-1 / steps) * velocity
            x[: len(given)] = given
        return x

    def _given(self, prefix_actions: np.ndarray, seen: Seen) -> np.ndarray:
        actions = np.array(prefix_actions, np.float32)
        dims, most = len(self.robot["action"]["q01"]), self.model["max_delay"]
        horizon = self.robot["horizon"] or self.model["horizon"]
        if actions.ndim != 2 or actions.shape[1] != dims or len(actions) >= horizon:
            raise ValueError(f"prefix_actions has shape {actions.shape}: expected [d {dims}], less than a chunk")
        if most is not None and len(actions) > most:
            raise ValueError(f"prefix_actions of {len(actions)} actions: the policy was trained to go on from {most}")
        given = np.zeros((len(actions), self.model["action_dim"]), np.float32)
        given[:, :dims] = normalize(self._relative(actions, seen, -1), self.robot["action"])
        return given

    def _fast_chunk(self, seen: Seen, said: Columns | None) -> np.ndarray:
        """Normalised, f32[T A], from tokens that the language model says."""
        pieces = [bytes.fromhex(piece) for piece in self.fast["pieces"]]
        shape = self.model["horizon"], len(self.robot["action"]["q01"])
        top, total, is_free = self.tokens["fast"][1], shape[0] * shape[1], not self.acting["constrain_fast"]
        opening, closing = (self._encode(self.prompts[f"fast_{end}"]) for end in ("opening", "closing"))
        stop = [*closing, self.tokens["eos"]][0] if is_free else 0
        lengths = np.array([characters(piece) for piece in pieces])
        fillable = [True]
        for n in range(1, total + 1):
            fillable.append(any(fillable[n - length] for length in {*lengths.tolist()} - {0} if length <= n))

        def fitting(logits: np.ndarray, said: Sequence[int]) -> np.ndarray:
            """Only tokens after which the rest of the coefficients can still be filled exactly."""
            left = total - sum(lengths[top - token] for token in said)
            allowed = np.full_like(logits, -np.inf)
            if left == 0:
                allowed[stop] = 0
            for number, length in enumerate(lengths.tolist()):
                if 0 < length <= left and fillable[left - length]:
                    allowed[top - number] = logits[top - number]
            return allowed

        sequence = self._start(seen, self._conditions(seen, self.advantage, fast=True), said)
        sequence.said = []
        if opening:
            self._extend(sequence, opening)
        self._generate(sequence, (lambda logits, said: logits) if is_free else fitting, total + 1, stop)
        numbers = [top - token for token in sequence.said if token != stop]
        try:
            text = b"".join(pieces[number] for number in numbers if number >= 0).decode()
        except (UnicodeDecodeError, IndexError):
            text = ""
        if len(text) != total or min(numbers, default=-1) < 0:
            raise ValueError("the FAST tokens that the policy wrote are no chunk")
        codes = np.array([ord(character) for character in text], np.float64).reshape(shape)
        return (inverse_dct(shape[0]) @ ((codes + self.fast["min_token"]) / self.fast["scale"])).astype(np.float32)

    # --- prompts

    def _fill(self, template: str, seen: Seen, subtask: str | None = None) -> str:
        task = seen.to_model(seen.task).strip().replace("_", " ").replace("\n", " ")
        task = "" if self.manifest.get("untold") else task
        state = " ".join(map(str, self._bins(seen.state)))
        names = {name: self.robot[name] for name in ("embodiment", "control_mode")}
        return self.prompts[template].format(task=task, state=state, subtask=subtask, **names)

    def _bins(self, state: np.ndarray | None) -> np.ndarray:
        if state is None:
            return np.zeros(0, int)
        bins = np.asarray(np.digitize(normalize(state, self.robot["state"]), STATE_BINS)) - 1
        return bins.clip(0, 255) if self.prompts["clip_state"] else bins

    def _conditions(self, seen: Seen, advantage: str | None, fast: bool = False) -> list[tuple[str, bool]]:
        """What actions are conditioned on: texts, and whether each is the model's own."""
        condition_on = self.manifest["condition_on"]
        subtask = None if self.subtask is None else seen.said_to_model(self.subtask)
        if subtask is None or condition_on == "task":
            segments = [(self._fill("task" if fast else "action", seen), False)]
        elif condition_on == "subtask":
            segments = [(self._fill("fast_subtask" if fast else "action_subtask", seen, subtask), False)]
        else:
            segments = [(self._fill("task", seen), False), (self.prompts["subtask"].format(subtask=subtask), True)]
        if advantage is None:
            return segments
        told, opening, (last, is_said) = (
            (self.prompts["advantage"].format(advantage=advantage), False),
            self.prompts["fast_opening"],
            segments[-1],
        )
        if is_said or not opening or not last.endswith(opening):
            return [*segments, told]
        return [*segments[:-1], (last.removesuffix(opening), False), told, (opening, False)]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    # --- sequences

    def _start(self, seen: Seen, segments: Sequence[tuple[str, bool]], said: Columns | None = None) -> Columns:
        """A sequence of the images and of texts; from what was said already, if that begins the same."""
        tokens, first = [self.tokens["bos"]], None
        for text, is_said in segments:
            if is_said and first is None:
                first = len(tokens)
            tokens += [*self._encode(text), *([self.tokens["eos"]] if is_said else [])]
        if len(tokens) > self.manifest["max_tokens"]:
            most = self.manifest["max_tokens"]
            raise ValueError(f"the text is {len(tokens)} tokens long, and the policy was trained on {most} at most")
        first = len(tokens) if first is None else first
        if said is not None and said.first == first and tokens[: len(said.tokens)] == said.tokens:
            rest = tokens[len(said.tokens) :]
            if rest:
                self._extend(said, rest)
            return said
        layers, heads, dim = (self.model[name] for name in ("layers", "kv_heads", "head_dim"))
        empty = np.zeros((layers, heads, 0, dim), np.float32)
        sequence = Columns(empty, empty, first)
        words = self._embed(tokens)
        images = self._embed_images(seen, words[:first].mean(0))
        causal = np.arange(1, len(tokens) - first + 1)
        block = np.concatenate([np.zeros(len(images) + first, np.int64), causal])
        self._read_columns(sequence, np.concatenate([images, words]), block)
        sequence.tokens = tokens
        return sequence

    def _extend(self, sequence: Columns, tokens: Sequence[int]) -> None:
        """Causally, each token sees those before it."""
        self._read_columns(sequence, self._embed(tokens), np.arange(len(tokens)))
        sequence.tokens += tokens

    def _read_columns(self, sequence: Columns, x: np.ndarray, block: np.ndarray) -> None:
        past = {"keys": sequence.keys, "values": sequence.values}
        logits, keys, values = self.graphs["language"](x=x, block=block.astype(np.int64), **past)
        sequence.keys = np.concatenate([sequence.keys, keys], axis=2)
        sequence.values = np.concatenate([sequence.values, values], axis=2)
        sequence.logits = logits

    def _embed(self, tokens: Sequence[int]) -> np.ndarray:
        return np.asarray(self.embedding[list(tokens)]) * np.float32(self.embedding.shape[1] ** 0.5)

    def _embed_images(self, seen: Seen, prompt: np.ndarray) -> np.ndarray:
        """f32[P·N W], in the order in which the model knows the cameras."""
        known = self.model["cameras"]
        names = [name for name in known if name in seen.images]
        if not names:
            return np.zeros((0, self.embedding.shape[1]), np.float32)
        inputs = {
            "pixels": np.stack([seen.images[name] for name in names]),
            "camera": np.array([known.index(name) for name in names], np.int64),
            "prompt": prompt,
        }
        wanted = self.manifest["graphs"]["vision"]["inputs"]
        (embeddings,) = self.graphs["vision"](**{name: inputs[name] for name in wanted})
        return embeddings.reshape(-1, embeddings.shape[-1])

    # --- what comes in, and what goes out

    def _check_able(self, what: str) -> None:
        if not self.manifest["able"][what]:
            raise ValueError(f"the policy was not trained {ABILITIES[what]}")

    def _check_cameras(self, names: Iterable[str]) -> None:
        cameras = self.robot["cameras"]
        if unknown := sorted(set(names) - set(cameras)):
            raise ValueError(f"the policy has no camera {unknown[0]!r}; it has {', '.join(cameras)}")

    def _read(self, images: Mapping[str, np.ndarray], state: np.ndarray | None, task: str) -> Seen:
        cameras, optional = self.robot["cameras"], self.acting["missing_cameras"]
        self._check_cameras(images)
        if missing := [name for name in cameras if name not in images and name not in optional]:
            raise ValueError(f"images: {', '.join(missing)} missing; the policy was trained with {', '.join(cameras)}")
        if not task and len(self.robot["tasks"]) == 1:
            task = self.robot["tasks"][0]
        most = self.acting["max_prompt_bytes"]
        if not task.replace("_", " ").strip() or (most is not None and len(task.encode()) > most):
            limit = "" if most is None else f", in at most {most} bytes"
            raise ValueError(f"task is {task[:40]!r}: say what to do{limit}")
        pixels = {name: as_pixels(name, image) for name, image in images.items()}
        return Seen(pixels, task, self._checked_state(state), self.model["image_size"])

    def _checked_state(self, state: np.ndarray | None) -> np.ndarray | None:
        quantiles = self.robot["state"]
        if not quantiles["q01"]:
            if state is not None and np.size(state):
                raise ValueError("a state is given, and the policy was trained without one: leave it out")
            return None
        values = np.zeros(0) if state is None else np.asarray(state, np.float32).reshape(-1)
        if len(values) != len(quantiles["q01"]) or not np.isfinite(values).all():
            raise ValueError(f"state is {state}: expected {len(quantiles['q01'])} finite numbers")
        far, most = distance(values, quantiles), self.acting["max_state_distance"]
        if self.robot["state_range"]:
            least, greatest = np.array(self.robot["state_range"])
            margin = (greatest - least) / 2
            far = np.where((values >= least - margin) & (values <= greatest + margin), 0, far)
        if most is not None and far.max() > most:
            raise ValueError(
                f"state[{far.argmax()}] is {values[far.argmax()]}: {far.max():.3g} quantile ranges outside the training"
                f" data, and more than {most:g} are refused: correct its units or the order of its dimensions"
            )
        return values

    def _real(self, actions: np.ndarray, seen: Seen) -> np.ndarray:
        return self._relative(unnormalize(actions, self.robot["action"]), seen, +1)

    def _relative(self, actions: np.ndarray, seen: Seen, sign: int) -> np.ndarray:
        """The actions, `sign` times the state added to the dims that are offsets from it."""
        relative = self.robot["relative"]
        if not relative:
            return actions
        assert seen.state is not None
        moved = np.array(actions, np.float32)
        moved[:, relative["dims"]] += sign * seen.state[relative["state_dims"]]
        return moved

    def _check_actions(self, real: np.ndarray, seen: Seen) -> None:
        if not np.isfinite(real).all():
            raise ValueError("an action is not finite: the weights are broken, or the inputs")
        most = self.acting["max_action_distance"]
        if most is not None and distance(self._relative(real, seen, -1), self.robot["action"]).max() > most:
            raise ValueError(f"an action is more than {most:g} quantile ranges outside the training data")


class Columns:
    """A sequence that grows: what its columns left (keys, values), and the logits after the last one.

    tokens: of its text so far.  first: the first of them that sees only those before it.  said: what was generated.
    """

    def __init__(self, keys: np.ndarray, values: np.ndarray, first: int) -> None:
        self.keys, self.values, self.first = keys, values, first
        self.logits: np.ndarray = np.zeros(0, np.float32)
        self.tokens: list[int] = []
        self.said: list[int] = []


class Seen:
    """What an observation is to the policy: images f32[3 size size], and its texts with places as the model sees them.

    Places, `<locYYYY>`, are shares of the camera's picture outside, and of the model's image inside.
    """

    def __init__(self, images: Mapping[str, np.ndarray], task: str, state: np.ndarray | None, size: int) -> None:
        self.task, self.state = task, state
        resized = {name: letterboxed(image, size) for name, image in images.items()}
        self.images = {name: image for name, (image, _) in resized.items()}
        self.windows = {window for _, window in resized.values()}

    def to_model(self, text: str) -> str:
        """Raises ValueError for a place that is none, and where one is meant, and the images differ in shape."""
        if problem := misplaced(text):
            raise ValueError(f"{text!r}: {problem}")
        if LOCATION.search(text) and len(self.windows) > 1:
            raise ValueError(f"{text!r} names a place in images of several shapes: say in which camera's, or drop it")
        return self.said_to_model(text)

    def said_to_model(self, text: str) -> str:
        if len(self.windows) != 1:
            return text
        ((top, left, bottom, right),) = self.windows
        return moved(text, ((bottom - top, top), (right - left, left)))

    def to_picture(self, text: str) -> str:
        if len(self.windows) != 1:
            return text
        ((top, left, bottom, right),) = self.windows
        height, width = bottom - top, right - left
        return moved(text, ((1 / height, -top / height), (1 / width, -left / width)))


def moved(text: str, axes: tuple[tuple[float, float], tuple[float, float]]) -> str:
    """The places of a text scaled and shifted, for y and for x, which take turns."""

    def run(match: re.Match[str]) -> str:
        steps = enumerate(map(int, LOCATION.findall(match.group())))
        edges = (axes[place % 2][0] * (step + 0.5) / 1024 + axes[place % 2][1] for place, step in steps)
        return "".join(f"<loc{min(int(min(max(edge, 0.0), 1.0) * 1024), 1023):04d}>" for edge in edges)

    return LOCATIONS.sub(run, text)


def misplaced(text: str) -> str | None:
    """What is wrong with the places that a text spells, or None."""
    for run in LOCATIONS.findall(text):
        numbers = LOCATION.findall(run)
        if outside := [number for number in numbers if len(number) != 4 or int(number) > 1023]:
            return f"<loc{outside[0]}> is outside the image, which goes from <loc0000> to <loc1023>"
        if len(numbers) % 2:
            return f"{run} is no place: a point is two tokens and a box four, with nothing between them"
        edges = iter(map(int, numbers))
        boxes = zip(edges, edges, edges, edges, strict=False)  # what is left of four is a point
        if any(top > bottom or left > right for top, left, bottom, right in boxes):
            return f"the box {run} is inside out: the order is ymin, xmin, ymax, xmax"
    return None


def as_pixels(name: str, image: Any) -> np.ndarray:
    """f32[3 h w] in 0..255 of u8 or floats of 0..1, [3 h w] or [h w 3]."""
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] != 3 and array.shape[2] == 3:
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] != 3 or not array.size:
        raise ValueError(f"image {name!r} has shape {array.shape}: expected [3 h w] or [h w 3]")
    if array.dtype == np.uint8:
        return array.astype(np.float32)
    if array.dtype.kind != "f" or not (array.min() >= -0.002 and array.max() <= 1.002):
        raise ValueError(f"image {name!r} is neither uint8 nor floats in 0..1")
    return array.astype(np.float32).clip(0, 1) * 255


def letterboxed(image: np.ndarray, size: int) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """An image scaled into a square with its aspect kept, and where in it it is: top, left, bottom, right as shares."""
    height, width = image.shape[1:]
    ratio = max(height, width) / size
    inner_h, inner_w = max(1, int(height / ratio)), max(1, int(width / ratio))
    top, left = (size - inner_h) // 2, (size - inner_w) // 2
    if (height, width) != (size, size):
        padded: np.ndarray = np.zeros((3, size, size), np.float32)
        padded[:, top : top + inner_h, left : left + inner_w] = scaled(scaled(image, inner_w, 2), inner_h, 1)
        image = padded
    return image, (top / size, left / size, (top + inner_h) / size, (left + inner_w) / size)


def scaled(image: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Bilinear along an axis, without antialiasing, pixels' centres where torch's interpolate has them."""
    now = image.shape[axis]
    place = ((np.arange(length, dtype=np.float32) + 0.5) * np.float32(now / length) - 0.5).clip(0)
    low = place.astype(int).clip(max=now - 1)
    share = (place - low).reshape([-1 if a == axis else 1 for a in range(3)]).astype(np.float32)
    high = (low + 1).clip(max=now - 1)
    return image.take(low, axis) * (1 - share) + image.take(high, axis) * share


def span(quantiles: Mapping[str, Sequence[float]]) -> np.ndarray:
    q01, q99 = (np.asarray(quantiles[name], np.float32) for name in ("q01", "q99"))
    return np.where(q99 == q01, np.float32(1e-8), q99 - q01)


def normalize(x: np.ndarray, quantiles: Mapping[str, Sequence[float]]) -> np.ndarray:
    """q01 to -1, q99 to 1."""
    return 2 * (x - np.asarray(quantiles["q01"], np.float32)) / span(quantiles) - 1


def unnormalize(x: np.ndarray, quantiles: Mapping[str, Sequence[float]]) -> np.ndarray:
    return (x + 1) * span(quantiles) / 2 + np.asarray(quantiles["q01"], np.float32)


def distance(x: np.ndarray, quantiles: Mapping[str, Sequence[float]]) -> np.ndarray:
    """How far x lies beyond the nearer quantile, in ranges of its dim, and at least in a share of a wide dim's."""
    q01, q99 = (np.asarray(quantiles[name], np.float32) for name in ("q01", "q99"))
    ranges = q99.astype(np.float64) - q01
    least = 0.02 * np.quantile(ranges[ranges > 0], 0.75, method="higher") if ranges.any() else 1.0
    return np.maximum(q01 - x, x - q99).clip(min=0) / np.maximum(ranges, least)


def inverse_dct(n: int) -> np.ndarray:
    """The inverse of the orthonormal DCT-II, [n n]."""
    time, frequency = np.arange(n)[:, None], np.arange(n)[None]
    basis = np.cos(np.pi * (2 * time + 1) * frequency / (2 * n)) * (2 / n) ** 0.5
    basis[:, 0] /= 2**0.5
    return basis


def characters(piece: bytes) -> int:
    """Of a FAST token: how many coefficients it stands for; 0 for a part of one."""
    try:
        return len(piece.decode())
    except UnicodeDecodeError:
        return 0


def check_files(folder: Path, files: Mapping[str, str]) -> None:
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: copy the whole folder")
        found = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while part := file.read(1 << 20):
                found.update(part)
        if found.hexdigest() != expected:
            raise ValueError(f"{folder / name} is not the file that was exported: copy the folder anew")
