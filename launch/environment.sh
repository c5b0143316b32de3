# Sourced by the other scripts: a virtual environment in .venv with this package. PYTHON chooses the interpreter (3.11 or newer).
# usage: source launch/environment.sh [extra,extra]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/it" >&2; exit 1; }
    "${PYTHON:-python3}" -m venv .venv
fi
# Installs only if the requirements have changed since the last time.
stamp=".venv/installed-${1:-base}"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
    echo "installing into .venv …"
    requirements=(--quiet --constraint constraints.txt --editable ".${1:+[$1]}")
    if command -v uv >/dev/null; then # many times faster than pip
        links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}} # uv itself reads none of pip's settings
        uv pip install --python .venv/bin/python ${links:+--find-links "$links"} "${requirements[@]}"
    else
        .venv/bin/python -m pip install "${requirements[@]}"
    fi
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
export TF_CPP_MIN_LOG_LEVEL=3 # TensorFlow only writes TensorBoard files here
