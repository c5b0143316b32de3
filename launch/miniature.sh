#!/usr/bin/env bash
# The paper's comparisons in miniature, on handwritten digits and two CPU cores; `--table NAME` for one of them, `--help` for names.
# Ends with docs/miniature/RESULTS.md. Interrupted, it continues where it stopped.
source "$(dirname "$0")/environment.sh" ""
export JAX_PLATFORMS=cpu
exec python -m launch.miniature.miniature "$@"
