#!/usr/bin/env bash
# Trains on a TPU VM, or on a slice of several hosts, with one command.
#
#   launch/tpu_vm.sh up [SETTINGS] [--gin.NAME=VALUE ...]
#       creates the TPU (a queued resource), installs this commit on every host, starts
#       `python -m tnt_jax.train` under a restart loop, and prints its log until it is done. A TPU that is
#       preempted is created again, and the run goes on from its last checkpoint. Given again, it takes
#       up what is there: interrupt it (Ctrl-C) and the run goes on without it.
#   launch/tpu_vm.sh logs      prints the log, and what is added to it
#   launch/tpu_vm.sh status    says what there is, and what each host is doing
#   launch/tpu_vm.sh down      deletes what `up` created here, and nothing else
#
# Settings, as flags or in the environment:
#   --name=NAME                TPU_NAME           of the TPU and of the run
#   --project=PROJECT          PROJECT
#   --zone=ZONE                ZONE
#   --accelerator_type=TYPE    ACCELERATOR_TYPE   v5litepod-8, v5p-8, v6e-8, ...   (for `up`)
#   --bucket=BUCKET[/FOLDER]   BUCKET             MODEL_DIR is gs://BUCKET/NAME    (for `up`)
#   --gin_file=FILE            GIN_FILE           repeatable: your own, or one of this project's; own
#                                                 files are copied, what they include is not
#
#   --provisioning=on-demand   PROVISIONING       or spot, or reserved
#   --runtime_version=VERSION  RUNTIME_VERSION    of the TPU's software; known for v2 to v6e
#   --commit=COMMIT                               of the code; the last one, which must have all changes
#   --program=train                               another program that takes gin files (convert and
#                                                 patch do not); set where it writes to
#   --create_flag=FLAG                            further flags of gcloud, repeatable: of
#   --ssh_flag=FLAG                               `queued-resources create`, of `tpu-vm ssh` and `scp`
#   --lines=100, --worker=0                       of `logs`: how far back, and which host's
#   --poll_seconds=30                             between two looks at what is not ready yet
#   --down_when_done                              `up` deletes the TPU when the run is done
#   --dry_run                                     prints every call of gcloud, and makes none
#
# First see whether the model fits, which costs nothing (docs/launch.md):
#   python -m tnt_jax.precompile --topology=v5e:2x4 --gin_file=...
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
here=launch/tpu_vm.sh

say() {
    echo "tpu_vm: $*"
}

refuse() {
    fail 2 "$*"
}

give_up() {
    fail 1 "$*"
}

fail() {
    echo "tpu_vm: error: ${2//[[:cntrl:]]/?}" >&2 # one line, whatever was given
    exit "$1"
}

# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------

help() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$root/$here"
}

name=${TPU_NAME:-}
project=${PROJECT:-}
zone=${ZONE:-}
accelerator_type=${ACCELERATOR_TYPE:-}
bucket=${BUCKET:-}
gin_files=()
provisioning=${PROVISIONING:-on-demand}
runtime_version=${RUNTIME_VERSION:-}
commit=
program=train
create_flags=()
ssh_flags=()
lines=100
worker=0
poll_seconds=30
down_when_done=
dry_run=
arguments=() # for the program

if ((!$#)); then
    refuse "expected up, logs, status or down; see $here --help"
fi
action=$1
shift
case $action in
    --help | -h | help)
        help
        exit
        ;;
    up | logs | status | down) ;;
    *) refuse "expected up, logs, status or down, found $action; see $here --help" ;;
