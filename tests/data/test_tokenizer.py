"""Text tokenizers: the shipped one's layout, PaliGemma's coordinate tokens."""

from __future__ import annotations

import json
import pickle
from importlib.resources import files
from pathlib import Path

import pytest
from transformers import GemmaTokenizer

from pi05_lightning.data.prompt import Prompts
from pi05_lightning.data.tokenizer import LOCATIONS, SEGMENTS, TextTokenizer
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.fast import FastHead
from tools.make_tokenizer import make

TEXTS = [
    "Task: pick up the red block, State: 3 128 255;\nAction: ",
    "  two  spaces, a tab\t, and lines\n\n",
    "日本語, é, 🤖, ▁, \x00, \u200b",
    "",
    "<loc0000><loc1023><loc0512><loc0001> drawer handle",
]


@pytest.fixture(scope="module")
def tiny() -> TextTokenizer:
    return TextTokenizer.load("tiny")


def save_gemma(folder: Path, *, coordinates: bool, text_size: int = 256_000, image: bool = False) -> Path:
    """A tokenizer of PaliGemma's kind and layout, with few words: bytes, some letters, unused ids, and <loc> or not."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*"▁abcdefghijklmnopqrstuvwxyz0123456789:,;", "ab"]
    tokens += [f"<unused{i}>" for i in range(text_size - len(tokens))]
    if coordinates:
        tokens += LOCATIONS + SEGMENTS
    gemma = GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[("a", "b")])  # type: ignore[list-item]
    if image:
        gemma.add_special_tokens({"additional_special_tokens": ["<image>"]})
    gemma.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["bare", "complete"])
def paligemma(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    complete = request.param == "complete"
    folder = save_gemma(tmp_path_factory.mktemp("paligemma"), coordinates=complete, image=complete)
    return TextTokenizer.load(folder)


# --- the shipped tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(tiny: TextTokenizer, text: str) -> None:
    assert tiny.decode(tiny.encode(text)) == text


def test_layout_is_paligemmas(tiny: TextTokenizer) -> None:
    assert (tiny.pad_id, tiny.eos_id, tiny.bos_id, tiny.vocab_size) == (0, 1, 2, 4096)
    assert tiny.loc_ids == range(4096 - 128 - 1024, 4096 - 128)
    assert tiny.encode("<seg000><seg127>") == [4096 - 128, 4095]


def test_no_text_uses_the_ids_of_fast(tiny: TextTokenizer) -> None:
    reserved = set(FastHead(ModelConfig.preset("tiny").shapes).ids)
    words = {i for text in [*TEXTS, "<unused0000><unused1849>"] for i in tiny.encode(text)}
    learned = {tiny.tokenizer.token_to_id(token) for token in json.loads(tiny.tokenizer.to_str())["model"]["vocab"]}
    assert not reserved & (words | learned | set(tiny.loc_ids))


@pytest.mark.parametrize("number", [0, 9, 10, 99, 100, 128, 255])
def test_a_state_bin_is_one_token(tiny: TextTokenizer, number: int) -> None:
    assert len(tiny.encode(f"State: {number} {number};")) == len(tiny.encode("State:;")) + 2


def test_ordinal_ids_are_locations_and_state_bins(tiny: TextTokenizer) -> None:
    locations, bins = tiny.ordinal_ids()
    assert locations == list(tiny.loc_ids)
    assert [tiny.decode([i]) for i in bins] == [f" {number}" for number in range(256)]


def test_prompts_are_short(tiny: TextTokenizer) -> None:
    prompt = Prompts().action.format(task="open the drawer", state="3 128 255 0")
    assert len(tiny.encode(prompt)) <= 20


def test_special_tokens_in_a_text_are_text(tiny: TextTokenizer) -> None:
    text = "<bos>the end<eos><pad>"
    ids = tiny.encode(text)
    assert not {tiny.bos_id, tiny.eos_id, tiny.pad_id} & set(ids)
    assert tiny.decode(ids) == text


def test_decoding_leaves_out_padding_and_ends(tiny: TextTokenizer) -> None:
    ids = [tiny.bos_id, *tiny.encode("open"), tiny.eos_id, tiny.pad_id]
    assert tiny.decode(ids) == "open"


def test_the_asset_is_what_its_script_makes() -> None:
    asset = files("pi05_lightning.data") / "assets" / "tokenizer.json"
    assert make().to_str() == asset.read_text(encoding="utf-8")


@pytest.mark.parametrize("way", ["dict", "pickle"])
def test_storing_keeps_everything(tiny: TextTokenizer, way: str) -> None:
    if way == "dict":
        back = TextTokenizer.from_dict(json.loads(json.dumps(tiny.to_dict())))
    else:
        back = pickle.loads(pickle.dumps(tiny))
    for text in [*TEXTS, "<eos>"]:
        assert back.encode(text) == tiny.encode(text)


# --- PaliGemma's


def test_coordinates_are_paligemmas_ids(paligemma: TextTokenizer) -> None:
    assert paligemma.encode("<loc0000><loc1023><seg000><seg127>") == [256_000, 257_023, 257_024, 257_151]


def test_vocabulary_is_the_embeddings(paligemma: TextTokenizer) -> None:
    assert paligemma.vocab_size == 257_152


def test_no_text_leaves_the_embedding(paligemma: TextTokenizer) -> None:
    assert max(paligemma.encode("<image><eos> ab<image>")) < 256_000


def test_text_ids_are_transformers(tmp_path: Path) -> None:
    folder = save_gemma(tmp_path, coordinates=False)
    text = "ab: cab  12, z; é"
    expected = GemmaTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    assert TextTokenizer.load(folder).encode(text) == expected


def test_digits_that_are_tokens_of_their_own_are_no_state_bins(paligemma: TextTokenizer) -> None:
    assert paligemma.ordinal_ids() == [list(range(256_000, 257_024))]


def test_another_models_tokenizer_is_rejected(tmp_path: Path) -> None:
    folder = save_gemma(tmp_path, coordinates=False, text_size=262_144)  # Gemma 3's
    with pytest.raises(ValueError, match="not the tokenizer of a PaliGemma"):
        TextTokenizer.load(folder)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "is a Git LFS pointer"),
        ("tokenizer_config.json", '{"backend": ', "is not valid JSON"),
        ("tokenizer.json", '{"version": "1.0"}', r"is damaged \("),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: str, said: str) -> None:
    save_gemma(tmp_path, coordinates=False, text_size=400)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=f"{file} {said}"):
        TextTokenizer.load(tmp_path)


def test_an_absent_tokenizer_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="local folder"):
        TextTokenizer.load(tmp_path / "nothing")
