# Sourced by the other scripts: a virtual environment in .venv with this package. PYTHON chooses the interpreter (3.11 or newer).
# usage: source launch/environment.sh [extra,extra]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:+[$1]}

if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/it" >&2; exit 1; }
    "${PYTHON:-python3}" -m venv .venv
fi
# installs once per change of the requirements
stamp=".venv/installed-${1:-base}"
if [ ! -f "$stamp" ] || [ setup.py -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
    echo "installing into .venv …"
    .venv/bin/python -m pip install --quiet --upgrade pip
    .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".$extra"
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
export TF_CPP_MIN_LOG_LEVEL=3 # TensorFlow is here for TensorBoard's files only
