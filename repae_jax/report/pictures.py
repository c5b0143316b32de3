"""Pictures of runs, made so small that a page can hold them."""

import base64
import dataclasses
import io

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from repae_jax.report.files import place_of, size_of, unreadable

PICTURE_BYTES = (90_000, 800_000)  # of one picture as base64: what it may count on, and what it never exceeds
SERIES_POINTS = 40  # pictures of one series over training time
# longest side in pixels, WebP quality
_LADDER = ((1600, 85), (1200, 80), (900, 75), (700, 65), (500, 50), (350, 40), (200, 30))


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture that has still to be read.

    Attributes:
      path: its file.
      alt: what it shows, in words.
    """

    path: epath.Path
    alt: str


def encode_picture(path, limit):
    """A picture as a data address, as it is if it is small, else scaled down and compressed until it fits.

    Args:
      path: any file that PIL reads.
      limit: length of the address.

    Returns:
      dict: src; width, height as they were; reduced: longest side in pixels that was kept, 0 for the file as it is, -1 for the
      same pixels compressed. None if it does not fit.

    Raises:
      OSError, ValueError, SyntaxError, Image.DecompressionBombError: if the file is no picture, or not a whole one.
    """
    raw = path.read_bytes()
    try:
        with Image.open(io.BytesIO(raw)) as image:
            kind = image.format
            pixels = image.convert("RGB")
    except UnidentifiedImageError:  # whose message speaks of the buffer
        raise OSError("it does not begin as a picture does") from None
    size = {"width": pixels.width, "height": pixels.height}
    if kind == "PNG" and len(raw) * 4 / 3 + 30 <= limit:
        return {"src": _address("png", raw), **size, "reduced": 0}
    for side, quality in _LADDER:
        scale = min(1, side / max(pixels.size))
        if pixels.width * pixels.height * scale**2 > 10 * limit and (side, quality) != _LADDER[-1]:
            continue  # photographs take more than a tenth of a byte per pixel, so it would be in vain
        if scale < 1:
            pixels = pixels.resize(tuple(max(1, round(n * scale)) for n in pixels.size), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        pixels.save(file, "WEBP", quality=quality, method=2)
        source = _address("webp", file.getvalue())
        if len(source) <= limit:
            return {"src": source, **size, "reduced": max(pixels.size) if max(pixels.size) < max(size.values()) else -1}
    return None


def _address(kind, raw):
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def thin_series(runs, budget):
    """Drops time points, in place and evenly, until every picture left can count on PICTURE_BYTES[0] of the budget.

    Args:
      runs: of `read_run`.
      budget: characters for all pictures.

    Returns:
      list of notes on what was dropped.
    """
    notes = []
    singles = [holder for run in runs for holder in _single_pictures(run)]
    series = [(run, kind) for run in runs for kind in run["series"]]
    need = {id(holder): _need(holder["picture"]) for run in runs for holder in _all_pictures(run)}

    def total(limit):
        chosen = [one for run, kind in series for one in _evenly(run["series"][kind], limit)]
        return sum(need[id(one)] for one in [*singles, *chosen])

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


def _evenly(items, limit):
    """At most `limit` >= 2 of the items, the first and the last among them."""
    if len(items) <= limit:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


def embed_pictures(runs, budget):
    """Replaces every Picture, in place, by a dict with its data, all of them together within the budget.

    Small files are kept as they are; what they leave of their share goes to the larger ones. A picture that cannot be read
    becomes None and a problem of its run.

    Args:
      runs: of `read_run`.
      budget: characters.

    Returns:
      list of notes on what was thinned out and compressed.
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
        run["series"] = {kind: [one for one in series if one["picture"]] for kind, series in run["series"].items()}
        run["generated"] = [one for one in run["generated"] if one["picture"]]
        run["analysis"]["pictures"] = [one for one in run["analysis"]["pictures"] if one["picture"]]
    if reduced:
        smallest = min((side for side in reduced if side > 0), default=None)
        how = "compressed" if smallest is None else f"compressed, some scaled down to {smallest} pixels"
        notes.append(f"{len(reduced)} of {len(places)} pictures are {how}; the files in the run's folder are untouched.")
    return notes


def _single_pictures(run):
    """Dicts whose 'picture' stands alone, the most telling first."""
    holders = [*run["analysis"]["pictures"], *run["evaluations"], *reversed(run["generated"])]
    return [holder for holder in holders if holder["picture"]]


def _all_pictures(run):
    """All dicts with a Picture."""
    return [*(one for series in run["series"].values() for one in series), *_single_pictures(run)]


def _need(picture):
    """Characters that a picture can do with."""
    return min(PICTURE_BYTES[0], size_of(picture.path) * 4 // 3 + 30)
