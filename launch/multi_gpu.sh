#!/usr/bin/env bash
# Trains on the GPUs of this machine: in one process, which is simplest, or in one per GPU.
# usage: bash launch/multi_gpu.sh [--dry-run] [--processes N] FLAGS      FLAGS are those of python -m repae_jax.train
#
#   --processes N    one process for each of N GPUs. Process 0 writes here, process I to runs/multi_gpu/START-PORT/process-I.log
#
# CUDA_VISIBLE_DEVICES chooses GPUs. Ctrl-C and SIGTERM let the run save itself, a second one ends it at once. When a process dies,
# the others are ended after GRACE_SECONDS (30). PORT is that of process 0; a free one if not set. EXTRAS is what is installed:
# cuda,data,torch if not set. --dry-run prints the commands and runs none.
script=$0
# shellcheck source=launch/commands.sh
source "$(dirname "$0")/commands.sh"
options "$@"
processes=
if [ "${rest[0]:-}" = --processes ]; then
    processes=${rest[1]:-}
    [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--processes '$processes': expected their number"
    options "${rest[@]:2}"
fi
[ ${#rest[@]} -gt 0 ] || fail "flags of training are missing: bash $script --config configs/repae.py --workdir runs/repae"
cd "$(dirname "$0")/.."

listening() { (: <"/dev/tcp/localhost/$1") 2>/dev/null; }

call source launch/environment.sh "${EXTRAS:-cuda,data,torch}"
gpu_flags
if [ -z "$processes" ]; then
    call exec python -m repae_jax.train "${rest[@]}"
    exit
fi

port=${PORT:-}
if [ -z "$port" ]; then # another run may be on this machine
    while port=$((20000 + RANDOM % 10000)) && listening "$port"; do :; done
elif [ -z "$dry_run" ] && listening "$port"; then
    fail "PORT=$port is in use, perhaps by another run: leave it out, or choose another one"
fi
logs=runs/multi_gpu/$(date +%Y%m%d-%H%M%S)-$port grace=${GRACE_SECONDS:-30} pids=()
call mkdir -p "$logs"
stopping=
trap 'stopping=1 grace=600; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < processes; i++)); do
    train=(env "JAX_LOCAL_DEVICE_IDS=$i" python -m repae_jax.train --coordinator "localhost:$port"
        --num_processes "$processes" --process_id "$i" "${rest[@]}")
    log=$logs/process-$i.log
    if [ -n "$dry_run" ]; then
        echo "$(shown "${train[@]}")$([ "$i" -eq 0 ] || echo " >>$log 2>&1") &"
        continue
    elif [ "$i" -eq 0 ]; then
        "${train[@]}" &
    else
        "${train[@]}" >>"$log" 2>&1 &
    fi
    pids+=($!)
done
[ -z "$dry_run" ] || exit 0

while wait -n && code=0 || ! code=$?; do :; done # until one fails, a signal comes or none is left
if ((code > 128)) && [ -z "$stopping" ]; then
    dead=()
    for i in "${!pids[@]}"; do kill -0 "${pids[i]}" 2>/dev/null || dead+=("$i"); done
    echo "process ${dead[*]} was killed by signal $((code - 128)), perhaps for want of memory; the others are ended after $grace s." \
        "The same command continues from the newest checkpoint" >&2
fi
set -m # a process group of its own, so that it is killed together with its sleep
(sleep "$grace" && kill -KILL "${pids[@]}") >/dev/null 2>&1 &
killer=$! worst=0
set +m
trap 'kill -KILL -- "-$killer" "${pids[@]}" 2>/dev/null; exit 137' TERM INT
for i in "${!pids[@]}"; do
    wait "${pids[i]}" && continue || code=$?
    echo "process $i ended with exit code $code" >&2
    worst=$((code > worst ? code : worst))
done
kill -KILL -- "-$killer" 2>/dev/null || true
exit "$worst"
