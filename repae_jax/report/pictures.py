"""Pictures of runs, thinned out and compressed so that a page can hold them."""

import base64
import dataclasses
import functools
import io
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from repae_jax.report.files import place_of, size_of, unreadable

PICTURE_BYTES = (90_000, 800_000)  # (guaranteed, maximum) base64 bytes per picture
SERIES_POINTS = 40  # most pictures of one series over training time
_LADDER = ((1600, 85), (1200, 80), (900, 75), (700, 65), (500, 50), (350, 40), (200, 30))  # longest side in pixels, quality


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture that has still to be read, and a description of it in words."""

    path: epath.Path
    alt: str


def encode_picture(path: epath.Path, limit: int) -> dict[str, Any] | None:
    """Returns a picture as a data address of at most `limit` characters, scaled down and compressed only if it must be.

    It is 'src'; 'width', 'height' of the file; 'reduced': longest side in pixels that was kept, 0 for the unchanged file, -1
    for the same pixels compressed. None if it does not fit. Damaged files raise the errors that `embed_pictures` catches.
    """
    raw = path.read_bytes()
    try:
        with Image.open(io.BytesIO(raw)) as image:
            file_format = image.format
            pixels = image.convert("RGB")
    except UnidentifiedImageError:  # Pillow's message speaks of the buffer
        raise OSError("it does not begin as a picture does") from None
    size = {"width": pixels.width, "height": pixels.height}
    if file_format == "PNG" and len(raw) * 4 / 3 + 30 <= limit:
        return {"src": _address("png", raw), **size, "reduced": 0}
    for side, quality in _LADDER:
        scale = min(1, side / max(pixels.size))
        if pixels.width * pixels.height * scale**2 > 10 * limit and (side, quality) != _LADDER[-1]:
            continue  # photographs take more than a tenth of a byte per pixel: it would not fit
        if scale < 1:
            pixels = pixels.resize(tuple(max(1, round(n * scale)) for n in pixels.size), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        pixels.save(file, "WEBP", quality=quality, method=2)
        source = _address("webp", file.getvalue())
        if len(source) <= limit:
            return {"src": source, **size, "reduced": max(pixels.size) if max(pixels.size) < max(size.values()) else -1}
    return None


def _address(file_format: str, raw: bytes) -> str:
    return f"data:image/{file_format};base64,{base64.b64encode(raw).decode()}"


def thin_series(runs: list[dict[str, Any]], budget: int) -> list[str]:
    """Drops time points, in place and evenly, until each has PICTURE_BYTES[0] of the budget of characters; returns notes."""
    notes = []
    singles = [holder for run in runs for holder in _single_pictures(run)]
    series = [(run, kind) for run in runs for kind in run["series"]]
    needed = functools.cache(lambda path: min(PICTURE_BYTES[0], size_of(path) * 4 // 3 + 30))

    def total(limit):
        chosen = [point for run, kind in series for point in _evenly(run["series"][kind], limit)]
        return sum(needed(holder["picture"].path) for holder in [*singles, *chosen])

    limit = next((limit for limit in range(SERIES_POINTS, 2, -1) if total(limit) <= budget), 2)
    while singles and total(limit) > budget:
        dropped = singles.pop()
        notes.append(f"{place_of(dropped['picture'].path)} is left out: too many pictures for one page.")
        dropped["picture"] = None
    for run, kind in series:
        before = run["series"][kind]
        run["series"][kind] = _evenly(before, limit)
        if len(before) > limit:
            notes.append(f"{run['name']}: {kind} of {limit} of {len(before)} steps are shown, evenly chosen.")
    return notes


def _evenly(items: list, limit: int) -> list:
    """Returns at most `limit` >= 2 of the items, the first and the last among them."""
    if len(items) <= limit:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


def embed_pictures(runs: list[dict[str, Any]], budget: int) -> list[str]:
    """Replaces every Picture, in place, by a dict with its data, all of them together within the budget of characters.

    Small files are kept unchanged; the rest of their share goes to the larger ones. A picture that cannot be read is dropped
    and becomes a problem of its run. Returns notes on the pictures thinned out and compressed.
    """
    notes = thin_series(runs, budget)
    places = [(run, holder) for run in runs for holder in _all_pictures(run)]
    places.sort(key=lambda place: size_of(place[1]["picture"].path))
    reduced = []
    for i, (run, holder) in enumerate(tqdm(places, desc="pictures", unit="", disable=None, leave=False)):
        picture, holder["picture"] = holder["picture"], None
        share = min(PICTURE_BYTES[1], budget // (len(places) - i))
        try:
            encoded = encode_picture(picture.path, share)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            run["problems"].append(unreadable(picture.path, error))
            continue
        if encoded is None:
            notes.append(f"{place_of(picture.path)} is left out: it does not fit into the page.")
            continue
        budget -= len(encoded["src"])
        side = encoded.pop("reduced")
        reduced += [side] if side else []
        holder["picture"] = {**encoded, "alt": picture.alt}
    for run in runs:
        run["series"] = {kind: _with_picture(series) for kind, series in run["series"].items()}
        run["generated"] = _with_picture(run["generated"])
        run["analysis"]["pictures"] = _with_picture(run["analysis"]["pictures"])
    if reduced:
        smallest = min((side for side in reduced if side > 0), default=None)
        change = "compressed" if smallest is None else f"compressed, some scaled down to {smallest} pixels"
        notes.append(f"{len(reduced)} of {len(places)} pictures are {change}; the files in the run's folder are untouched.")
    return notes


def _with_picture(holders: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [holder for holder in holders if holder["picture"]]


def _single_pictures(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the dicts whose 'picture' belongs to no series, the most telling first."""
    return _with_picture([*run["analysis"]["pictures"], *run["evaluations"], *reversed(run["generated"])])


def _all_pictures(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [*(point for series in run["series"].values() for point in series), *_single_pictures(run)]
