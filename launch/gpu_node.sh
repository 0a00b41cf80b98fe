#!/usr/bin/env bash
# Trains on the GPUs of this machine: installs, checks that JAX finds a GPU, and runs
# `python -m tnt_jax.train` under restart_loop.sh. One process drives all GPUs.
#
#   launch/gpu_node.sh [SETTINGS] --gin_file=FILE ... [--gin.NAME=VALUE ...]
#
# Settings:
#   --program=train     another program that takes gin files (convert and patch do not)
#   --venv=.venv-gpu    the virtual environment, made if need be
#   --install_only      only that: on a login node of a cluster, say, for launch/slurm.sh
#   --dry_run           prints every command, and runs none
#
# Ctrl-C or SIGTERM: the program saves and ends; the same command goes on from there.
# See first what an update takes: python -m tnt_jax.precompile --topology=local --gin_file=...
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
program=train
venv=.venv-gpu
install_only=
dry_run=
arguments=()

refuse() {
    local text=$*
    echo "gpu_node: error: ${text//[[:cntrl:]]/?}" >&2 # one line, whatever was given
    exit 2
}

for argument; do
    case $argument in
        --help | -h)
            sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"
            exit
            ;;
        --program=*) program=${argument#*=} ;;
        --venv=*) venv=${argument#*=} ;;
        --install_only | --install-only) install_only=yes ;;
        --dry_run | --dry-run) dry_run=yes ;;
        --gin*=*) arguments+=("$argument") ;;
        *) refuse "expected --NAME=VALUE, found $argument; see launch/gpu_node.sh --help" ;;
    esac
done
[[ -n $install_only ]] || ((${#arguments[@]})) ||
    refuse "--gin_file: expected the files of a run; see launch/gpu_node.sh --help"

[[ -n $venv ]] || refuse "--venv: expected a folder, found nothing"
[[ $venv != [-%]* ]] || venv=./$venv # no option of what gets it, and no job of the shell
[[ $program =~ ^[a-z0-9_]+$ ]] || refuse "--program: expected train, say, found $program"

run() {
    if [[ -n $dry_run ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

installed=$venv/.installed-gpu
if [[ ! -e $installed || $root/setup.py -nt $installed ]]; then
    python=$("$root/.ci/find_python" 3.12 3.11) ||
        refuse "tnt_jax needs Python 3.11 or 3.12, and none was found"
    # What Debian makes without its package for venv has a Python and no pip.
    if [[ ! -e $venv/bin/pip ]]; then
        run "$python" -m venv --clear "$venv" ||
            refuse "no virtual environment in $venv, see above (on Debian and Ubuntu, apt install python3-venv)"
    fi
    run "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "${root}[gpu,hub]"
    run touch "$installed"
fi
if [[ -n $install_only ]]; then
    exit
fi

# Without a GPU JAX would train on the processor, and nobody would notice for hours.
run "$venv/bin/python" -c 'import jax; assert jax.default_backend() == "gpu", jax.devices()' ||
    refuse "JAX finds no GPU here, see above: is the driver there (nvidia-smi)?"
run exec bash "$root/launch/restart_loop.sh" -- \
    "$venv/bin/python" -m "tnt_jax.$program" ${arguments[@]+"${arguments[@]}"}
