"""Byte ranges of the records of an ArrayRecord, for reading single records without ArrayRecord's reader.

The file consists of blocks of 64 KiB. Each begins with a header of 24 bytes, which may lie in the middle of a record. The
records of files that were written with OPTIONS are neither compressed nor grouped. Source: Riegeli's description of its file
format, https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md
"""

import zlib
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

OPTIONS = "group_size:1,uncompressed"  # ArrayRecord's writer puts one record into a chunk, for random access
PLACE = np.dtype([("first", "<i8"), ("end", "<i8"), ("crc32", "<u4")])  # bytes first..end-1 of the file hold the record
_BLOCK, _HEADER = 1 << 16, 24
_GAP = 512  # bytes, more than between the end of one record and the beginning of the next


def open_shard(file: str | Path) -> ArrayRecordReader:
    """Opens an ArrayRecord for random access."""
    return ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")


def find(file: str | Path) -> np.ndarray:
    """Returns the places of all records of an ArrayRecord, PLACE `[records]`; RuntimeError if a record is damaged."""
    reader = open_shard(file)
    places = np.zeros(reader.num_records(), PLACE)
    at = 0  # position in the file without its headers
    with Path(file).open("rb") as raw:
        for j in range(len(places)):
            (content,) = reader.read([j])
            first, end = _in_file(at), _in_file(at + _GAP + len(content))
            raw.seek(first)
            skipped = without_headers(raw.read(end - first), first).find(content)
            if skipped < 0:
                raise ValueError(f"{file} was written with other options than {OPTIONS!r}: its records do not stand in it")
            at += skipped
            places[j] = _in_file(at), _in_file(at + len(content) - 1) + 1, zlib.crc32(content)
            at += len(content)
    reader.close()
    return places


def without_headers(part: bytes, first: int) -> bytes:
    """Returns a part of a file, which begins at byte `first`, without the headers of blocks."""
    blocks = range(first // _BLOCK * _BLOCK, first + len(part), _BLOCK)
    return b"".join(part[max(0, at + _HEADER - first) : max(0, at + _BLOCK - first)] for at in blocks)


def _in_file(at):
    """Returns the position in the file of byte `at` of the file without its headers."""
    return at // (_BLOCK - _HEADER) * _BLOCK + _HEADER + at % (_BLOCK - _HEADER)
