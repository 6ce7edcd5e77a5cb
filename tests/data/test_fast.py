"""FAST: tokens equal to the public processor's, exact round trips, and errors where it would stay silent."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy.fft import dct
from tokenizers import Tokenizer

from pi05_lightning.data.fast import FastDecodeError, FastTokenizer
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.heads.fast import FastHead

HORIZON, DIM, SCALE = 16, 5, 10


def make_chunks(count: int, horizon: int = HORIZON, dim: int = DIM, noise: float = 0.02, seed: int = 0) -> np.ndarray:
    """Smooth normalised motions with a little noise, f32[N T A]."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, np.pi, horizon)
    waves = np.stack([np.cos(k * time) / (1 + k) ** 1.5 for k in range(5)], axis=1)
    motions = np.einsum("tk,nka->nta", waves, rng.normal(size=(count, 5, dim)) / 2)
    return (motions + noise * rng.normal(size=motions.shape)).clip(-1.2, 1.2).astype(np.float32)


@pytest.fixture(scope="module")
def fast() -> FastTokenizer:
    return FastTokenizer.fit(make_chunks(400), vocab_size=512, scale=SCALE)


@pytest.fixture(scope="module")
def public_processor():
    """The public processor's class, as LeRobot carries it."""
    from lerobot.policies.molmoact2.molmoact2_hf_model.action_tokenizer import UniversalActionProcessor

    return UniversalActionProcessor


