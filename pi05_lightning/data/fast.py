"""FAST: action chunks as a few discrete tokens (Pertsch et al., arXiv 2501.09747).

Quantile-normalised actions -> orthonormal DCT over time -> round(scale · c) -> low frequencies of all dims first -> one
character per coefficient -> byte-pair encoding. The folder format is that of the public `physical-intelligence/fast`
processor, read and written without running its code.

What differs from it: a sequence that does not decode is an error, never zeros; a coefficient that the vocabulary
cannot spell is moved to the nearest one that it can and counted, where the public one drops it and loses the chunk; and
our own fits merge across the whole chunk, where the public one first cuts it into words by a pattern for English.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.fft import dct, idct
from tokenizers import Tokenizer, decoders, models, trainers

from pi05_lightning.files.local import first_line, read_json, shown, write_json, write_text

log = logging.getLogger(__name__)

CHARACTERS = 2048  # code points looked at, the ones that UTF-8 spells in at most two bytes
_FILES = ("processor_config.json", "tokenizer.json")
MARGIN = 1.25  # range of coefficients that a fit prepares for, relative to what it sees
NO_CHUNK = "the FAST tokens are no chunk: constrain_fast, or ask again"


class FastDecodeError(ValueError):
    """Tokens that are not an action chunk."""


class FastTokenizer:
    """Action chunks to FAST tokens and back.

    bpe: characters to tokens.  scale: steps per unit of a DCT coefficient.  min_token: the step that character 0 stands
    for.  vocab_size: ids are below it.  horizon, dim: of the chunks it was made for, if they were one size; `decode`
    takes them from here when it is not told.
    """

    def __init__(
        self,
        bpe: Tokenizer,
        scale: float,
        min_token: int,
        vocab_size: int,
        horizon: int | None = None,
        dim: int | None = None,
    ) -> None:
        self.bpe, self.scale, self.min_token = bpe, scale, min_token
        self.vocab_size = max(vocab_size, bpe.get_vocab_size())
        self.horizon, self.dim = horizon, dim
        self.clipped = 0
        """Coefficients that `encode` had to move into the vocabulary's range, so far and in this process."""
        self.pieces = _token_bytes(bpe)
        """What each token stands for, in UTF-8."""
        self.lengths = np.array([_count_characters(token) for token in self.pieces], dtype=np.int64)
        """i64[V]: coefficients that a token expands to; 0 for a part of a character, which never decodes by itself."""
        spelled = np.array(_spelled(bpe))
        if not len(spelled):
            raise ValueError(
                "the FAST tokenizer's vocabulary spells no coefficient at all: its tokenizer.json is damaged"
            )
        distance = np.abs(np.arange(spelled[-1] + 1)[:, None] - spelled[None, :])
        self._nearest = spelled[distance.argmin(1)].astype("<u4")

    # --- actions to tokens

    def misfit(self, horizon: int, dim: int) -> str:
        """Of what other chunks it is, as its predicate; empty where it fits those of so many steps and dims."""
        if self.horizon not in (None, horizon):
            wanted = f"the model's horizon (model.config.horizon) is {horizon}"
            return f"was fitted on chunks of {self.horizon} steps, and {wanted}"
        if self.dim not in (None, dim):
            return f"was fitted on actions of {self.dim} dims, and the robot's have {dim}"
        return ""

    def encode(self, chunks: np.ndarray, warns: bool = True) -> list[list[int]]:
        """Quantile-normalised chunks f32[N T A] to token ids, one list per chunk.

        warns: of coefficients that had to be moved, once.
        Raises ValueError for another number of axes and for values that are not finite.
        """
        characters, clipped = self._characters(chunks)
        self._count_clipped(np.count_nonzero(clipped), clipped.size, warns)
        texts = [chunk.tobytes().decode("utf-32-le") for chunk in characters]
        return [encoding.ids for encoding in self.bpe.encode_batch_fast(texts, add_special_tokens=False)]

    def quantize(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rounded coefficients that tokens will carry, i64[N T A], and where they were clipped, bool[N T A]."""
        characters, clipped = self._characters(chunks)
        return characters.astype(np.int64) + self.min_token, clipped

    def _characters(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The code points that tokens will carry, u32[N T A], and where they are not the coefficients' own."""
        chunks = np.asarray(chunks)
        if chunks.ndim != 3:
            raise ValueError(f"expected action chunks [N T A], got shape {list(chunks.shape)}")
        if not np.isfinite(chunks).all():
            raise ValueError("an action chunk holds NaN or infinite values: look for them with `pi05 stats`")
        wanted = quantized_dct(chunks, self.scale) - self.min_token
        characters = self._nearest[wanted.clip(0, len(self._nearest) - 1).astype(np.intp)]
        return characters, characters != wanted

    def _count_clipped(self, clipped: int, total: int, warns: bool) -> None:
        if warns and clipped and not self.clipped:
            log.warning(
                "%d of %d FAST coefficients are outside the range that the tokenizer was fitted on and were moved to"
                " its edge; fit it on these actions if this is more than a few (counted in FastTokenizer.clipped)",
                clipped,
                total,
            )
        self.clipped += clipped

    # --- tokens to actions

    def decode(self, tokens: Sequence[int], horizon: int | None = None, dim: int | None = None) -> np.ndarray:
        """Token ids to a normalised chunk f32[T A].

        Raises FastDecodeError when they do not expand to exactly T·A coefficients.
        """
        return self._from_coefficients(self._coefficients(tokens, *self._size(horizon, dim))[None])[0]

    def decode_batch(
        self, tokens: Sequence[Sequence[int]], horizon: int | None = None, dim: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `decode` for many: f32[N T A] and bool[N], which sequences decoded; the others are NaN."""
        size = self._size(horizon, dim)
        actions = np.full((len(tokens), *size), np.nan, dtype=np.float32)
        ok = np.zeros(len(tokens), dtype=bool)
        for row, sequence in enumerate(tokens):
            try:
                actions[row] = self.decode(sequence, *size)
                ok[row] = True
            except FastDecodeError:
                continue
        return actions, ok

    def reconstruct(self, chunks: np.ndarray) -> np.ndarray:
        """What decoding the encoded chunks gives, f32[N T A], without the way through tokens."""
        return self._from_coefficients(self.quantize(chunks)[0])

    def _size(self, horizon: int | None, dim: int | None) -> tuple[int, int]:
        horizon, dim = horizon or self.horizon, dim or self.dim
        if horizon is None or dim is None:
            raise ValueError("this FAST tokenizer was made for chunks of several sizes: pass horizon and dim")
        return horizon, dim

    def _coefficients(self, tokens: Sequence[int], horizon: int, dim: int) -> np.ndarray:
        unknown = [token for token in tokens if not 0 <= token < len(self.pieces)]
        if unknown:
            raise FastDecodeError(f"not FAST tokens: {unknown[:8]} (the vocabulary has {len(self.pieces)})")
        try:
            text = b"".join([self.pieces[token] for token in tokens]).decode()
        except UnicodeDecodeError as error:
            raise FastDecodeError(f"tokens that break a character apart: {error}") from error
        if len(text) != horizon * dim:
            raise FastDecodeError(
                f"{len(tokens)} tokens expand to {len(text)} coefficients, but a chunk of {horizon} steps and {dim}"
                f" dimensions has {horizon * dim}"
            )
        characters = np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)
        return (characters + self.min_token).reshape(horizon, dim)

    def _from_coefficients(self, coefficients: np.ndarray) -> np.ndarray:
        return idct(coefficients / self.scale, axis=1, norm="ortho").astype(np.float32)

    # --- fitting and storing

    @classmethod
    def fit(
        cls,
        chunks: np.ndarray | Sequence[np.ndarray],
        vocab_size: int = 1024,
        scale: float = 10,
        coverage: float = 1.0,
        merge: bool = True,
        show_progress: bool = False,
    ) -> FastTokenizer:
        """Learn a vocabulary from normalised chunks f32[N T A], or from several such arrays of different sizes.

        coverage: share of the coefficients that must have a character of their own, the rarest large ones are clipped.
        Where the vocabulary has room the range is widened, for actions that go a little further than these.
        merge: frequent sequences of coefficients are tokens of their own; otherwise every coefficient is one token.
        Raises ValueError when coverage takes more characters than vocab_size, or than `CHARACTERS`.
        """
        parts = [chunks] if isinstance(chunks, np.ndarray) else list(chunks)
        coefficients = [quantized_dct(part, scale).astype(np.int64) for part in parts]
        low, high = _covering_range(np.concatenate([part.ravel() for part in coefficients]), coverage)
        most = min(vocab_size, CHARACTERS)
        if high - low + 1 > most:
            raise ValueError(
                f"the DCT coefficients run from {low} to {high}, {high - low + 1} values, more than vocab_size"
                f" {vocab_size}, or the {CHARACTERS} that any has characters for. Some dimension has rare values far"
                " outside its quantiles (`pi05 stats` shows which): mend the data, ask for less coverage (say 0.9999),"
                " a smaller scale or a larger vocabulary"
            )
        wide = math.ceil(MARGIN * max(-low, high))
        if 2 * (2 * wide + 1) <= vocab_size and 2 * wide + 1 <= CHARACTERS:
            low, high = -wide, wide
        alphabet = [chr(code) for code in range(high - low + 1)]
        if not merge:
            vocab_size = len(alphabet)
        bpe = Tokenizer(models.BPE())
        bpe.decoder = decoders.Fuse()
        rows = (row for part in coefficients for row in part.clip(low, high).reshape(len(part), -1))
        bpe.train_from_iterator(
            ((row - low).astype("<u4").tobytes().decode("utf-32-le") for row in rows),
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                min_frequency=2,
                show_progress=show_progress,
                initial_alphabet=alphabet,
            ),
            length=sum(map(len, parts)),
        )
        horizons, dims = ({part.shape[axis] for part in parts} for axis in (1, 2))
        horizon, dim = (sizes.pop() if len(sizes) == 1 else None for sizes in (horizons, dims))
        return cls(bpe, scale, low, vocab_size, horizon, dim)

    def save(self, folder: Path | str) -> None:
        """Write the public processor's folder: `AutoProcessor` reads it (its code comes from the hub), and so do we."""
        folder = Path(folder)
        (folder / "processor_config.json").unlink(missing_ok=True)  # it is written last: two halves are no tokenizer
        write_text(folder / "tokenizer.json", self.bpe.to_str(pretty=True))
        processor = "UniversalActionProcessor"
        files: dict[str, dict[str, Any]] = {
            "tokenizer_config.json": {
                "clean_up_tokenization_spaces": False,
                "processor_class": processor,
                "tokenizer_class": "PreTrainedTokenizerFast",
            },
            "special_tokens_map.json": {},
            "processor_config.json": {
                "action_dim": self.dim,
                "auto_map": {"AutoProcessor": f"physical-intelligence/fast--processing_action_tokenizer.{processor}"},
                "min_token": self.min_token,
                "processor_class": processor,
                "scale": self.scale,
                "time_horizon": self.horizon,
                "vocab_size": self.vocab_size,
            },
        }
        for name, content in files.items():
            write_json(folder / name, content)

    @classmethod
    def load(cls, folder: Path | str) -> FastTokenizer:
        """Read a folder in the public processor's format; no code in it is run.

        Raises ValueError that names the file which is missing, incomplete or damaged.
        """
        folder = Path(folder).expanduser()
        for name in _FILES:
            if not (folder / name).is_file():
                raise ValueError(
                    f"{shown(folder)} is no FAST tokenizer, it has no {name}: make one with `pi05 tokenizer`"
                )
        config = read_json(folder / "processor_config.json")
        missing = {"scale", "min_token", "vocab_size"} - set(config)
        if missing:
            raise ValueError(f"{folder / 'processor_config.json'} does not say {', '.join(sorted(missing))}")
        file = folder / "tokenizer.json"
        try:
            bpe = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more exact
            read_json(file)  # which says what is no JSON
            raise ValueError(f"{file} is damaged ({first_line(error)}): download or fit it again") from error
        return cls(
            bpe,
            config["scale"],
            config["min_token"],
            config["vocab_size"],
            config.get("time_horizon"),
            config.get("action_dim"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain types, for a checkpoint."""
        return {
            "tokenizer": self.bpe.to_str(),
            "scale": self.scale,
            "min_token": self.min_token,
            "vocab_size": self.vocab_size,
            "horizon": self.horizon,
            "dim": self.dim,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FastTokenizer:
        """The inverse of `to_dict`."""
        return cls(Tokenizer.from_str(values["tokenizer"]), **{k: v for k, v in values.items() if k != "tokenizer"})

    def __reduce__(self) -> tuple[Any, ...]:
        return FastTokenizer.from_dict, (self.to_dict(),)


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a whole one."""
    return all((folder / name).is_file() for name in _FILES)


def quantized_dct(chunks: np.ndarray, scale: float) -> np.ndarray:
    """round(scale · DCT-II over time), orthonormal, halves to even: f32[N T A] to whole numbers f32[N T A]."""
    return np.around(dct(chunks, axis=1, norm="ortho") * scale)


def _covering_range(coefficients: np.ndarray, coverage: float) -> tuple[int, int]:
    """The smallest and largest coefficient when the outermost 1 − coverage of all, by size, is left out."""
    if coverage < 1:
        bound = np.quantile(np.abs(coefficients), coverage, method="higher")
        coefficients = coefficients[np.abs(coefficients) <= bound]
    return int(coefficients.min()), int(coefficients.max())


def _byte_letters() -> dict[str, int]:
    """The letters that GPT-2's byte-level scheme writes bytes with: itself where printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _is_byte_level(bpe: Tokenizer) -> bool:
    return isinstance(bpe.decoder, decoders.ByteLevel)


def _token_bytes(bpe: Tokenizer) -> list[bytes]:
    """What each token stands for, in UTF-8, which a byte-level token may begin or end within a character of."""
    tokens = [bpe.id_to_token(token) or "" for token in range(bpe.get_vocab_size())]
    if not _is_byte_level(bpe):
        return [token.encode() for token in tokens]
    letters = _byte_letters()
    return [bytes(letters[c] for c in token) if set(token) <= set(letters) else token.encode() for token in tokens]


def _spelled(bpe: Tokenizer) -> list[int]:
    """The characters that the vocabulary can spell, ascending."""
    vocab = bpe.get_vocab()
    if not _is_byte_level(bpe):
        return [code for code in range(CHARACTERS) if chr(code) in vocab]
    known = {byte for letter, byte in _byte_letters().items() if letter in vocab}
    return [code for code in range(CHARACTERS) if known.issuperset(chr(code).encode())]


def _count_characters(token: bytes) -> int:
    try:
        return len(token.decode())
    except UnicodeDecodeError:
        return 0
