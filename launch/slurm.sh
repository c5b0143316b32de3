#!/usr/bin/env bash
# Trains in a SLURM job, on one node or several, one process per GPU; ends with the run finished, however many jobs that takes.
# usage: sbatch [OPTIONS] launch/slurm.sh FLAGS       from the repository's folder; FLAGS are those of python -m repae_jax.train
#        bash launch/slurm.sh --dry-run FLAGS         print the commands and run none
#
# OPTIONS of sbatch go before those below: sbatch --nodes=4 --partition=gpu launch/slurm.sh --config … --workdir …
# --ntasks-per-node=1 --cpus-per-task=64 takes one process per node, for all its GPUs and that many cores. The repository and the
# workdir must be on a file system that all nodes see. If compute nodes have no network, install on the login node first:
# (source launch/environment.sh cuda,data,torch)
# EXTRAS, from the environment, is what is installed; these if not set.
#
# Two minutes before the time limit, and when preempted, the run is asked to save itself; then the job goes back into the queue.

#SBATCH --job-name=repae
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
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

call source launch/environment.sh "${EXTRAS:-cuda,data,torch}"
gpus=${SLURM_GPUS_ON_NODE:-8} tasks=${SLURM_NTASKS_PER_NODE:-8}
if [ "$tasks" -ne "$gpus" ]; then
    [ "$tasks" -eq 1 ] || fail "$tasks processes for $gpus GPUs of a node: --ntasks-per-node must be 1 or $gpus"
    # without it, JAX takes the first GPU only
    call export JAX_LOCAL_DEVICE_IDS="$(seq --separator=, 0 $((gpus - 1)))"
fi
# JAX picks the GPU of a process among all of its node, so none may be hidden from it (as --gpus-per-task would); when a process
# has ended, the others have a minute
call srun --gpu-bind=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" --kill-on-bad-exit=0 --wait=60 \
    python -m repae_jax.train --distributed "${rest[@]}" && code=0 || code=$?
if [ -n "$dry_run" ]; then
    echo "# if that ends with exit code 75 (saved on request, not finished):"
    echo "scontrol requeue \"\$SLURM_JOB_ID\""
elif [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
else
    exit "$code"
fi