@pytest.fixture(scope="module", params=[(512, 0.02), (512, 0.3), (1024, 0.02)], ids=["smooth", "noisy", "large"])
def public_folder(request: pytest.FixtureRequest, public_processor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the public processor fitted and wrote."""
    vocab_size, noise = request.param
    chunks = make_chunks(400, noise=noise)
    folder = tmp_path_factory.mktemp("public")
    fitted = public_processor.fit(list(chunks), SCALE, vocab_size, time_horizon=HORIZON, action_dim=DIM)
    fitted.save_pretrained(folder)
    return folder


def public_load(processor, folder: Path):
    return processor.from_pretrained_local(str(folder))


# --- against the public processor


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
def test_tokens_are_the_public_processors(public_processor, public_folder: Path, noise: float) -> None:
    chunks = make_chunks(600, noise=noise, seed=1)
    ours, theirs = FastTokenizer.load(public_folder), public_load(public_processor, public_folder)
    coverable = ~ours.quantize(chunks)[1].any((1, 2))
    assert coverable.sum() > 100
    assert ours.encode(chunks[coverable]) == theirs(chunks[coverable])


def test_decoding_is_the_public_processors(public_processor, public_folder: Path) -> None:
    ours, theirs = FastTokenizer.load(public_folder), public_load(public_processor, public_folder)
    tokens = ours.encode(make_chunks(50, seed=1))
    expected = theirs.decode(tokens, time_horizon=HORIZON, action_dim=DIM)
    np.testing.assert_allclose(ours.decode_batch(tokens)[0], expected, atol=1e-6)


def test_public_processor_reads_our_folder_and_gives_our_tokens(
    public_processor, fast: FastTokenizer, tmp_path: Path
) -> None:
    fast.save(tmp_path)
    theirs, chunks = public_load(public_processor, tmp_path), make_chunks(50, seed=2)
    chunks = chunks[~fast.quantize(chunks)[1].any((1, 2))]
    tokens = fast.encode(chunks)
    assert theirs(chunks) == tokens
    np.testing.assert_allclose(theirs.decode(tokens), fast.decode_batch(tokens)[0], atol=1e-6)


def test_code_in_a_folder_is_not_run(fast: FastTokenizer, tmp_path: Path) -> None:
    fast.save(tmp_path)
    (tmp_path / "processing_action_tokenizer.py").write_text("raise SystemExit('was run')")
    assert FastTokenizer.load(tmp_path).vocab_size == fast.vocab_size


def test_our_fit_needs_fewer_tokens_than_the_public_one(public_processor) -> None:
    chunks = make_chunks(400)
    theirs = public_processor.fit(list(chunks), SCALE, 512)(chunks)
    ours = FastTokenizer.fit(chunks, 512, SCALE).encode(chunks)
    assert sum(map(len, ours)) < sum(map(len, theirs))


# --- encoding


@pytest.mark.parametrize(("horizon", "dim", "noise"), [(1, 1, 0.1), (8, 4, 0.02), (50, 14, 0.01), (50, 14, 0.2)])
def test_batched_encoding_is_that_of_the_tokenizers_library(horizon: int, dim: int, noise: float) -> None:
    chunks = make_chunks(700, horizon, dim, noise)
    fast = FastTokenizer.fit(chunks[:300], vocab_size=512, scale=SCALE)
    characters = (fast.quantize(chunks)[0] - fast.min_token).reshape(len(chunks), -1)
    texts = ["".join(map(chr, row)) for row in characters]
    assert fast.encode(chunks) == [encoding.ids for encoding in fast.bpe.encode_batch(texts)]


def test_low_frequencies_of_all_dims_come_first(fast: FastTokenizer) -> None:
    chunk = make_chunks(1, seed=3)
    expected = np.around(SCALE * dct(chunk[0], axis=0, norm="ortho"))
    text = "".join(fast.bpe.id_to_token(token) for token in fast.encode(chunk)[0])
    assert [ord(character) + fast.min_token for character in text] == expected.ravel().tolist()


def test_values_beyond_the_fitted_range_are_clipped_counted_and_logged(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    fast = FastTokenizer.fit(make_chunks(100), vocab_size=512, scale=SCALE)
    wild = make_chunks(3)
    wild[1, :, 0] = 30.0
    with caplog.at_level(logging.WARNING):
        tokens = fast.encode(wild)
    assert fast.clipped == 1  # the mean of that one dimension
    assert "1 of 240 FAST coefficients" in caplog.text
    decoded = fast.decode(tokens[1])
    np.testing.assert_allclose(decoded[:, 1:], fast.reconstruct(make_chunks(3))[1, :, 1:], atol=1e-6)
    assert 0 < decoded[:, 0].mean() < 30


def test_coefficients_that_a_public_vocabulary_cannot_spell_are_not_lost(public_folder: Path) -> None:
    fast = FastTokenizer.load(public_folder)
    wild = make_chunks(20) * 20
    _, ok = fast.decode_batch(fast.encode(wild))
    assert ok.all()
    assert fast.clipped > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_rejected(fast: FastTokenizer, bad: float) -> None:
    chunks = make_chunks(2)
    chunks[1, 3, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        fast.encode(chunks)


def test_a_chunk_without_a_batch_axis_is_rejected(fast: FastTokenizer) -> None:
    with pytest.raises(ValueError, match=r"\[N T A\]"):
        fast.encode(make_chunks(1)[0])


# --- decoding


def test_round_trip_is_within_half_a_step_per_coefficient(fast: FastTokenizer) -> None:
    chunks = make_chunks(50)
    decoded, ok = fast.decode_batch(fast.encode(chunks))
    assert ok.all()
    error = dct(decoded - chunks, axis=1, norm="ortho")
    assert np.abs(error).max() <= 0.5 / SCALE + 1e-5


def test_reconstruct_is_decoding_what_was_encoded(fast: FastTokenizer) -> None:
    chunks = make_chunks(20, seed=4)
    np.testing.assert_array_equal(fast.reconstruct(chunks), fast.decode_batch(fast.encode(chunks))[0])


@pytest.mark.parametrize("damage", ["short", "long", "empty", "unknown", "negative"])
def test_a_sequence_that_is_no_chunk_raises(fast: FastTokenizer, damage: str) -> None:
    tokens = fast.encode(make_chunks(1))[0]
    damaged = {
        "short": tokens[:-1],
        "long": [*tokens, tokens[0]],
        "empty": [],
        "unknown": [*tokens[:-1], fast.bpe.get_vocab_size()],
        "negative": [*tokens[:-1], -1],
    }[damage]
    with pytest.raises(FastDecodeError):
        fast.decode(damaged)


def test_tokens_that_break_a_character_apart_raise(public_processor) -> None:
    chunks = make_chunks(300)
    chunks[0, :, 0] = 8  # one far value shifts the others beyond the 128 characters that are one byte
    chunks[1, :, 0] = -8
    fitted = public_processor.fit(list(chunks), SCALE, 1024)
    fast = FastTokenizer(
        Tokenizer.from_str(fitted.bpe_tokenizer.backend_tokenizer.to_str()), SCALE, fitted.min_token, 1024, HORIZON, DIM
    )
    assert (fast.lengths == 0).any()
    parts_of_characters = np.flatnonzero(fast.lengths == 0)[:1].repeat(HORIZON * DIM)
    with pytest.raises(FastDecodeError, match="break a character"):
        fast.decode(parts_of_characters.tolist())


def test_failed_rows_of_a_batch_are_nan_and_told(fast: FastTokenizer) -> None:
    tokens = fast.encode(make_chunks(3))
    actions, ok = fast.decode_batch([tokens[0], tokens[1][:-1], tokens[2]])
    assert ok.tolist() == [True, False, True]
    assert np.isnan(actions[1]).all()
    assert np.isfinite(actions[[0, 2]]).all()


def test_lengths_add_up_to_the_coefficients_of_a_chunk(fast: FastTokenizer) -> None:
    assert {int(fast.lengths[tokens].sum()) for tokens in fast.encode(make_chunks(50))} == {HORIZON * DIM}


def test_any_tokens_whose_lengths_add_up_decode(public_folder: Path) -> None:
    fast = FastTokenizer.load(public_folder)
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens, left = [], HORIZON * DIM
        while left:
            tokens.append(rng.choice(np.flatnonzero((fast.lengths > 0) & (fast.lengths <= left))))
            left -= fast.lengths[tokens[-1]]
        assert fast.decode(tokens).shape == (HORIZON, DIM)


# --- ids in the language model's vocabulary


def test_ids_stay_below_the_location_tokens() -> None:
    assert FastHead(ModelConfig().shapes).ids == range(254_976, 256_000)  # <loc0000> is 256000


def test_skip_128_gives_openpis_ids() -> None:
    assert ModelConfig(fast_skip_tokens=128).shapes.fast_top == 257_023


# --- fitting and storing


def test_datasets_of_different_sizes_share_a_tokenizer() -> None:
    parts = [make_chunks(100, 16, 5), make_chunks(100, 10, 7)]
    fast = FastTokenizer.fit(parts, vocab_size=512)
    assert (fast.horizon, fast.dim) == (None, None)
    arms = FastTokenizer.fit([make_chunks(100, 16, 5), make_chunks(100, 16, 7)], vocab_size=512)
    assert (arms.horizon, arms.dim) == (16, None)
    assert "16" in arms.misfit(8, 7)
    for part in parts:
        decoded, ok = fast.decode_batch(fast.encode(part), *part.shape[1:])
        assert ok.all()
        np.testing.assert_array_equal(decoded, fast.reconstruct(part))


def test_fitting_is_deterministic() -> None:
    first, second = (FastTokenizer.fit(make_chunks(100), vocab_size=300).to_dict() for _ in range(2))
    assert first == second


def test_more_values_than_there_are_characters_for_are_refused() -> None:
    chunks = make_chunks(100)
    assert FastTokenizer.fit(chunks, vocab_size=8192, scale=100).encode(chunks)
    with pytest.raises(ValueError, match="or the 2048 that any has characters for"):
        FastTokenizer.fit(40 * chunks, vocab_size=8192, scale=100)


def test_a_fit_prepares_for_actions_that_go_a_little_further() -> None:
    fast = FastTokenizer.fit(make_chunks(100), vocab_size=512)
    largest = np.abs(dct(make_chunks(100), axis=1, norm="ortho")).max()
    chunk = np.zeros((1, HORIZON, DIM), dtype=np.float32)
    chunk[0, :, 0] = -1.2 * largest / np.sqrt(HORIZON)
    fast.encode(chunk)
    assert fast.clipped == 0


def test_without_merges_every_coefficient_is_a_token(tmp_path: Path) -> None:
    chunks = make_chunks(100)
    FastTokenizer.fit(chunks, vocab_size=512, merge=False).save(tmp_path)
    fast = FastTokenizer.load(tmp_path)
    tokens = fast.encode(chunks)
    assert {len(row) for row in tokens} == {HORIZON * DIM}
    assert fast.vocab_size == len(fast.lengths) < 512
    np.testing.assert_array_equal(fast.decode(tokens[0]), fast.reconstruct(chunks)[0])


def test_a_range_that_does_not_fit_the_vocabulary_is_an_error() -> None:
    chunks = make_chunks(50)
    chunks[7, 3, 1] = 1e4
    with pytest.raises(ValueError, match="far outside its quantiles"):
        FastTokenizer.fit(chunks, vocab_size=512)


def test_less_coverage_leaves_out_rare_large_values() -> None:
    chunks = make_chunks(200)
    chunks[7, 3, 1] = 1e4
    fast = FastTokenizer.fit(chunks, vocab_size=512, coverage=0.995)
    assert fast.bpe.get_vocab_size() <= 512
    assert 0.99 < 1 - fast.quantize(chunks)[1].mean() < 1


@pytest.mark.parametrize("way", ["folder", "dict", "pickle"])
def test_storing_keeps_tokens_and_sizes(fast: FastTokenizer, way: str, tmp_path: Path) -> None:
    if way == "folder":
        fast.save(tmp_path)
        back = FastTokenizer.load(tmp_path)
    elif way == "dict":
        back = FastTokenizer.from_dict(json.loads(json.dumps(fast.to_dict())))
    else:
        back = pickle.loads(pickle.dumps(fast))
    chunks = make_chunks(20, seed=5)
    assert back.encode(chunks) == fast.encode(chunks)
    assert (back.scale, back.vocab_size, back.horizon, back.dim) == (SCALE, 512, HORIZON, DIM)


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer.json"])
def test_an_incomplete_folder_names_the_missing_file(fast: FastTokenizer, file: str, tmp_path: Path) -> None:
    fast.save(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=f"no {file}"):
        FastTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "is a Git LFS pointer"),
        ('{"version": ', "is not valid JSON"),
        ('{"version": "1.0"}', "is damaged"),
    ],
)
def test_a_damaged_file_is_named(fast: FastTokenizer, tmp_path: Path, content: str, said: str) -> None:
    fast.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.json {said}"):
        FastTokenizer.load(tmp_path)


def test_a_config_without_min_token_is_an_error(fast: FastTokenizer, tmp_path: Path) -> None:
    fast.save(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    del config["min_token"]
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="min_token"):
        FastTokenizer.load(tmp_path)
