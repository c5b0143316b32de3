# Sourced by the other scripts: a virtual environment with this package. PYTHON chooses its interpreter (3.11, 3.12 or 3.13), VENV
# its folder (.venv).
# usage: source launch/environment.sh [extra,extra]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
        { echo "error: ${PYTHON:-python3} is not Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/one" >&2; exit 1; }
    "${PYTHON:-python3}" -m venv "$venv"
fi
# jax 0.10 is the last with wheels for Python 3.11. Where a package of the file has none, installing it ends with an error.
constraints="constraints-newest.txt"
[ ! -d "$venv/lib/python3.11" ] || constraints="constraints.txt"
# Installs only if the requirements have changed since the last time.
stamp="$venv/installed-${1:-base}"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ "$constraints" -nt "$stamp" ]; then
    echo "installing into $venv …"
    requirements=(--quiet --constraint "$constraints" --editable ".${1:+[$1]}")
    if command -v uv >/dev/null; then # many times faster than pip, but it reads its own settings only: pip's are passed on
        [ -n "${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-}}" ] || [ -z "${PIP_INDEX_URL:-}" ] ||
            requirements+=(--default-index "$PIP_INDEX_URL")
        links=()
        [ -n "${UV_FIND_LINKS:-}" ] || read -ra links <<<"${PIP_FIND_LINKS:-}"
        for link in "${links[@]}"; do requirements+=(--find-links "$link"); done
        uv pip install --python "$venv/bin/python" "${requirements[@]}"
    else
        "$venv/bin/python" -m pip install "${requirements[@]}"
    fi
    touch "$stamp"
fi
bin=$(cd "$venv/bin" && pwd)
export PATH="$bin:$PATH"
export TF_CPP_MIN_LOG_LEVEL=3 # TensorFlow only reads and writes buckets here
