# Sourced by the launchers, which set $script to their path: arguments, settings, and commands that --dry-run prints.
# shellcheck shell=bash disable=SC2034,SC2154 # variables set there, or used there
set -euo pipefail
dry_run=

fail() {
    echo "error: $*" >&2
    exit 1
}

# Takes --dry-run and --help from the front of the arguments; leaves the others in $rest.
options() {
    while [ $# -gt 0 ]; do
        case $1 in
        --dry-run) dry_run=1 ;;
        -h | --help)
            sed -n '2,${/^#/!q;s/^# \{0,1\}//;p}' "$script"
            exit
            ;;
        *) break ;;
        esac
        shift
    done
    rest=("$@")
}

# The words as one would type them: quoted where a shell would otherwise change them.
shown() {
    local word words=()
    for word in "$@"; do
        [[ $word =~ ^[a-zA-Z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
        words+=("$word")
    done
    printf '%s\n' "${words[*]}"
}

# Runs a command, or prints it.
call() {
    if [ -n "$dry_run" ]; then shown "$@"; else "$@"; fi
}

# Sets XLA's flags and CUDA's variables for several GPUs, or prints how.
gpu_flags() {
    local settings
    # shellcheck disable=SC2016 # printed as one would type it
    if [ -n "$dry_run" ]; then
        echo 'eval "$(python -m launch.gpu_flags)"'
    else
        settings=$(python -m launch.gpu_flags)
        eval "$settings"
    fi
}

# need NAME=EXAMPLE …: one error for all settings that are missing.
need() {
    local setting variable names=() examples=()
    for setting in "$@"; do
        variable=${setting%%=*}
        if [ -z "${!variable:-}" ]; then
            names+=("$variable")
            examples+=("$setting")
        fi
    done
    [ ${#names[@]} -eq 0 ] || fail "${names[*]} not set; for example: export ${examples[*]}"
}
