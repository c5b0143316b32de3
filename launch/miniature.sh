#!/usr/bin/env bash
# The paper's comparisons in miniature, on color emoji and two CPU cores; `--table NAME` for one of them, `--scale medium` for a
# GPU, `--help` for all. Ends with runs/miniature/SCALE/report/README.md. Interrupted, it continues where it stopped.
source "$(dirname "$0")/environment.sh" ""
exec python -m launch.miniature.miniature "$@"
