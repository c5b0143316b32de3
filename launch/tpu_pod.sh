#!/usr/bin/env bash
# Trains on a slice of a Cloud TPU pod: one command on all its workers, which find each other through the TPU's metadata.
# usage: bash launch/tpu_pod.sh [--dry-run] COMMAND
#
#   create [FLAGS]      ask for the slice and wait until it is there; FLAGS go to gcloud: --spot, --service-account=…
#   setup               copy the code at COMMIT to all workers and install it there
#   run FLAGS           python -m repae_jax.train --distributed FLAGS on all workers; goes on when this machine disconnects
#   logs [WORKER|all]   follow the log of a worker (0 if none is named), or show the last lines of each
#   status              show the slice, and the run on each worker
#   stop                let the run save itself and end
#   resume [--failed]   after a preemption: make the slice again, set it up, run what ran; nothing if all is well. A run that has
#                       finished, or ended with an error of its own, is left (exit code 3) unless --failed says to run it again
#   watch               resume every five minutes, on the machine that has the notes, until there is nothing left to do: the run has
#                       finished or failed, or somebody has used stop or delete
#   delete [--quiet]    give the slice back
#
# Settings, from the environment:
#   NAME PROJECT ZONE   where the slice is
#   ACCELERATOR_TYPE    e.g. v5litepod-64
#   RUNTIME_VERSION     e.g. v2-alpha-tpuv5-lite
#   COMMIT              what setup copies: any name git knows; HEAD if not set
#   EXTRAS              what setup installs; tpu,data,torch if not set
#   BUCKET              which setup mounts with Cloud Storage FUSE, to be read at /mnt/BUCKET; none if not set
#   POLL_SECONDS        time between two queries of the state of the slice; 30 if not set
#   WATCH_SECONDS       time between two queries of the run; 300 if not set
#   MAX_RESTARTS        how often watch restarts a run that died on a healthy slice; 20 if not set
#
# Flags of create and run, and the three settings of setup, are noted under runs/tpu_pod, where resume finds them. --workdir is an
# address that all workers reach: gs://bucket/run. Data are read from files, in /mnt/BUCKET or on a disk that all workers mount.
# --dry-run prints the commands and runs none.
script=$0
# shellcheck source=launch/commands.sh
source "$(dirname "$0")/commands.sh"
options "$@"
command=${rest[0]:-}
options "${rest[@]:1}"
cd "$(dirname "$0")/.."

there=repae/launch/tpu_worker.sh # from the home folder of a worker
worker="bash $there"

# on WORKER COMMAND: over ssh; COMMAND is one string, which the worker's shell reads.
on() {
    call gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker="$1" --command="$2"
}

note() {
    [ -z "$dry_run" ] || return 0
    mkdir -p "$notes"
    shown "${@:2}" >"$notes/$1.new"
    mv "$notes/$1.new" "$notes/$1"
}

forget() { [ -n "$dry_run" ] || rm -f "$notes/$1"; }

noted=()

# Sets $noted to the words that were noted.
recall() {
    [ -f "$notes/$1" ] || fail "resume needs what '$1' noted in $notes/$1, which does not exist: use '$1'"
    eval "noted=($(<"$notes/$1"))"
}

# Prints the state of the slice: the queue's until it is granted, then the node's; ABSENT if it was never requested.
state() {
    local found
    found=$("${queue_state[@]}") || return
    if [ "$found" = ACTIVE ]; then
        found=$("${node_state[@]}") || return
        found=${found:-GONE}
    fi
    echo "${found:-ABSENT}"
}

show_state() {
    shown "${queue_state[@]}"
    shown "${node_state[@]}"
}

# Waits while the slice is on its way somewhere; leaves where it arrived in $now.
settle() {
    local seconds=${POLL_SECONDS:-30}
    if [ -n "$dry_run" ]; then
        echo "# every $seconds s until the first prints ACTIVE and the second READY:"
        show_state
        return
    fi
    until now=$(state) && [[ ! $now =~ ING$|^WAITING|^ACCEPTED ]]; do
        echo "$(date +%T) $NAME is ${now:-out of reach}"
        sleep "$seconds"
    done
    echo "$(date +%T) $NAME is $now"
}

create() {
    need ACCELERATOR_TYPE=v5litepod-64 RUNTIME_VERSION=v2-alpha-tpuv5-lite
    call gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${where[@]}" \
        --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" "$@"
    note create "$@"
    forget making
    settle
    [ -n "$dry_run" ] || [ "$now" = READY ] || fail "the slice is $now; 'resume' or 'create' after 'delete' asks for it again"
}

setup() {
    local commit settings archive=$notes/code.tar.gz
    local replaced="touch repae.files && (cd repae && xargs -d '\n' rm -f -- <../repae.files)"
    replaced+=" && tar -tzf repae.tar.gz --quoting-style=literal | grep -v '/\$' >repae.files && tar -xzmf repae.tar.gz -C repae"
    commit=$(git rev-parse --verify "${COMMIT:-HEAD}^{commit}" 2>/dev/null) || fail "COMMIT=${COMMIT:-HEAD} is no commit of a git repository in $PWD"
    [[ ${BUCKET:-} =~ ^[a-z0-9._-]*$ ]] || fail "BUCKET=$BUCKET: expected its name alone, e.g. my-bucket"
    git diff --quiet HEAD || echo "note: changes that are not committed stay here; the workers get commit $commit" >&2
    settings=("${EXTRAS:-tpu,data,torch}" "${BUCKET:-}")
    call mkdir -p "$notes"
    call git archive --format=tar.gz --output="$archive" "$commit"
    call gcloud compute tpus tpu-vm scp "$archive" "$NAME:repae.tar.gz" "${where[@]}" --worker=all
    # only what the setup before has put there is removed: the rest is the user's, such as runs/. tar gives new times (-m), by
    # which the installation sees what has changed
    on all "{ [ ! -e $there ] || $worker idle; } && mkdir -p repae && $replaced && $worker setup $(shown "${settings[@]}")"
    note setup "$commit" "${settings[@]}"
}

