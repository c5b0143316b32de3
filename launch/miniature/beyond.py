"""Comparisons beyond the paper: settings and tables of what other work has found since, run by the same program.

A claim names what its source found; "published" are the source's numbers. A table may have settings of the paper as rows.
"""

from launch.miniature import tables

SETTINGS: dict[str, tables.Setting] = {}
TABLES: dict[str, tables.Table] = {}
