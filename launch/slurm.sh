#!/usr/bin/env bash
# Trains in a SLURM job, on one node or several, one process per GPU; ends with the run finished, however many jobs that takes.
# usage: sbatch [OPTIONS] launch/slurm.sh FLAGS       from the repository's folder; FLAGS are those of python -m repae_jax.train
#        bash launch/slurm.sh --dry-run FLAGS         print the commands and run none
#
# OPTIONS of sbatch go before those below: sbatch --nodes=4 --partition=gpu launch/slurm.sh --config … --workdir …
# --ntasks-per-node=1 --cpus-per-task=64 takes one process per node, for all its GPUs and that many cores. The repository and the
# workdir must be on a file system that all nodes see. If compute nodes have no network, install on the login node first:
# (source launch/environment.sh cuda,data,torch)
#
# Settings, from the environment:
#   EXTRAS        what is installed; cuda,data,torch if not set
#   MAX_STARTS    5 if not set: that many starts in a row without a new checkpoint end the job
#
# Two minutes before the time limit, and when preempted, the run is asked to save itself; then the job goes back into the queue.
# --signal=B:USR1@600 asks ten minutes before. What is not saved in time goes back, too, and what has ended because processes were
# killed: on a node that died, or for want of memory. An error of the program ends the job.

#SBATCH --job-name=repae
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit # SLURM runs a copy of this file from elsewhere
script=launch/slurm.sh
[ -f launch/commands.sh ] || {
    echo "error: $PWD is not the repository's folder; submit from there" >&2
    exit 1
}
source launch/commands.sh
options "$@"
if [ -n "$dry_run" ]; then
    shown sbatch "$script" "${rest[@]}"
    echo "# in the job:"
elif [ -z "${SLURM_JOB_ID:-}" ]; then
    fail "this is no SLURM job; submit it: sbatch $script FLAGS"
else
    need SLURM_GPUS_ON_NODE=8 SLURM_NTASKS_PER_NODE=8 SLURM_CPUS_PER_TASK=8
fi
[ ${#rest[@]} -gt 0 ] || fail "flags of training are missing: sbatch $script --config configs/repae.py --workdir runs/repae"
starts=${MAX_STARTS:-5} job=${SLURM_JOB_ID:-}
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # one of the IDs alone means the whole array
notes=runs/slurm/$job # the newest checkpoint, and how many starts have made no newer one
[[ $starts =~ ^[1-9][0-9]*$ ]] || fail "MAX_STARTS=$starts: expected a number of starts, 1 or more"

say() { echo "$(date '+%F %T') $*" >&2; }

# Asks the run to save itself, and keeps half a minute for requeueing if that takes too long.
# shellcheck disable=SC2317,SC2329 # called by the trap
stop_in_time() {
    local end
    scancel --signal=TERM "$job" || say "the run could not be asked to stop" # its processes, not this script
    end=$(squeue --noheader --job="$job" --format=%e) || end=2min
    say "the run is asked to stop, as the time limit is at $end"
    (sleep $(($(date --date="$end" +%s) - $(date +%s) - 30)) && kill -USR2 $$) 2>/dev/null &
    timer=$!
}
timer='' late=''
trap stop_in_time USR1
trap 'late=1' USR2
trap '[ -z "$timer" ] || kill "$timer" 2>/dev/null || true' EXIT

# Prints the step of the newest checkpoint, 0 if there is none; of two phases, the sum.
newest() {
    python - "${rest[@]}" <<'PYTHON'
import argparse

from etils import epath

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--workdir", "-workdir", type=epath.Path)
workdir = parser.parse_known_args()[0].workdir.expanduser()
folders = [workdir, workdir / "joint", workdir / "frozen"]  # the latter of a run of two phases
steps = [[int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()] for folder in folders]
print(sum(max(of_folder, default=0) for of_folder in steps))
PYTHON
}

# Requeues the job, unless too many starts in a row have made no new checkpoint.
again() {
    local step count=0 last=0
    say "$1"
    step=$(newest) || step=unknown
    [ ! -f "$notes" ] || read -r last count <"$notes"
    if [ "$step" = "$last" ]; then count=$((count + 1)); else count=0; fi
    if ((count >= starts)); then
        rm -f "$notes"
        fail "starts in a row without a new checkpoint: $count, the newest is that of step $step, so the job is not put back into the queue"
    fi
    mkdir -p "${notes%/*}"
    echo "$step $count" >"$notes"
    say "the job goes back into the queue, the newest checkpoint is that of step $step"
    scontrol requeue "$job" || fail "SLURM refuses that; submit the job again with the same flags, and the run continues"
    exit
}

# Variables left from a run by hand, or from the job that this one was submitted from, would be taken for this one's.
call unset JAX_COORDINATOR_ADDRESS JAX_LOCAL_DEVICE_IDS "${!SLURM_CPU_BIND@}"
call source launch/environment.sh "${EXTRAS:-cuda,data,torch}"
gpu_flags
gpus=${SLURM_GPUS_ON_NODE:-8} tasks=${SLURM_NTASKS_PER_NODE:-8}
if [ "$tasks" -ne "$gpus" ]; then
    [ "$tasks" -eq 1 ] || fail "$tasks processes for $gpus GPUs of a node: --ntasks-per-node must be 1 or $gpus"
    # Without it, JAX takes the first GPU only.
    call export JAX_LOCAL_DEVICE_IDS="$(seq --separator=, 0 $((gpus - 1)))"
fi
# JAX picks the GPU of a process among all of its node, so none may be hidden from it (as --gpus-per-task would); when a process
# has ended, the others have a minute. --export for jobs with --export=NONE, of which their processes would know nothing else
train=(srun --export=ALL --gpu-bind=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" --kill-on-bad-exit=0 --wait=60
    python -m repae_jax.train --distributed "${rest[@]}")
if [ -n "$dry_run" ]; then
    shown "${train[@]}"
    echo "# if that ends with exit code 75 (stopped on request) or one above 128 (killed):"
    echo "scontrol requeue \"\$SLURM_JOB_ID\""
    exit
fi

"${train[@]}" &
step=$!
while [ -z "$late" ] && kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a signal ends waiting, too
if [ -n "$late" ]; then
    again "the run has not ended half a minute before the time limit: ask it earlier, with sbatch --signal=B:USR1@600 $script …"
fi
wait "$step" && code=0 || code=$?
if [ "$code" -eq 75 ]; then
    again "the run was stopped before its end: on request, or because its processes did not find each other (exit code 75)"
elif [ "$code" -gt 128 ]; then
    again "a process was killed, perhaps on a node that died, or for want of memory (exit code $code)"
elif [ "$code" -ne 0 ]; then
    say "the run ended with an error, which would come again (exit code $code): the job is not put back into the queue"
fi
rm -f "$notes"
exit "$code"
