"""Images beside the parquet files: their paths in the column, as `datasets` writes them or as plain text."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pi05_lightning.data.errors import BadSample
from tests.data.recorded import LENGTHS, data_file, open_source

TOP = "observation.images.top"
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def move_out(root: Path, folder: Path, kind: pa.DataType, written: str = "{path}") -> list[np.ndarray]:
    """The images as files in a folder, their paths in the column instead; what they are."""
    source = open_source(root, cameras=None)
    images = [source[index].images["top"] for index in range(len(source))]
    table = pq.read_table(data_file(root))
    paths = []
    for number, stored in enumerate(table[TOP].to_pylist()):
        path = folder / f"frame-{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stored["bytes"])
        paths.append(written.format(path=path, name=path.name, in_root=path.relative_to(root)))
    values = [{"bytes": None, "path": path} for path in paths] if kind == STRUCT else paths
    values = (
        pa.array(values, pa.string()).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(values, kind)
    )
    pq.write_table(table.set_column(table.column_names.index(TOP), TOP, values), data_file(root))
    return images


@pytest.mark.parametrize("image_cache", [False, True])
@pytest.mark.parametrize(
    "kind",
    [STRUCT, pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=["datasets", "text", "large text", "text view", "categorical"],
)
def test_paths_begin_at_the_datasets_folder(pictures_copy: Path, kind: pa.DataType, image_cache: bool) -> None:
    expected = move_out(pictures_copy, pictures_copy / "images" / TOP, kind, "{in_root}")
    source = open_source(pictures_copy, cameras=None)
    for index in np.random.default_rng(0).permutation(len(source))[:20]:
        np.testing.assert_array_equal(source[int(index)].images["top"], expected[index])
    if image_cache:
        cached = open_source(pictures_copy, cameras=None, image_cache=True)
        cached.prepare()
        assert len(cached) == sum(LENGTHS)


@pytest.mark.parametrize(("folder", "written"), [("data/chunk-000", "{name}"), ("elsewhere", "{path}")])
def test_paths_may_begin_at_the_data_file_or_at_the_root(pictures_copy: Path, folder: str, written: str) -> None:
    expected = move_out(pictures_copy, pictures_copy / folder, STRUCT, written)
    np.testing.assert_array_equal(open_source(pictures_copy, cameras=None)[20].images["top"], expected[20])


def test_a_path_without_a_file_is_named(pictures_copy: Path) -> None:
    move_out(pictures_copy, pictures_copy / "images", STRUCT, "{in_root}")
    shutil.rmtree(pictures_copy / "images")
    with pytest.raises(BadSample, match=r"episode 1, frame 2, top: there is no .*images/frame-000014.png or .*"):
        open_source(pictures_copy, cameras=None)[14]


@pytest.mark.parametrize("kind", [STRUCT, pa.string()], ids=["datasets", "text"])
def test_an_image_that_changed_is_decoded_anew(pictures_copy: Path, kind: pa.DataType) -> None:
    def first(**options) -> np.ndarray:
        source = open_source(pictures_copy, cameras=None, image_cache=True, **options)
        source.prepare()
        return source[0].images["top"]

    move_out(pictures_copy, pictures_copy / "images", kind, "{in_root}")
    before = first()
    image = pictures_copy / "images/frame-000000.png"
    kept = image.read_bytes()
    Image.new("RGB", (64, 48), "red").save(image)
    assert first()[:, 16, 16].tolist() == [255, 0, 0]
    image.unlink()
    with pytest.raises(BadSample, match=r"there is no .*images/frame-000000.png or .*"):
        first()
    image.write_bytes(kept)
    np.testing.assert_array_equal(first(), before)