esac
while (($#)); do
    argument=$1
    shift
    case $argument in
        --help | -h)
            help
            exit
            ;;
        --gin.*=* | --gin_search_paths=*)
            arguments+=("$argument")
            continue
            ;;
        --dry_run | --dry-run)
            dry_run=yes
            continue
            ;;
        --down_when_done | --down-when-done)
            down_when_done=yes
            continue
            ;;
        --*=*)
            flag=${argument%%=*}
            value=${argument#*=}
            ;;
        --*)
            (($#)) || refuse "$argument: expected $argument=VALUE"
            flag=$argument
            value=$1
            shift
            ;;
        *) refuse "expected --NAME=VALUE, found $argument; see $here --help" ;;
    esac
    flag=${flag#--}
    case ${flag//-/_} in
        name) name=$value ;;
        project) project=$value ;;
        zone) zone=$value ;;
        accelerator_type) accelerator_type=$value ;;
        bucket) bucket=$value ;;
        gin_file) gin_files+=("$value") ;;
        provisioning) provisioning=$value ;;
        runtime_version) runtime_version=$value ;;
        commit) commit=$value ;;
        program) program=$value ;;
        create_flag) create_flags+=("$value") ;;
        ssh_flag) ssh_flags+=("$value") ;;
        lines) lines=$value ;;
        worker) worker=$value ;;
        poll_seconds) poll_seconds=$value ;;
        *) refuse "no setting --$flag; see $here --help" ;;
    esac
