#!/usr/bin/env bash
# One worker of a TPU slice; tpu_pod.sh calls it over ssh on all of them. What it keeps is in the home folder: train.log (of all runs
# so far), train.pid, train.exit.
# usage: bash launch/tpu_worker.sh setup | start COMMAND | status | log | stop | idle
set -euo pipefail
cd "$(dirname "$0")/.."
log=../train.log pid=../train.pid code=../train.exit

running() { [ -f "$pid" ] && [ ! -f "$code" ] && kill -0 "$(cat "$pid")" 2>/dev/null; }

idle() {
    if running; then
        say "error: a run is going on (process $(cat "$pid")); stop it first" >&2
        exit 1
    fi
}

say() { echo "$(hostname): $*"; }

case $1 in
setup)
    # the Python of constraints.txt, whatever the image brings along
    export PATH="$HOME/.local/bin:$PATH" UV_PYTHON_PREFERENCE=only-managed
    command -v uv >/dev/null || curl --fail --silent --show-error --location https://astral.sh/uv/install.sh | sh
    uv python install --quiet 3.11
    PYTHON=$(uv python find 3.11)
    export PYTHON
    source launch/environment.sh tpu
    say "ready"
    ;;
start)
    idle
    source launch/environment.sh tpu
    rm -f "$pid" "$code"
    # a session of its own, which outlives the connection
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
status) # succeeds if there is nothing to resume
    if running; then
        say "running: $(tail -n 1 "$log")"
    elif [ ! -f "$code" ]; then
        say "not running"
        exit 1
    else
        say "ended with exit code $(cat "$code"): $(tail -n 1 "$log")"
        [ "$(cat "$code")" -eq 0 ]
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
