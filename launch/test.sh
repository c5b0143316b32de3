#!/usr/bin/env bash
# Installs the `test` extra into .venv and runs the suite in two processes, because compiling takes one core each; a file stays in
# one of them, for its fixtures are dear. Arguments go to pytest: bash launch/test.sh -k sit
source "$(dirname "$0")/environment.sh" test
ruff check .
exec python -m pytest -n 2 --dist loadfile "$@"