done
if ((!${#gin_files[@]})) && [[ -n ${GIN_FILE:-} ]]; then
    gin_files=("$GIN_FILE")
fi
bucket=${bucket#gs://}
bucket=${bucket%/}

missing=()
[[ -n $name ]] || missing+=("--name (or TPU_NAME)")
[[ -n $project ]] || missing+=("--project (or PROJECT)")
[[ -n $zone ]] || missing+=("--zone (or ZONE)")
if [[ $action == up ]]; then
    [[ -n $accelerator_type ]] || missing+=("--accelerator_type (or ACCELERATOR_TYPE)")
    [[ -n $bucket ]] || missing+=("--bucket (or BUCKET)")
    ((${#gin_files[@]})) || missing+=("--gin_file")
fi
if ((${#missing[@]})); then
    list=$(printf '%s, ' "${missing[@]}")
    refuse "$action needs ${list%, }; see $here --help"
fi
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ && ${#name} -le 61 ]] ||
    refuse "--name: expected small letters, digits and hyphens, a letter first, found $name"
# They are part of a file's name here, and of what is printed to be pasted into a shell.
[[ $project =~ ^[a-z0-9][a-z0-9.:-]*$ ]] ||
    refuse "--project: expected small letters, digits, hyphens, dots and colons, found $project"
[[ $zone =~ ^[a-z0-9][a-z0-9-]*$ ]] ||
    refuse "--zone: expected small letters, digits and hyphens, found $zone"
[[ $bucket =~ ^([a-z0-9][a-z0-9._-]*(/[A-Za-z0-9._=/-]*)?)?$ ]] ||
    refuse "--bucket: expected small letters, digits, hyphens, dots and underscores, found $bucket"
[[ $poll_seconds =~ ^[0-9]+$ ]] || refuse "--poll_seconds: expected a number, found $poll_seconds"
[[ $worker =~ ^[0-9]+$ ]] || refuse "--worker: expected a number, found $worker"
[[ $lines =~ ^\+?[0-9]+$ ]] || refuse "--lines: expected a number, found $lines"
[[ $program =~ ^[a-z0-9_]+$ ]] || refuse "--program: expected train, say, found $program"
[[ -n $dry_run ]] || command -v gcloud >/dev/null ||
    refuse "gcloud is not installed: https://cloud.google.com/sdk/docs/install (--dry_run needs none)"

# --------------------------------------------------------------------------------------------------
# gcloud
# --------------------------------------------------------------------------------------------------

exec 3>&1 # the terminal, where a function's output is read by another

in_zone=("--project=$project" "--zone=$zone" --quiet)
# A host that is gone must not be waited for.
ssh_options=(--ssh-flag="-o ConnectTimeout=30" --ssh-flag="-o ServerAliveInterval=30")
scp_options=(--scp-flag=-oConnectTimeout=30 --scp-flag=-oServerAliveInterval=30)

# Makes a call, or only shows it. ssh would take the input of whoever calls this script.
call() {
    if [[ -n $dry_run ]]; then
        printf 'gcloud' >&3
        printf ' %q' "$@" >&3
        echo >&3
    else
        gcloud "$@" </dev/null
    fi
}

# Makes a call that only looks; a dry run takes its first argument for the answer.
ask() {
    local assumed=$1
    shift
    call "$@" || return
    if [[ -n $dry_run ]]; then
        echo "$assumed"
    fi
}

pause() {
    [[ -n $dry_run ]] || sleep "$poll_seconds"
}

# Runs a command on worker $1, or on all.
on_worker() {
    call compute tpus tpu-vm ssh "$name" "${in_zone[@]}" "--worker=$1" "${ssh_options[@]}" \
        ${ssh_flags[@]+"${ssh_flags[@]}"} "--command=$2"
}

# --------------------------------------------------------------------------------------------------
# What there is, and whose it is
# --------------------------------------------------------------------------------------------------

# A file here holds the random id that the resource carries as a label: without both, nothing is deleted.
record=${XDG_STATE_HOME:-$HOME/.local/state}/tnt_jax/tpu_vm/$project.$zone.$name
own_id=
if [[ -e $record ]]; then
    own_id=$(<"$record")
fi
label=tnt_jax_launch

# Sets `state` (empty: there is no such queued resource), `id` and `reason`; fails when gcloud does. A list
# rather than a description: that there is nothing is then no error, which could be any other. What is
# listed without a state, as the youngest may be, is there.
look() {
    local found
    found=$(ask "$1" compute tpus queued-resources list "${in_zone[@]}" "--filter=name~'(^|/)$name\$'" \
        "--format=value[separator='|'](state.state,tpu.nodeSpec[0].node.labels.$label,state.failedData.error.message)") ||
        return
    IFS='|' read -r state id reason <<<"$found" || true
    [[ -z $found ]] || state=${state:-STATE_UNSPECIFIED}
}

# The same of the TPU VM itself: sets `node` (its state, empty: none), `health`, `hosts` and `node_id`.
look_at_node() {
    local found
    found=$(ask "$1" compute tpus tpu-vm list "${in_zone[@]}" "--filter=name~'(^|/)$name\$'" \
        "--format=value[separator='|'](state,health,networkEndpoints.len(),labels.$label)") || return
    IFS='|' read -r node health hosts node_id <<<"$found" || true
    [[ -z $found ]] || node=${node:-STATE_UNSPECIFIED}
}

is_own() {
    [[ -n $dry_run || (-n $own_id && $id == "$own_id") ]]
}

refuse_foreign() {
    refuse "the queued resource $name in $project, $zone, was not created by this script on this machine:" \
        "it is left alone. Choose another --name, or delete it yourself: gcloud compute tpus" \
        "queued-resources delete $name --project=$project --zone=$zone --force"
}

delete_own() {
    call compute tpus queued-resources delete "$name" "${in_zone[@]}" --force
}

# --------------------------------------------------------------------------------------------------
# What runs there
# --------------------------------------------------------------------------------------------------

# Sets `commit`, `code` (its name on the hosts) and `arguments` (of the program).
choose_code() {
    local untracked
    git -C "$root" rev-parse --git-dir >/dev/null 2>&1 ||
        refuse "$root is no git checkout: up sends the code of a commit"
    if [[ -z $commit ]]; then
        [[ -z $(git -C "$root" status --porcelain --untracked-files=no) ]] ||
            refuse "there are changes that are not committed: commit them, or pass --commit=HEAD to run" \
                "without them"
        untracked=$(git -C "$root" ls-files --others --exclude-standard -- tnt_jax gin_configs |
            sed -n '1,5p;6s/.*/.../p' | tr '\n' ' ')
        [[ -z $untracked ]] ||
            refuse "expected every file of tnt_jax and gin_configs in a commit, found ${untracked% }:" \
                "add and commit, keep gin files of your own elsewhere, or pass --commit=HEAD to run without them"
        commit=HEAD
    fi
    commit=$(git -C "$root" rev-parse --quiet --verify --end-of-options "$commit^{commit}") ||
        refuse "--commit: no such commit here"
    in_commit launch/host.sh || refuse "--commit: $commit is from before launch/host.sh"

    local file argument value names_model_dir='' output='' given=()
    own_files=()
    for file in "${gin_files[@]}"; do
        if [[ -f $file ]] && ! is_projects "$file"; then # as the programs do, first what is here
            [[ $file == /* ]] || file=./$file # no option of what gets it
            own_files+=("$file")
            given+=("--gin_file=own/${#own_files[@]}/${file##*/}")
        elif [[ -n $(path_in_commit "$file") ]]; then
            given+=("--gin_file=$file")
        else
            refuse "--gin_file: expected a file, found ${file:-nothing}, which is neither in commit" \
                "${commit:0:12} nor here"
        fi
    done
    for argument in ${arguments[@]+"${arguments[@]}"}; do
        [[ $argument != --gin.MODEL_DIR=* ]] || names_model_dir=yes
        # Where the work is saved, for what is said at the end.
        case $argument in
            --gin.MODEL_DIR=* | --gin.OUTPUT=* | --gin.OUTPUT_DIR=*) output=${argument#*=} ;;
        esac
        case ${argument%%=*} in # what a program writes is not sent, wherever it is
            --gin.MODEL_DIR | --gin.OUTPUT | --gin.OUTPUT_DIR) continue ;;
            --gin.STATES_DIR | --gin.EXAMPLES_DIR | --gin.PROFILE_DIR) continue ;;
        esac
        value=${argument#*=}
        if [[ $value == *[./]* && -e $value ]] && ! in_commit "$value"; then
            refuse "${argument%%=*}: $value is on this machine, and not on the TPU: gcloud storage cp" \
                "--recursive $value gs://$bucket/, and name it there"
        fi
    done
    code=${commit:0:12}
    if ((${#own_files[@]})); then
        # Their names, too: the command line has them.
        code+=-$(for file in "${own_files[@]}"; do
            printf '%s\0' "${file##*/}"
            cksum <"$file"
        done | cksum | cut -d ' ' -f 1)
    fi
    model_dir=${output:-the place that its gin files name}
    if [[ $program == train && -z $names_model_dir ]]; then
        model_dir=gs://$bucket/$name
        given+=("--gin.MODEL_DIR=$model_dir")
    fi
    arguments=("${given[@]}" ${arguments[@]+"${arguments[@]}"})
}

# Whether a path is there, as a "blob" (a file) or as anything.
in_commit() {
    [[ $(git -C "$root" cat-file -t "$commit:$1" 2>/dev/null) =~ ^${2:-.+}$ ]]
}

# Where a gin file is in the commit, as the programs look for it; nothing if it is not there.
path_in_commit() {
    local path
    for path in "$1" "gin_configs/$1"; do
        if in_commit "$path" blob; then
            echo "$path"
            return
        fi
    done
}

# Whether a file here is one of the project's: that very file, changed or not, or the same text.
is_projects() {
    local path
    path=$(path_in_commit "$1")
    [[ -n $path ]] &&
        { [[ $1 -ef $root/$path ]] || git -C "$root" cat-file blob "$commit:$path" | cmp -s - "./$1"; }
}

# Writes what every host gets: the tree of the commit with own gin files, and host.sh.
pack_code() {
    local tree=$bundle/tree number=0 file
    rm -rf "$bundle" # of an `up` that was killed
    mkdir -p "$tree"
    git -C "$root" archive "$commit" | tar -x -C "$tree"
    for file in ${own_files[@]+"${own_files[@]}"}; do
        number=$((number + 1))
        mkdir -p "$tree/own/$number"
        cp "$file" "$tree/own/$number/"
    done
    COPYFILE_DISABLE=1 tar -czf "$bundle/tnt_jax-$code.tar.gz" -C "$tree" .
    cp "$tree/launch/host.sh" "$bundle/tnt_jax_host.sh"
    rm -rf "$tree"
}

choose_runtime_version() {
    if [[ -n $runtime_version ]]; then
        return
    fi
    case $accelerator_type in # https://cloud.google.com/tpu/docs/runtimes
        v6e-*) runtime_version=v2-alpha-tpuv6e ;;
        v5p-*) runtime_version=v2-alpha-tpuv5 ;;
        v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
        v2-* | v3-* | v4-*) runtime_version=tpu-ubuntu2204-base ;;
        *)
            refuse "--runtime_version: none is known for $accelerator_type (known: v2-*, v3-*, v4-*," \
                "v5litepod-*, v5p-*, v6e-*); TPU7x is for GKE alone (docs/launch.md)"
            ;;
    esac
}

# --------------------------------------------------------------------------------------------------
# up
# --------------------------------------------------------------------------------------------------

create() {
    local tier=() labels=$label=$own_id flag
    for flag in ${create_flags[@]+"${create_flags[@]}"}; do
        [[ $flag != --labels=* ]] || labels+=,${flag#*=} # gcloud takes the last --labels, and no other
    done
    case $provisioning in
        spot) tier=(--spot) ;;
        reserved) tier=(--reserved) ;;
    esac
    call compute tpus queued-resources create "$name" "${in_zone[@]}" "--node-id=$name" \
        "--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version" \
        ${tier[@]+"${tier[@]}"} ${create_flags[@]+"${create_flags[@]}"} "--labels=$labels"
}

install_on_hosts() {
    call compute tpus tpu-vm scp "$bundle/tnt_jax-$code.tar.gz" "$bundle/tnt_jax_host.sh" "$name:" \
        "${in_zone[@]}" --worker=all "${scp_options[@]}" ${ssh_flags[@]+"${ssh_flags[@]}"} &&
        on_worker all "bash tnt_jax_host.sh install $name $code"
}

start_on_hosts() {
    on_worker all "bash tnt_jax_host.sh start $name $code $program ${hosts:-1}$(printf ' %q' "${arguments[@]}")"
}

# Says something once, however often it is the case in a row.
say_once() {
    if [[ ${said:-} != "$*" ]]; then
        said=$*
        say "$*"
    fi
}

costs() {
    echo "The TPU is left as it is, and costs: the same command tries again, and this ends it:" \
        "$here down --name=$name --project=$project --zone=$zone"
}

# Counts one more of what should not go on for ever: `another what 5 || give_up ...`.
another() {
    local before=count_$1
    printf -v "count_$1" %d $((${!before:-0} + 1))
    before=count_$1
    ((${!before} < $2))
}

forget() {
    local what
    for what in "$@"; do
        printf -v "count_$what" 0
    done
}

delete_with_patience() {
    if delete_own; then
        forget undeleted
        return
    fi
    another undeleted 20 || give_up "twenty times gcloud could not delete $name, see above."
    return 1
}

# After a call that only looks and failed: `not_asked what`, counted by what.
not_asked() {
    [[ -z $is_first ]] || give_up "gcloud could not be asked what there is, see above."
    another "$1" 100 || give_up "gcloud could not be asked a hundred times. $(costs)"
    pause
}

# Deletes what is of no use any more, so that the next look creates it.
recreate() {
    say "$*: it is created again."
    delete_with_patience || true
    may_create=yes
    is_installed=
    is_started=
    expect=
    forget uninstalled unstarted stopped late # were of the one that is gone
    pause
}

# One look at a TPU that is there: installs, starts, follows. Sets `is_done` when the run is.
work() {
    local status answer until='' is_over=''
    if ! look_at_node "READY|HEALTHY|1|"; then
        not_asked unseen
        return
    fi
    forget unseen
    case $node in
        READY) ;;
        PREEMPTED | TERMINATED)
            recreate "$name was preempted"
            return
            ;;
        *)
            say_once "$name is ${node:-not there yet}."
            if [[ -z $node ]] && ! another absent 20; then
                recreate "the queued resource $name has no TPU any more"
                forget absent
            fi
            pause
            return
            ;;
    esac
    forget absent
    forget failed
    if [[ -z $is_installed ]]; then
        say "$name has ${hosts:-1} host(s). Installing commit ${commit:0:12} on each."
        if ! install_on_hosts; then
            another uninstalled 5 ||
                give_up "five times it could not be installed on every host, see above. $(costs)"
            say "It could not be installed on every host, see above. Once more."
            pause
            return
        fi
        is_installed=yes
        forget uninstalled
    fi
    status=0
    [[ -n $is_started ]] || start_on_hosts || status=$?
    case $status in
        0)
            is_started=yes
            forget unstarted
            ;;
        4) give_up "$name has another run, see above; end it with down, or choose another --name." ;;
        *)
            another unstarted 5 || give_up "five times it did not start on every host. $(costs)"
            is_installed= # a host may have been repaired, and be empty
            say "It did not start on every host, see above. Once more."
            pause
            return
            ;;
    esac
    # On several hosts a program is started again when another was lost, which may be there again.
    ((${hosts:-1} == 1)) || until=restart
    status=0
    on_worker 0 "bash tnt_jax_host.sh follow $name $from $until" || status=$?
    from=10
    if ((status == 6)); then
        answer=$(on_worker all "bash tnt_jax_host.sh state $name") || true
        if [[ $answer == *"without a word"* ]]; then
            say "Not every host runs it:"
            echo "$answer"
            is_started=
        fi
        return
    fi
    ((status)) || is_over=yes
    is_started=
    if ((status != 0 && status != 3)); then
        say "The connection ended with status $status; the run goes on if its TPU does."
        pause
        return
    fi
    status=0
    answer=$(on_worker all "bash tnt_jax_host.sh result $name") || status=$?
    if [[ -n $answer ]]; then
        echo "$answer"
    fi
    if ((status == 0)); then
        is_done=yes
    elif [[ -n $is_over && $answer == *": running"* ]] && another late 5; then
        is_started=yes # nobody is to be started alone
        pause
    elif [[ -n $is_over ]]; then
        say "Worker 0 is done, and with it the run. What other workers still do is ended."
        on_worker all "bash tnt_jax_host.sh conclude $name" || true
        is_done=yes
    elif ((status != 3)) || [[ $answer == *"finished 75"* || $answer == *"without a word"* ]]; then
        another stopped 20 || give_up "the run was stopped twenty times. $(costs)"
        say "The run was stopped; it goes on from its last checkpoint."
        pause
    else
        give_up "the run failed, its log is above. $(costs)"
    fi
}

up() {
    case $provisioning in
        on-demand | spot | reserved) ;;
        *) refuse "--provisioning: expected on-demand, spot or reserved, found $provisioning" ;;
    esac
    choose_runtime_version
    choose_code
    bundle=$record.code
    if [[ -z $dry_run ]]; then
        take_turn
        pack_code
    fi

    # The bucket alone: what is below it may be empty still, which gcloud takes for an error.
    call storage ls "gs://${bucket%%/*}" >/dev/null ||
        refuse "--bucket: gs://${bucket%%/*} cannot be listed, see above: expected a bucket that you may" \
            "read"

    local expect='' may_create=yes is_done='' is_installed='' is_started='' from=$lines is_first=yes
    while [[ -z $is_done ]]; do
        if ! look "$expect"; then
            not_asked unreachable
            continue
        fi
        forget unreachable
        if [[ -n $state ]] && ! is_own; then
            refuse_foreign
        fi
        if [[ -z $dry_run && -e $record.down ]]; then
            heed_down
            continue
        fi
        [[ -z $state ]] || forget gone
        case $state in
            "")
                if [[ -z $may_create ]]; then
                    another gone 3 || # it may not be listed yet
                        give_up "$name is gone: somebody deleted it. What it has saved is in $model_dir."
                    pause
                    continue
                fi
                may_follow || continue
                [[ -n $own_id ]] || write_record
                say "Creating $name, $accelerator_type, $provisioning, in $project, $zone."
                if create; then
                    may_create=
                    from=+1
                    forget refused
                    expect="ACTIVE||"
                else
                    another refused 3 ||
                        give_up "three times gcloud could not create $name, see above. Nothing runs."
                    pause
                fi
                ;;
            FAILED)
                if [[ -z $is_first ]] && ! another failed 3; then
                    give_up "the request for $name failed three times${reason:+: $reason}. Nothing runs."
                fi
                recreate "the request for $name failed${reason:+: $reason}"
                ;;
            SUSPENDED) recreate "$name was preempted" ;;
            ACTIVE) work ;;
            *)
                say_once "$name is $state."
                pause
                ;;
        esac
        is_first=
    done
    say "Done: $model_dir."
    if [[ -n $down_when_done ]]; then
        down
    else
        say "The TPU is there still, and costs: $here down --name=$name --project=$project --zone=$zone"
    fi
}

