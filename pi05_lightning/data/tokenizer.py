"""Text tokenizers with PaliGemma's coordinate tokens: the small one that is shipped, or PaliGemma's own.

`<loc0000>` … `<loc1023>` and then `<seg000>` … `<seg127>` are the last ids of either vocabulary, and each is one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from pi05_lightning.files.hub import TOKENIZER, local_folder
from pi05_lightning.files.local import check_downloaded, read_json, shown
from pi05_lightning.types import NUM_LOC, NUM_SEG

LOCATIONS = [f"<loc{i:04d}>" for i in range(NUM_LOC)]
SEGMENTS = [f"<seg{i:03d}>" for i in range(NUM_SEG)]
SHIPPED = "tiny"
GEMMA_SIZE = 256_000  # ids of Gemma's text, which PaliGemma's <loc> tokens follow


class TextTokenizer:
    """Text to ids and back. vocab_size counts every row that the model's embedding needs: <seg127> is the last.

    Text that spells a special token, such as "<eos>" in a caption, stays text; only <loc> and <seg> are recognised.
    Raises ValueError for a tokenizer that lacks PaliGemma's tokens, or has them elsewhere.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.pad_id, self.eos_id, self.bos_id = (self._id(token) for token in ("<pad>", "<eos>", "<bos>"))
        self.loc_ids = self._range(LOCATIONS)
        seg_ids = self._range(SEGMENTS)
        self.vocab_size = seg_ids.stop
        above = self.tokenizer.get_vocab_size(with_added_tokens=False) > self.vocab_size
        not_paligemma = self.vocab_size > GEMMA_SIZE and self.loc_ids.start != GEMMA_SIZE
        if self.loc_ids.stop != seg_ids.start or above or not_paligemma:
            raise ValueError(
                f"<loc0000> is id {self.loc_ids.start} and <seg000> id {seg_ids.start} of"
                f" {tokenizer.get_vocab_size()}: they must follow all text, at {GEMMA_SIZE} in PaliGemma's vocabulary."
                " This is not the tokenizer of a PaliGemma model"
            )

    @classmethod
    def load(cls, name: str | Path) -> TextTokenizer:
        """`tiny` for the shipped one, else a local folder or Hub id with PaliGemma's tokenizer, through transformers.

        Raises ValueError when it cannot be had, is damaged or is another model's.
        """
        if str(name) == SHIPPED:
            asset = files("pi05_lightning.data") / "assets" / "tokenizer.json"
            return cls(Tokenizer.from_str(asset.read_text(encoding="utf-8")))
        from transformers import AutoTokenizer

        absent = ValueError(
            f"no tokenizer at {shown(name)}. PaliGemma's is gated on the Hub: log in with an account that accepted its"
            " licence, or give a local folder that holds tokenizer.json and tokenizer_config.json"
        )
        try:
            folder = local_folder(name, files=TOKENIZER)
        except ValueError as error:
            raise absent from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
        except Exception as error:  # of a damaged file anything
            for file in filter(Path.is_file, folder.glob("tokenizer*")):
                check_downloaded(file)
                if file.suffix == ".json":
                    read_json(file)  # which says what is no JSON
            if (folder / "tokenizer.json").is_file():
                said = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise ValueError(f"{folder / 'tokenizer.json'} is damaged ({said}): get it again") from error
            raise absent from error
        return cls(with_coordinates(tokenizer))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without <bos> or <eos>."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without <pad>, <bos> and <eos>."""
        return self.tokenizer.decode([i for i in ids if i not in (self.pad_id, self.bos_id, self.eos_id)])

    def ordinal_ids(self) -> list[list[int]]:
        """Groups of ids that stand for ordered numbers: coordinates, and state bins where each is one token."""
        bins = [self.encode(f"State: {i}")[-1] for i in range(256)]
        return [list(self.loc_ids), *([bins] if len(set(bins)) == len(bins) else [])]

    def to_dict(self) -> dict[str, Any]:
        """The whole tokenizer as plain types, so that a checkpoint needs no other file."""
        return {"tokenizer": self.tokenizer.to_str()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TextTokenizer:
        return cls(Tokenizer.from_str(values["tokenizer"]))

    def __reduce__(self) -> tuple[Any, ...]:
        return TextTokenizer.from_dict, (self.to_dict(),)

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no {token}: it is not a PaliGemma tokenizer")
        return found

    def _range(self, tokens: Sequence[str]) -> range:
        ids = [self._id(token) for token in tokens]
        if ids != list(range(ids[0], ids[0] + len(ids))):
            raise ValueError(f"the ids of {tokens[0]} … {tokens[-1]} are not consecutive")
        return range(ids[0], ids[-1] + 1)


def with_coordinates(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with every <loc> and <seg> as one token: the bare PaliGemma one may know none of them."""
    for tokens in (LOCATIONS, SEGMENTS):
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    return tokenizer
