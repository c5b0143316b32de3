"""Sources of labelled images.

A source is any object with `len(source)`, `source[i] -> {'image': uint8 [H, W, 3], 'label': int32}`, `source.name(i)`,
and the attributes `labels` (int32 `[N]`), `num_classes` and `image_size`. It must survive pickling, because worker
processes get a copy. `repae_jax.data.loader` turns a source into batches.
"""

import inspect
import os
import re

import numpy as np

from repae_jax.data.array_record import PreparedImages
from repae_jax.data.digits import DigitsSource
from repae_jax.data.folder import FolderSource
from repae_jax.data.imagenet import ImagenetSource
from repae_jax.data.imagenet_tar import ImagenetTarSource
from repae_jax.data.parquet import ParquetSource

_SOURCES = {
    "digits": DigitsSource,
    "folder": FolderSource,
    "imagenet": ImagenetSource,
    "imagenet_tar": ImagenetTarSource,
    "parquet": ParquetSource,
    "array_record": PreparedImages,
}


def given(options):
    """Those of config.data.options that are set: it names the arguments of all sources, and the others are None."""
    return {name: value for name, value in options.items() if value is not None}


def option_types():
    """Returns {option: type} of the options of all sources: bool where the default is one, otherwise str."""
    parameters = [parameter for source in _SOURCES.values() for parameter in inspect.signature(source).parameters.values()]
    types = {parameter.name: bool if isinstance(parameter.default, bool) else str for parameter in parameters}
    del types["image_size"]
    return types


def make_source(source, image_size, **fields):
    """Builds a source by name.

    Args:
      source: 'digits', 'folder', 'imagenet' (of TFDS), 'imagenet_tar' (the archives), 'parquet' (of Hugging Face) or
        'array_record' (prepared images).
      image_size: side of the images in pixels.
      **fields: the other arguments of that source, such as `split` or `path`; None is as if not given.

    Returns:
      The source.

    Raises:
      ValueError: if the name is unknown, a field is not an argument of the source, or a required one is missing.
    """
    if source not in _SOURCES:
        raise ValueError(f"source is {source!r}; allowed: {', '.join(map(repr, _SOURCES))}")
    fields = {name: os.path.expanduser(value) if isinstance(value, str) else value for name, value in given(fields).items()}
    parameters = dict(inspect.signature(_SOURCES[source]).parameters)
    del parameters["image_size"]
    unknown = sorted(set(fields) - set(parameters))
    if unknown:
        raise ValueError(f"source {source!r} has no argument {', '.join(unknown)}; allowed: {', '.join(parameters)}")
    missing = [name for name, p in parameters.items() if p.default is p.empty and fields.get(name, "") == ""]
    if missing:
        raise ValueError(
            f"source {source!r} needs the argument {', '.join(missing)}: set config.data.options.{missing[0]}, or where a "
            f"command takes a source, {source}:{missing[0]}=VALUE"
        )
    if source != "array_record":
        _check_local(source, fields)
    return _SOURCES[source](image_size=image_size, **fields)


def _check_local(source, fields):
    """ValueError if a file or folder is an address."""
    for name, value in fields.items():
        bucket = re.match(r"\w+://([^/]*)", str(value))
        if bucket:
            raise ValueError(
                f"source {source!r} reads from disks, not from {value}: mount the bucket (with Cloud Storage FUSE: `gcsfuse "
                f"--implicit-dirs {bucket[1]} FOLDER`) or copy what it holds (`gcloud storage cp -r {value} FOLDER`), and give "
                f"the folder as {name}. Prepared images are read from gs:// as they are: python -m repae_jax.prepare_images"
            )


def parse_source(text, labelled=True):
    """Source as commands take it: 'NAME:FIELD=VALUE,FIELD=VALUE', such as 'digits:split=test' or 'folder:path=/data/val'.

    Args:
      text: see above; or the path of a folder of images.
      labelled: whether classes matter; if not, a folder needs none.

    Returns:
      (name, fields) for `make_source`.

    Raises:
      ValueError: if the text is neither.
    """
    name, _, rest = text.partition(":")
    if name not in _SOURCES:
        _check_local("folder", {"path": text})
        if os.path.isdir(os.path.expanduser(text)):
            return "folder", {"path": text} | ({} if labelled else {"labelled": False})
        raise ValueError(
            f"{text!r} is no folder, and no source: allowed are {', '.join(map(repr, _SOURCES))}, with fields behind a colon, "
            "such as 'digits:split=test' or 'folder:path=/data/val'"
        )
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    if not all(sign and field for field, sign, _ in pairs):
        raise ValueError(f"{text!r}: allowed behind the colon is FIELD=VALUE,FIELD=VALUE")
    parameters = inspect.signature(_SOURCES[name]).parameters
    fields = {field: _typed(field, value, parameters) for field, _, value in pairs}
    if name == "folder" and not labelled and "labels_file" not in fields:
        fields.setdefault("labelled", False)
    return name, fields


def _typed(field, value, parameters):
    """The value of a field that is given as a text."""
    if field not in parameters or not isinstance(parameters[field].default, bool):
        return value
    if value not in ("True", "False"):
        raise ValueError(f"{field} is {value!r}; allowed: True or False")
    return value == "True"


def check_labels(source, num_classes):
    """Checks that a network with `num_classes` label embeddings can take every label, without decoding an image.

    Args:
      source: a source; its `labels` are int32 `[N]`.
      num_classes: number of classes the network was built for.

    Raises:
      ValueError: if a label lies outside 0..num_classes-1; a lookup there would silently read another class.
    """
    wrong = np.flatnonzero((source.labels < 0) | (source.labels >= num_classes))
    if len(wrong):
        first = ", ".join(f"{source.name(i)}: {source.labels[i]}" for i in wrong[:5])
        raise ValueError(
            f"{len(wrong)} of {len(source)} labels are out of range, first {first}; allowed: 0..{num_classes - 1}; "
            f"the source has {source.num_classes} classes, so set num_classes to that"
        )