# Where there is no queued resource: whether one may be created, or what is left of the last one goes first.
may_follow() {
    if ! look_at_node ""; then
        not_asked unseen
        return 1
    elif [[ -n $node ]]; then
        [[ -n $own_id && $node_id == "$own_id" ]] ||
            refuse "a TPU VM $name is there that was not created here: it is left alone. Choose another" \
                "--name."
        another left 40 || give_up "the TPU VM $name of an earlier request does not go, and may cost:" \
            "gcloud compute tpus tpu-vm delete $name --project=$project --zone=$zone"
        say_once "The TPU VM $name of an earlier request is $node."
        pause
        return 1
    fi
    forget unseen
}

# `down` was given elsewhere; it may have looked before the last creation.
heed_down() {
    if [[ -z $state ]]; then
        if [[ -n $may_create ]] || ! another gone 3; then
            give_up "down was given meanwhile: this ends. What the run has saved is in $model_dir."
        fi
    elif [[ $state != DELETING ]]; then
        ! delete_with_patience || rm -f "$record"
    fi
    pause
}

write_record() {
    own_id=$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')
    if [[ -z $dry_run ]]; then
        mkdir -p "$(dirname "$record")"
        echo "$own_id" >"$record"
    fi
}

# Two at once would delete and create against each other.
take_turn() {
    local other
    mkdir -p "$(dirname "$record")"
    if ! ln -s $$ "$record.lock" 2>/dev/null; then
        other=$(follower)
        [[ -z $other ]] || refuse "up is at work on $name already, process $other; see $here logs"
        ln -sf $$ "$record.lock" # it was killed
    fi
    trap 'rm -rf "$record.lock" "$record.down" "$record.code"' EXIT
    trap 'interrupted' INT TERM
    rm -f "$record.down"
}

