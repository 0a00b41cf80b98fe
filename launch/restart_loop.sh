#!/usr/bin/env bash
# Runs a command until it is done, for every launcher in this folder.
#
#   launch/restart_loop.sh [--max_failures=5] [--pause=10] [--state_file=FILE] [--end_when_saved] \
#     -- COMMAND ...
#
# What the command's exit status means (tnt_jax/runtime/program.py):
#   0          done
#   2          a setting or a file is wrong: trying again would not help
#   75         stopped by SIGTERM, and saved: started again
#   143        stopped by SIGTERM before it could answer: as 75; with --end_when_saved a failure
#   130        interrupted by somebody: final
#   any other  a failure: started again after a pause, which doubles, --max_failures times in a row; a
#              run that lived for half an hour ends the row
#
# SIGTERM or Ctrl-C, to this script, goes on to the command as SIGTERM, and its end is waited for: nothing
# is started again. The exit status is the command's last one. --state_file says "running", then
# "finished STATUS". With --end_when_saved, 75 is final, for a scheduler that starts the job again. 143 is
# not: nothing was saved, and a scheduler that starts such a job again might do so for ever.
set -u

max_failures=5
pause=10
state_file=
end_when_saved=
while (($#)); do
    case $1 in
        --max_failures=*) max_failures=${1#*=} ;;
        --pause=*) pause=${1#*=} ;;
        --state_file=*) state_file=${1#*=} ;;
        --end_when_saved) end_when_saved=yes ;;
        --help | -h)
            sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"
            exit
            ;;
        --)
            shift
            break
            ;;
        --*) # a misspelt setting is no command
            echo "restart_loop.sh: no setting ${1//[[:cntrl:]]/?}; see --help" >&2
            exit 2
            ;;
        *) break ;;
    esac
    shift
done
if ((!$#)) || ! [[ $max_failures =~ ^[0-9]{1,9}$ && $pause =~ ^[0-9]{1,9}$ ]]; then
    echo "restart_loop.sh: expected [--max_failures=N] [--pause=SECONDS] -- COMMAND ...; see --help" >&2
    exit 2
fi

max_failures=$((10#$max_failures)) # "08" is no number of base 8
pause=$((10#$pause))

say() {
    echo "restart_loop: $(date -u +%Y-%m-%dT%H:%M:%SZ) $*"
}

note() {
    if [[ -n $state_file ]]; then
        echo "$*" >"$state_file.new" && mv -- "$state_file.new" "$state_file"
    fi
}

child=
stopping=
signalled=
stop() {
    stopping=yes
    signalled=yes
    if [[ -n $child ]]; then
        kill -TERM "$child" 2>/dev/null
    fi
}
trap stop TERM INT
trap '' HUP # whoever started this may log out

# Waits for the child: a signal ends `wait` early, not the child.
await() {
    while :; do
        signalled=
        wait "$child"
        code=$?
        [[ -n $signalled ]] || break
    done
    child=
}

finish() {
    note "finished $1"
    exit "$1"
}

failures=0
while :; do
    note running # each time: host.sh sees by the file's age that the command was started again
    began=$SECONDS
    "$@" &
    child=$!
    if [[ -n $stopping ]]; then # while there was no child to tell
        kill -TERM "$child" 2>/dev/null
    fi
    await
    lived=$((SECONDS - began))
    if [[ -n $stopping ]]; then
        say "stopped on request; the command ended with status $code"
        finish "$code"
    fi
    meaning=$code
    if ((code == 143)) && [[ -z $end_when_saved ]]; then
        meaning=75
    fi
    case $meaning in
        0) finish 0 ;;
        2 | 130)
            say "the command ended with status $code, which is final"
            finish "$code"
            ;;
        75)
            if [[ -n $end_when_saved ]]; then
                say "the command was stopped and has saved"
                finish 75
            fi
            failures=0
            say "the command was stopped and has saved: it starts again"
            wait_for=$((pause < 5 ? pause : 5))
            ;;
        *)
            ((lived < 1800)) || failures=0
            failures=$((failures + 1))
            if ((failures > max_failures)); then
                say "the command failed with status $code, $failures times in a row: giving up"
                finish "$code"
            fi
            wait_for=300
            if ((failures < 10 && pause << (failures - 1) < 300)); then
                wait_for=$((pause << (failures - 1)))
            fi
            say "the command failed with status $code after $lived s; again in $wait_for s" \
                "($failures of $max_failures)"
            ;;
    esac
    sleep "$wait_for" &
    child=$!
    if [[ -n $stopping ]]; then # as above
        kill -TERM "$child" 2>/dev/null
    fi
    await
    if [[ -n $stopping ]]; then
        say "stopped on request, between two starts"
        finish 75
    fi
done
