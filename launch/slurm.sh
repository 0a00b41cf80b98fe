#!/usr/bin/env bash
# Trains on the GPUs of one or several nodes of a SLURM cluster, one process for each GPU.
#
#   launch/gpu_node.sh --install_only --venv=.venv-gpu       once, where there is a network
#   sbatch --nodes=2 launch/slurm.sh --gin_file=FILE ... [--gin.NAME=VALUE ...]
#
# from the project's folder, which all nodes must see, as they must MODEL_DIR. What stands below holds
# unless sbatch is told otherwise: --gpus-per-node and --ntasks-per-node must be the same number. No
# --gpus-per-task: each process must see all GPUs of its node, and jax.distributed gives it its own.
#
# Environment: VENV (.venv-gpu), PROGRAM (train, or another program that takes gin files).
#
# Three minutes before the time limit the programs get SIGTERM, save and end with status 75; the job is then
# queued again, and goes on from there. Where SLURM preempts it (--requeue) or it is cancelled, srun may kill
# the programs before they have saved: then it goes on from the last periodic checkpoint. A failure is tried
# again twice in the same job; a usage error (status 2) is final. A process that ends is noticed by the
# others, which end with a failure (docs/resume.md); srun is told to end none of them.
#
#SBATCH --job-name=tnt_jax
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tnt_jax-%j.log
set -euo pipefail

refuse() {
    local text=$*
    echo "slurm: error: ${text//[[:cntrl:]]/?}" >&2 # one line, whatever was given
    exit 2
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//;p;}' "$0"
    exit
fi
[[ -n ${SLURM_JOB_ID:-} ]] || refuse "expected a job of SLURM's: sbatch launch/slurm.sh ...; see --help"
(($#)) || refuse "--gin_file: expected the files of a run; see launch/slurm.sh --help"

cd "$SLURM_SUBMIT_DIR" # SLURM runs a copy of this file, elsewhere
[[ -e launch/restart_loop.sh ]] || refuse "$PWD is not the project's folder: submit from there"
program=${PROGRAM:-train}
[[ $program =~ ^[a-z0-9_]+$ ]] || refuse "PROGRAM: expected train, say, found $program"
python=${VENV:-.venv-gpu}/bin/python
[[ $python != -* ]] || python=./$python # no option of srun
[[ -x $python ]] || refuse "VENV: no $python: launch/gpu_node.sh --install_only --venv=${VENV:-.venv-gpu}"
tasks=${SLURM_NTASKS_PER_NODE:-1}
[[ ${SLURM_GPUS_ON_NODE:-$tasks} == "$tasks" ]] ||
    refuse "expected a process for each GPU, found --ntasks-per-node=$tasks and" \
        "$SLURM_GPUS_ON_NODE GPUs on a node"

if ((${SLURM_NTASKS:-1} > 1)); then
    export TNT_JAX_DISTRIBUTED=1
fi
# srun does not take this over from sbatch any more (SLURM 22.05): one core would be left to each process.
cpus=${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}
# A SIGTERM that reaches this shell is scancel, or a preemption after which SLURM itself queues the job
# again; the one before the time limit goes to the programs alone.
is_cancelled=
trap 'is_cancelled=yes' TERM
status=0
# srun would end the others with SIGTERM, and their 75 or 143, being the highest status, would be its own:
# the job would be queued again for an error that it meets again each time.
bash launch/restart_loop.sh --end_when_saved --max_failures=2 -- \
    srun --kill-on-bad-exit=0 --wait=0 ${cpus:+"$cpus"} "$python" -m "tnt_jax.$program" "$@" || status=$?
if ((status == 75)) && [[ -z $is_cancelled ]]; then
    echo "slurm: queued again; the run goes on from its last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