# The process of the `up` at work, if one is. A number may be another program's by now.
follower() {
    local other program
    other=$(readlink "$record.lock") && kill -0 "$other" 2>/dev/null || return 0
    program=$(ps -o args= -p "$other") || program=$here
    [[ $program != *tpu_vm.sh* ]] || echo "$other"
}

interrupted() {
    trap '' INT TERM
    echo >&2
    say "Interrupted. What there is stays, and costs: the same command takes it up; or" \
        "$here down --name=$name --project=$project --zone=$zone" >&2
    exit 130
}

# --------------------------------------------------------------------------------------------------
# logs, status, down
# --------------------------------------------------------------------------------------------------

logs() {
    local status=0
    on_worker "$worker" "bash tnt_jax_host.sh follow $name $lines" || status=$?
    ((status == 0 || status == 3 || status == 130)) || # 0, 3: of the run, as far as it got
        give_up "no log of $name from worker $worker, see above; $here status says what there is"
    exit "$status"
}

status() {
    look "ACTIVE||" || give_up "gcloud could not be asked what there is, see above."
    if [[ -z $state ]]; then
        say "There is no queued resource $name in $project, $zone."
        return
    fi
    local whose="not created here"
    ! is_own || whose="created here"
    say "queued resource $name: $state, $whose${reason:+; $reason}"
    look_at_node "READY|HEALTHY|1|" || give_up "gcloud could not be asked what there is, see above."
    say "TPU VM $name: ${node:-none}${health:+, $health}${hosts:+, $hosts host(s)}"
    if [[ $node == READY ]]; then
        on_worker all "bash tnt_jax_host.sh state $name" ||
            say "Not every host answered: one is not installed yet, or cannot be reached."
    fi
}

down() {
    local other hint=${own_id:+ What was asked for a moment ago may still come: look again.}
    other=$([[ -n $dry_run ]] || follower)
    if [[ -n $other && $other != "$$" ]]; then
        : >"$record.down" # else it would create the TPU again
        say "up is at work on $name, process $other: it ends when it sees that."
    fi
    look "ACTIVE||" || give_up "gcloud could not be asked what there is, see above."
    if [[ -z $state ]]; then
        say "There is no queued resource $name in $project, $zone: nothing to delete.$hint"
    else
        is_own || refuse_foreign
        delete_own || { look "" && [[ -z $state ]]; } || # somebody was faster
            give_up "gcloud could not delete $name, see above: it is there still, and costs."
        say "$name was deleted. What its run saved stays in its bucket."
        # Where there is nothing the record stays: a creation that was interrupted may still come.
        [[ -n $dry_run ]] || rm -f "$record"
    fi
}

"$action"
