#!/usr/bin/env bash
# Runs on every worker of a TPU slice, called by tpu_pod.sh over ssh. In the home folder it keeps train.log (all runs so far),
# train.pid, train.exit, and train.stopped if the run was stopped on request.
# usage: bash launch/tpu_worker.sh setup EXTRAS [BUCKET] | start COMMAND | status | log | stop | idle
set -euo pipefail
cd "$(dirname "$0")/.."
log=../train.log pid=../train.pid code=../train.exit stopped=../train.stopped

running() { [ -f "$pid" ] && [ ! -f "$code" ] && kill -0 "$(cat "$pid")" 2>/dev/null; }

idle() {
    if running; then
        say "error: a run is going on (process $(cat "$pid")); stop it first" >&2
        exit 1
    fi
}

say() { echo "$(hostname): $*"; }

# Makes a bucket readable in /mnt/BUCKET.
mount_bucket() {
    local folder=/mnt/$1 version=2.7.0 releases=https://github.com/GoogleCloudPlatform/gcsfuse/releases/download
    mountpoint --quiet "$folder" && return
    if ! command -v gcsfuse >/dev/null; then
        curl --fail --silent --show-error --location --output gcsfuse.deb "$releases/v$version/gcsfuse_${version}_amd64.deb"
        # A new machine installs its own updates at first; `update` has no option to wait for that.
        for _ in {1..60}; do
            ! sudo apt-get -qq update || break
            sleep 10
        done
        sudo apt-get -qq -o DPkg::Lock::Timeout=600 install ./gcsfuse.deb
    fi
    sudo install --directory --owner="$(id --user)" "$folder"
    gcsfuse --implicit-dirs -o ro "$1" "$folder"
}

case $1 in
setup)
    # The Python of constraints-newest.txt, whatever the image contains.
    export PATH="$HOME/.local/bin:$PATH" UV_PYTHON_PREFERENCE=only-managed
    command -v uv >/dev/null || curl --fail --silent --show-error --location https://astral.sh/uv/install.sh | sh
    uv python install --quiet 3.13
    PYTHON=$(uv python find 3.13)
    export PYTHON
    source launch/environment.sh "$2"
    [ -z "${3:-}" ] || mount_bucket "$3"
    say "ready"
    ;;
start)
    idle
    [ -x .venv/bin/python ] || {
        say "error: nothing is installed here: setup first" >&2
        exit 1
    }
    export PATH="$PWD/.venv/bin:$PATH" TF_CPP_MIN_LOG_LEVEL=3
    # Variables left from another run would override the TPU's metadata.
    unset JAX_COORDINATOR_ADDRESS "${!MEGASCALE_@}"
    export JAX_COORDINATOR_PORT=8476 # JAX's default, 8482, is closed by the firewalls of TPUs
    rm -f "$pid" "$code" "$stopped"
    # In a session of its own, which outlives the connection.
    nohup setsid bash launch/tpu_worker.sh supervise "${@:2}" >>"$log" 2>&1 </dev/null &
    until [ -f "$pid" ]; do sleep 0.1; done
    say "started"
    ;;
supervise)
    "${@:2}" &
    echo $! >"$pid"
    wait $! && ended=0 || ended=$?
    echo "$ended" >"$code"
    ;;
status) # tpu_pod.sh reads what stands before the second colon
    if running; then
        say "running: $(tail -n 1 "$log")"
    elif [ -f "$stopped" ] && ! grep -qsx '[012]' "$code"; then # unless it had ended before
        say "stopped: $(tail -n 1 "$log")"
    elif [ ! -f "$code" ]; then
        say "not running"
    else
        say "ended with exit code $(cat "$code"): $(tail -n 1 "$log")"
    fi
    ;;
log) tail -n 5 "$log" | sed "s/^/$(hostname): /" ;;
stop)
    if running; then
        kill -TERM "$(cat "$pid")"
        for ((second = 0; second < 300; second++)); do
            running || break
            sleep 1
        done
        if running; then
            say "error: still running after five minutes; last line: $(tail -n 1 "$log")" >&2
            exit 1
        fi
    fi
    say "stopped"
    ;;
idle) idle ;;
*)
    echo "error: no command '$1'" >&2
    exit 1
    ;;
esac
