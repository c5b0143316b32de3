"""Byte ranges of records in an ArrayRecord: read from there, they equal the records of ArrayRecord's reader."""

import zlib

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from repae_jax.data import places

BLOCK = 1 << 16


def write(file, contents, options="group_size:1,uncompressed"):
    writer = ArrayRecordWriter(str(file), options)
    for content in contents:
        writer.write(content)
    writer.close()
    return file


# around the size of a block; of several; tiny ones and none, among which one with the same bytes comes before
SIZES = [
    0, 1, 5, 5, 300, BLOCK - 64, BLOCK - 24, BLOCK, BLOCK + 1, 107_000, 0, 3 * BLOCK, 7,
    *range(BLOCK - 140, BLOCK - 60, 8),
]  # fmt: skip


def test_records_are_read_from_their_places(tmp_path):
    rng = np.random.default_rng(0)
    contents = [bytes(size) if size == 5 else rng.bytes(size) for size in SIZES]
    file = write(tmp_path / "a", contents).read_bytes()
    table = places.find(tmp_path / "a")
    assert table.dtype == places.PLACE and len(table) == len(contents)
    assert (table["first"][1:] >= table["end"][:-1])[table["end"][1:] > table["first"][1:]].all()
    for content, (first, end, checksum) in zip(contents, table.tolist()):
        assert places.without_headers(file[first:end], first) == content and zlib.crc32(content) == checksum
        assert end - first <= len(content) + 24 * (len(content) // BLOCK + 1)


def test_a_damaged_record(tmp_path):
    file = write(tmp_path / "a", [b"x" * 500, b"y" * 500])
    file.write_bytes(file.read_bytes().replace(b"yy", b"yz", 1))
    with pytest.raises(RuntimeError, match="[Cc]orrupt"):
        places.find(file)


def test_a_file_that_was_written_otherwise(tmp_path):
    with pytest.raises(ValueError, match="a was written with other options than .*uncompressed"):
        places.find(write(tmp_path / "a", [b"x" * 5000] * 3, "group_size:1,zstd"))
