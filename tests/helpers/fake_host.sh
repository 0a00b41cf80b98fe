#!/bin/sh
# `uv` on the hosts of tests/helpers/fake_gcloud.py: a virtual environment's python is a program that notes how it
# was started, and ends as $WORLD/program.GENERATION, $WORLD/program.HOSTNAME or $WORLD/program says: with
# the next exit status in it, or not ("hold").
set -eu
case "$1 $2" in
    "venv --quiet")
        for venv; do :; done # the last argument
        mkdir -p "$venv/bin"
        cat >"$venv/bin/python" <<'PROGRAM'
#!/usr/bin/env bash
echo "$PWD|${TNT_JAX_DISTRIBUTED-}|$*" >>"$HOME/ran"
printf '%s\0' "$@" >"$HOME/arguments"
echo "update $(wc -l <"$HOME/ran") of $HOSTNAME"
file=$WORLD/program.$GENERATION
[[ -e $file ]] || file=$WORLD/program.$HOSTNAME
[[ -e $file ]] || file=$WORLD/program
mapfile -t statuses <"$file"
number=$(($(wc -l <"$HOME/ran") - 1))
status=${statuses[number < ${#statuses[@]} ? number : ${#statuses[@]} - 1]}
if [[ $status == hold ]]; then
    trap 'exit 75' TERM
    while [[ ! -e $WORLD/release ]]; do sleep 0.1; done
    exit 0
fi
exit "$status"
PROGRAM
        chmod +x "$venv/bin/python"
        ;;
    "pip install") echo "$*" >>"$HOME/installed" ;;
    *)
        echo "uv: unexpected: $*" >&2
        exit 2
        ;;
esac
