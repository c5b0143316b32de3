#!/usr/bin/env bash
# Lint, types, and the tests of the tiers unit and integration, in two processes. Arguments go to pytest:
#   bash launch/test.sh -m "not integration and not slow"    the unit tier alone
#   bash launch/test.sh -k sit
#   VENV=.venv-newest PYTHON=python3.13 bash launch/test.sh   with the newest versions
# A test file stays in one process, because its fixtures are expensive to make; tests/conftest.py orders the files.
source "$(dirname "$0")/environment.sh" test
ruff check .
python -m mypy
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
