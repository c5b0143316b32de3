#!/usr/bin/env bash
# REPA-E from scratch on handwritten digits, on the CPU, in about ten minutes after installation.
# Ends with pictures and runs/quickstart/summary.json. Interrupted, it continues where it stopped.
source "$(dirname "$0")/environment.sh" ""
export JAX_PLATFORMS=cpu
exec python -m launch.quickstart.quickstart "$@"
