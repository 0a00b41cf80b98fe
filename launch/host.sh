#!/usr/bin/env bash
# What launch/tpu_vm.sh does on each host of a TPU. You need not call it yourself.
#
#   host.sh install NAME CODE                  unpacks ~/tnt_jax-CODE.tar.gz and installs it, once
#   host.sh start NAME CODE PROGRAM HOSTS ...  starts `python -m tnt_jax.PROGRAM ...` under
#                                              restart_loop.sh, unless it runs or is done already
#   host.sh follow NAME LINES [restart]        prints the run's log until the run ends; status 0: done,
#                                              3: it ended otherwise. With "restart" also until the
#                                              program is started again; status 6
#   host.sh state NAME                         says in one line what the run is doing
#   host.sh result NAME                        the same, once it has ended, or after a minute; status as
#                                              of follow
#   host.sh conclude NAME                      the run is done on another host: kills what it does here,
#                                              and notes that it is done
#
# Everything is in ~/tnt_jax_launch/: code/CODE, with its virtual environment, and runs/NAME.
set -euo pipefail

base=$HOME/tnt_jax_launch
action=${1:?expected an action; see the head of this file}
name=${2:?expected the name of a run}
shift 2
run=$base/runs/$name
mkdir -p "$run"

# Whoever runs holds this lock, and nothing else says that it runs: a restart of the host ends both.
is_running() {
    ! flock --shared --nonblock "$run/running" true
}

state() {
    local found=nothing
    if [[ -e $run/state ]]; then
        found=$(<"$run/state")
    fi
    if is_running; then
        echo running
    elif [[ $found == running ]]; then
        echo "ended without a word: the host was restarted, or the run was killed"
    else
        echo "$found"
    fi
}

# 0: the run is done; 3: it ended otherwise.
judge() {
    [[ $(state) == "finished 0" ]] || exit 3
}

install() {
    local code=$1 tree=$base/code/$1
    exec 9>"$base/install"
    flock 9 # somebody else may be at it
    if [[ -e $tree/.installed ]]; then
        rm -f "$HOME/tnt_jax-$code.tar.gz"
        echo "$HOSTNAME: $code is installed"
        return
    fi
    rm -rf "$tree"
    mkdir -p "$tree"
    tar -xzf "$HOME/tnt_jax-$code.tar.gz" -C "$tree"
    export PATH=$base/bin:$PATH
    if ! command -v uv >/dev/null; then
        curl -LsSf https://astral.sh/uv/install.sh | env UV_UNMANAGED_INSTALL="$base/bin" sh
    fi
    # The image's own Python is too old.
    uv venv --quiet --python 3.12 "$tree/.venv"
    uv pip install --quiet --python "$tree/.venv/bin/python" --editable "${tree}[tpu,hub]"
    touch "$tree/.installed"
    rm -f "$HOME/tnt_jax-$code.tar.gz"
    echo "$HOSTNAME: $code was installed"
}

start() {
    local code=$1 program=$2 hosts=$3 tree=$base/code/$1 wanted
    shift 3
    wanted=$(printf '%q ' "$code" "$program" "$@")
    exec 9>"$run/starting"
    flock 9
    if is_running; then
        if [[ $wanted == "$(<"$run/command")" ]]; then
            touch "$run/asked"
            echo "$HOSTNAME: it runs already"
            return
        fi
        echo "$HOSTNAME: $name runs something else, $(<"$run/command")" >&2
        exit 4
    fi
    if [[ -e $run/command && $wanted == "$(<"$run/command")" && $(state) == "finished 0" ]]; then
        echo "$HOSTNAME: it is done already"
        return
    fi
    echo "$wanted" >"$run/command"
    # Beside it lie "state", of the restart loop; "asked", as old as the last look of ours at a start;
    # and "session", the session of all that runs.
    echo starting >"$run/state"
    if ((hosts > 1)); then
        export TNT_JAX_DISTRIBUTED=1
    fi
    export PYTHONUNBUFFERED=1
    cd "$tree"
    # A session of its own: it outlives the connection that started it.
    setsid nohup flock --timeout 10 --close "$run/running" \
        bash launch/restart_loop.sh --state_file="$run/state" -- \
        .venv/bin/python -m "tnt_jax.$program" "$@" \
        >>"$run/log.txt" 2>&1 </dev/null 9>&- &
    echo $! >"$run/session"
    for _ in {1..100}; do
        if [[ $(<"$run/state") != starting ]]; then
            touch "$run/asked"
            echo "$HOSTNAME: started"
            return
        fi
        sleep 0.1
    done
    echo "$HOSTNAME: it did not start; the last lines of its log:" >&2
    tail -n 5 "$run/log.txt" >&2
    exit 5
}

# Whether the program was started again since `start`, or since `follow` last said so.
was_restarted() {
    # The age first: a run that ends meanwhile has another state then.
    [[ $run/state -nt $run/asked && $(<"$run/state") == running ]]
}

follow() {
    local lines=$1 until=${2:-} reader
    touch "$run/log.txt"
    tail -n "$lines" -F "$run/log.txt" 2>/dev/null &
    reader=$!
    # Without a reader tail ends, and with it this.
    while is_running && kill -0 "$reader" 2>/dev/null; do
        if [[ $until == restart ]] && was_restarted; then
            touch "$run/asked"
            kill "$reader" 2>/dev/null || true
            exit 6
        fi
        sleep 1
    done
    sleep 0.5 # the last lines
    kill "$reader" 2>/dev/null || true
    judge
}

result() {
    for _ in {1..60}; do
        is_running || break
        sleep 1
    done
    echo "$HOSTNAME: $(state)"
    judge
}

conclude() {
    if is_running && [[ -e $run/session ]]; then
        pkill -KILL -s "$(<"$run/session")" || true
    fi
    echo "finished 0" >"$run/state"
    echo "$HOSTNAME: the run is done"
}

case $action in
    install | start | follow | result | conclude) "$action" "$@" ;;
    state) echo "$HOSTNAME: $(state)" ;;
    *)
        echo "host.sh: no action $action; see the head of the file" >&2
        exit 2
        ;;
esac
