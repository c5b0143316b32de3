"""Where results differ from the published ones, and why, scale by scale: written after the runs, for the pages.

An entry names a fault that was mended, a property of the scale and the experiment that shows it, or says that it is unknown.
"""

FOUND: dict[str, dict[str, str]] = {"digits": {}, "small": {}}  # scale -> table -> text
