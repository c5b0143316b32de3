"""Sources of labeled images.

A source is any object with `len(source)`, `source[i] -> {'image': uint8 [H, W, 3], 'label': int32}`, `source.name(i)`,
and the attributes `labels` (int32 `[N]`), `num_classes` and `image_size`. It must survive pickling, because worker
processes get a copy. `repae_jax.data.loader` turns a source into batches.

The arguments of a source's constructor, other than `image_size`, are its options: `config.data.options`, and the fields of
`--data SOURCE:FIELD=VALUE`. A new source is a file and an entry of SOURCES.
"""

import hashlib
import inspect
import os
import re

from repae_jax.data import array_record, digits, folder, imagenet, imagenet_tar, parquet
from repae_jax.data.source import check_label_range
from repae_jax.ranges import Extent, as_extent

SOURCES = {
    "digits": digits.DigitsSource,
    "folder": folder.FolderSource,
    "imagenet": imagenet.ImagenetSource,
    "imagenet_tar": imagenet_tar.ImagenetTarSource,
    "parquet": parquet.ParquetSource,
    "array_record": array_record.PreparedImages,
}
# annotation of an option -> (function of a command line's text, allowed values); other options are texts
_PARSED = {
    bool: ({"True": True, "False": False}.__getitem__, "True or False"),
    int: (int, "whole numbers"),
    float: (float, "numbers"),
}


def options_of(source: str) -> dict[str, inspect.Parameter]:
    """Returns the options of a source in SOURCES by name, with annotations and defaults; ValueError for another one."""
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}; allowed: {', '.join(map(repr, SOURCES))}")
    parameters = dict(inspect.signature(SOURCES[source]).parameters)
    del parameters["image_size"]
    return parameters


def option_types() -> dict[str, type]:
    """Returns the type of each option of all sources, for configs: bool, int, float or str."""
    options = {name: option for source in SOURCES for name, option in options_of(source).items()}
    return {name: option.annotation if option.annotation in _PARSED else str for name, option in options.items()}


def given(options: dict) -> dict:
    """Returns the options that are set: a config has those of all sources, and the others are None."""
    return {name: value for name, value in options.items() if value is not None}


def make_source(source: str, image_size: Extent, **fields):
    """Returns a new source, a key of SOURCES, with its options, such as `split` or `path`; None counts as not given.

    Its images have `image_size` pixels, a square's side or (height, width).

    Raises ValueError for an unknown name or option, a missing option, or a value that the source refuses.
    """
    options = options_of(source)
    fields = {name: os.path.expanduser(value) if isinstance(value, str) else value for name, value in given(fields).items()}
    if unknown := sorted(set(fields) - set(options)):
        raise ValueError(f"source {source!r} has no argument {', '.join(unknown)}; allowed: {', '.join(options)}")
    if missing := [name for name, option in options.items() if option.default is option.empty and fields.get(name, "") == ""]:
        advice = f"set config.data.options.{missing[0]}, or where a command takes a source, {source}:{missing[0]}=VALUE"
        raise ValueError(f"source {source!r} needs the argument {', '.join(missing)}: {advice}")
    _check_local(source, fields)
    return SOURCES[source](image_size=as_extent(image_size), **fields)


def _check_local(source, fields):
    """Raises ValueError if an option is an address such as gs://bucket/train, unless the source `reads_addresses`."""
    if getattr(SOURCES[source], "reads_addresses", False):
        return
    for name, value in fields.items():
        if bucket := re.match(r"\w+://([^/]*)", str(value)):
            raise ValueError(
                f"source {source!r} reads from disks, not from {value}: mount the bucket (with Cloud Storage FUSE: `gcsfuse "
                f"--implicit-dirs {bucket[1]} FOLDER`) or copy what it holds (`gcloud storage cp -r {value} FOLDER`), and give "
                f"the folder as {name}. Prepared images are read from gs:// as they are: python -m repae_jax.prepare_images"
            )


def parse_source(text: str, labelled: bool = True) -> tuple[str, dict]:
    """Returns the (name, fields) for `make_source` of a command's `--data`; ValueError for a text that is none.

    Args:
      text: 'NAME:FIELD=VALUE,FIELD=VALUE', such as 'digits:split=test', or the path of a folder of images.
      labelled: whether classes matter; if not, sources with the option `labelled` need none.
    """
    name, _, rest = text.partition(":")
    if name not in SOURCES:
        _check_local("folder", {"path": text})
        if not os.path.isdir(os.path.expanduser(text)):
            fields = "with fields behind a colon, such as 'digits:split=test' or 'folder:path=/data/val'"
            raise ValueError(f"{text!r} is no folder, and no source: allowed are {', '.join(map(repr, SOURCES))}, {fields}")
        name, fields = "folder", {"path": text}
    else:
        pairs = [pair.partition("=") for pair in rest.split(",") if pair]
        if not all(sign and field for field, sign, _ in pairs):
            raise ValueError(f"{text!r}: allowed behind the colon is FIELD=VALUE,FIELD=VALUE")
        fields = {field: _typed(field, value, options_of(name)) for field, _, value in pairs}
    if not labelled and "labelled" in options_of(name) and "labels_file" not in fields:
        fields.setdefault("labelled", False)
    return name, fields


def _typed(field, text, options):
    """Converts a command line's text to the type of an option; an unknown option is left to `make_source`."""
    parse, allowed = _PARSED.get(options[field].annotation if field in options else str, (str, ""))
    try:
        return parse(text)
    except (ValueError, KeyError):
        raise ValueError(f"{field} is {text!r}; allowed: {allowed}") from None


def check_labels(source, num_classes: int) -> None:
    """Raises ValueError if a label lies outside 0..num_classes-1, where a lookup would silently read another class."""
    advice = f"; the source has {source.num_classes} classes, so set num_classes to that"
    check_label_range(source.labels, source.name, num_classes - 1, advice, shown=5)


def records_hash(source) -> str:
    """Returns a hash of the names and labels of a source's records, in order, which identifies the source.

    Nothing is decoded. Sources made from another one (prepared images, cached latents) have that one's hash as an attribute.
    """
    if hasattr(source, "records_hash"):
        return source.records_hash
    digest = hashlib.sha256()
    for i, label in enumerate(source.labels.tolist()):
        digest.update(f"{source.name(i)}\0{label}\n".encode())
    return digest.hexdigest()[:16]
