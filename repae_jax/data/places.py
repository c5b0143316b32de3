"""Where the records of an ArrayRecord lie in their file, for whoever reads a part of it without ArrayRecord's reader.

Such a file is of blocks of 64 KiB, each of which begins with a header of 24 bytes, right through the records. Those of files
that were written with OPTIONS stand in there as they are. Source: Riegeli's description of its file format,
https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md
"""

import zlib
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

OPTIONS = "group_size:1,uncompressed"  # of ArrayRecord's writer: one record a chunk, for random access
PLACE = np.dtype([("first", "<i8"), ("end", "<i8"), ("crc32", "<u4")])  # bytes first..end-1 of the file hold the record
_BLOCK, _HEADER = 1 << 16, 24
_BETWEEN = 512  # bytes, more than there are from one record to the next


def find(file):
    """Returns the places of all records of a file.

    Args:
      file: path of an ArrayRecord written with OPTIONS.

    Returns:
      PLACE [records].

    Raises:
      RuntimeError: if a record is damaged.
      ValueError: if the file was written otherwise.
    """
    reader = ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")
    found = np.zeros(reader.num_records(), PLACE)
    at = 0  # without headers
    with Path(file).open("rb") as raw:
        for j in range(len(found)):
            (content,) = reader.read([j])
            first, end = _in_file(at), _in_file(at + _BETWEEN + len(content))
            raw.seek(first)
            skipped = without_headers(raw.read(end - first), first).find(content)
            if skipped < 0:
                raise ValueError(f"{file} was written with other options than {OPTIONS!r}: its records do not stand in it")
            at += skipped
            found[j] = _in_file(at), _in_file(at + len(content) - 1) + 1, zlib.crc32(content)
            at += len(content)
    reader.close()
    return found


def without_headers(part, first):
    """Returns the part of a file that begins at byte `first`, without what is of the blocks."""
    blocks = range(first // _BLOCK * _BLOCK, first + len(part), _BLOCK)
    return b"".join(part[max(0, at + _HEADER - first) : max(0, at + _BLOCK - first)] for at in blocks)


def _in_file(at):
    """Returns where the byte is that is number `at` without the headers."""
    return at // (_BLOCK - _HEADER) * _BLOCK + _HEADER + at % (_BLOCK - _HEADER)