run() {
    [ $# -gt 0 ] || fail "run needs flags of training: run --config configs/repae.py --workdir gs://bucket/run"
    on all "$worker start $(shown python -m repae_jax.train --distributed "$@")"
    note run "$@"
}

logs() {
    case ${1:-0} in
    all) on all "$worker log" ;;
    *[!0-9]*) fail "logs takes the number of a worker or 'all', not '$1'" ;;
    *) on "${1:-0}" "tail -n 100 -F train.log" ;;
    esac
}

status() {
    if [ -n "$dry_run" ]; then
        show_state
    else
        now=$(state)
        echo "$NAME is $now"
    fi
    if [ -n "$dry_run" ] || [ "$now" = READY ]; then ask; fi
}

ask() {
    on all "if [ -e $there ]; then $worker status; else echo \"\$(hostname): not running\"; fi"
}

# What has become of a run, from what its workers say: one that died takes others with it, which then end with an error.
verdict() {
    local found
    found=$(sed -nE 's/^[^ ]+: (running|not running|stopped|ended with exit code [0-9]+)(:.*)?$/\1/p' | sort -u)
    case $found in
    '') echo unknown ;;
    *stopped*) echo stopped ;;
    'ended with exit code 0') echo finished ;;
    *) if grep -qvxE 'running|ended with exit code [012]' <<<"$found"; then
        echo dead
    elif grep -qx running <<<"$found"; then
        echo running
    else
        echo failed
    fi ;;
    esac
}

# The note is for watch; starting a run removes it.
stop() {
    on all "[ ! -e $there ] || { touch train.stopped && $worker stop; }"
}

delete() {
    forget making
    call gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force "$@"
}

nothing_left() {
    echo "nothing to resume: $1"
    exit 3
}

# What dies on a slice that is well would do so for ever.
count_restart() {
    local before=0
    [ ! -f "$notes/restarts" ] || before=$(<"$notes/restarts")
    ((before < ${MAX_RESTARTS:-20})) ||
        nothing_left "it has died $((before + 1)) times on a slice that was well, see logs; 'resume' or 'watch' starts it once more"
    note restarts $((before + 1))
}

# shellcheck disable=SC2120 # $1 is the command line's
resume() {
    local flags said
    [ "${1:---failed}" = --failed ] || fail "resume takes --failed or nothing, not '$1'"
    recall setup
    COMMIT=${noted[0]} EXTRAS=${noted[1]} BUCKET=${noted[2]}
    recall create
    flags=("${noted[@]}")
    recall run
    if [ -n "$dry_run" ]; then now=SUSPENDED; else settle; fi
    case $now in
    READY)
        said=$(ask) || fail "not all workers could be asked, so nothing is done; try again"
        echo "$said"
        case $(verdict <<<"$said")${1:-} in
        running*) echo "nothing to resume" && return ;;
        finished*) nothing_left "it has finished" ;;
        failed)
            echo "it ended with an error, which would come again: see logs; after mending it, resume --failed, or run" >&2
            exit 3
            ;;
        stopped*) [ -z "${WATCHED:-}" ] || nothing_left "somebody has stopped the run; 'resume' continues it" ;;
        dead* | failed--failed)
            [ -z "${WATCHED:-}" ] || count_restart
            on all "[ ! -e $there ] || $worker stop"
            ;;
        *) fail "the workers' answers are not understood, so nothing is done" ;;
        esac
        ;;
    ABSENT)
        [ -z "${WATCHED:-}" ] || [ -e "$notes/making" ] || nothing_left "somebody has deleted the slice; 'resume' makes it again"
        create "${flags[@]}"
        ;;
    *) # a preempted slice cannot be started again, only made again
        delete --quiet
        note making # what comes to nothing here is not what somebody has deleted
        create "${flags[@]}"
        ;;
    esac
    setup
    run "${noted[@]}"
}

watch() {
    local code=0
    if [ -n "$dry_run" ]; then
        echo "# every ${WATCH_SECONDS:-300} s until it ends with exit code 3:"
        resume
        return
    fi
    [[ ${MAX_RESTARTS:-20} =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS=$MAX_RESTARTS: expected a whole number"
    forget restarts
    until now=$(state); do sleep "${WATCH_SECONDS:-300}"; done
    [ "$now" != ABSENT ] || note making
    while WATCHED=1 bash launch/tpu_pod.sh resume || code=$?; [ "$code" -ne 3 ]; do
        sleep "${WATCH_SECONDS:-300}"
        code=0
    done
}

case $command in
create | setup | run | logs | status | stop | resume | watch | delete) ;;
*) fail "'$command' is none of the commands create, setup, run, logs, status, stop, resume, watch or delete; see --help" ;;
esac
need NAME=repae PROJECT=my-project ZONE=us-west4-a
where=(--project="$PROJECT" --zone="$ZONE")
notes=runs/tpu_pod/$PROJECT/$ZONE/$NAME
queue_state=(gcloud compute tpus queued-resources list "${where[@]}" --filter="name~(^|/)$NAME\$" --format="value(state.state)")
node_state=(gcloud compute tpus tpu-vm list "${where[@]}" --filter="name~(^|/)$NAME\$" --format="value(state)")
"$command" "${rest[@]}"
