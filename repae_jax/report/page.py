"""The page itself: one HTML file that holds its style, its script and all data, and fetches nothing."""

import base64
import hashlib
import html
import json
import string
from pathlib import Path
from typing import Any

from repae_jax.report.curves import fit_curves
from repae_jax.report.fid import mark_noise
from repae_jax.report.pictures import embed_pictures
from repae_jax.report.run_folder import KINDS, SERIES

MARKER = '<meta name="generator" content="repae_jax.report">'  # identifies our pages, which may be replaced
PAGE_BYTES = 9_800_000  # most bytes of the whole page


def make_page(runs: list[dict[str, Any]], now: float, heading: str = "") -> str:
    """Returns the page of runs, see `read_run`, in less than PAGE_BYTES bytes; `now` is in seconds since 1970.

    The heading is by default the run's name, or the number of runs that are compared. The runs' curves and pictures are
    replaced, and their evaluations compared, in place.
    """
    mark_noise(runs)
    data = {
        "written": now, "heading": heading, "titles": SERIES, "kinds": KINDS, "notes": fit_curves(runs),
        "differing": config_differences([run["config"] for run in runs]), "runs": runs,
    }  # fmt: skip
    title = " · ".join(run["name"] for run in runs)
    text = len(_fill(title, json.dumps(data, default=lambda picture: picture.alt)))
    if text > PAGE_BYTES - 1_000_000:
        raise ValueError(f"the texts and numbers of these runs take {text / 1e6:.1f} MB; report fewer runs on one page")
    data["notes"] += embed_pictures(runs, PAGE_BYTES - text - 300_000)  # the rest is for notes and problems
    return _fill(title, json.dumps(data, allow_nan=False, separators=(",", ":")))


def config_differences(configs: list[dict[str, Any] | None]) -> list[str]:
    """Returns the dotted names of the fields in which configs differ, in order; a config that is None takes no part."""
    known = [config for config in configs if config is not None]
    names = sorted({name for config in known for name in config})
    absent = object()
    return [name for name in names if any(config.get(name, absent) != known[0].get(name, absent) for config in known)]


def _fill(title: str, data: str) -> str:
    """Fills the template with title, style, script and data; a policy lets these alone act, and nothing be fetched."""
    folder = Path(__file__).parent
    style, script = ((folder / f"page.{ending}").read_text(encoding="utf-8") for ending in ("css", "js"))
    policy = f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    return string.Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        marker=MARKER, policy=policy, title=html.escape(title[:200]).encode("ascii", "xmlcharrefreplace").decode(),
        style=style, script=script, data=data.replace("<", "\\u003c"),
    )  # fmt: skip


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
