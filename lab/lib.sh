# shellcheck shell=bash
# Words, paths and small helpers that every part of the lab uses. Sourced, never run.

LAB=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO=$(dirname "$LAB")
CACHE=$LAB/.cache            # the one folder that outlives the lab (git-ignored)
TREE=$CACHE/tree             # the Debian system that every host's root is an overlay of
# MCFT_LAB names another lab beside the usual one: its own namespaces, processes and hosts' disks; the rest of the cache is shared.
INSTANCE=${MCFT_LAB:+-$MCFT_LAB}
case $INSTANCE in *[!a-z0-9-]* | -?????????*) echo "lab: MCFT_LAB must be at most 8 of a-z0-9" >&2; exit 2 ;; esac
STATE=/run/mcft-lab$INSTANCE # what exists only while the lab is up
NS=mcft$INSTANCE-            # its namespaces' names begin with this
HOSTS="h1 h2"                # these run systemd, libvirtd and the agent
LIBVIRTD=${MCFT_LAB_MODULAR:+virtqemud} # libvirt's unit in them
LIBVIRTD=${LIBVIRTD:-libvirtd}
SPARE=h3                     # one more, which `up` leaves off: `lab power h3 on`
PLAIN="cl arb sw"            # these run nothing but what `lab run` starts there
ALL="$HOSTS $PLAIN"

now_ms() { local t=${EPOCHREALTIME/./}; echo $((t / 1000)); }
T0=$(now_ms)
say() {
    local d=$(($(now_ms) - T0))
    printf '[%3d.%01ds] %s\n' $((d / 1000)) $((d % 1000 / 100)) "$*" >&2
}
die() { printf 'lab: %s\n' "$*" >&2; exit 1; }

# How many times longer than usual everything may take: on lab/uml's kernel, which has one CPU.
SLOW=${MCFT_LAB_SLOW:-1}

# wait_for SECONDS WHAT CMD…: poll CMD until it succeeds; one clear sentence if it never does.
wait_for() {
    local end=$((${EPOCHREALTIME/./} + $1 * SLOW * 1000000)) what=$2 never poll=.03
    shift 2
    [ "$SLOW" = 1 ] || poll=1
    exec {never}<> <(:)
    until "$@" >/dev/null 2>&1; do
        [ ${EPOCHREALTIME/./} -lt $end ] || { printf 'lab: gave up waiting for %s\n' "$what" >&2; return 1; }
        read -rt $poll -u $never || :
    done
    exec {never}>&-
}

# thrice CMD…: what fetches from elsewhere, which may be slow or away for a moment.
thrice() { "$@" || { sleep 5; "$@"; } || { sleep 20; "$@"; }; }

hostname_of() { case $1 in h1) echo host1 ;; h2) echo host2 ;; h3) echo host3 ;; *) echo "$1" ;; esac; }
lan_ip() { case $1 in h1) echo 10.77.0.1 ;; h2) echo 10.77.0.2 ;; h3) echo 10.77.0.3 ;; cl) echo 10.77.0.100 ;; arb) echo 10.77.0.200 ;; esac; }
rep_ip() { case $1 in h1) echo 10.99.0.1 ;; h2) echo 10.99.0.2 ;; h3) echo 10.99.0.3 ;; arb) echo 10.99.0.200 ;; esac; }
is_host() { case " $HOSTS $SPARE " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

# A process is named by pid and start time together, so that a recycled pid is never mistaken for ours.
start_time() { local s; { read -r s < "/proc/$1/stat"; } 2>/dev/null || return 1; s=${s##*) }; set -- $s; echo "${20}"; }
record_pid() { echo "$1 $(start_time "$1")" > "$2.new" && mv "$2.new" "$2"; }

# recorded_pid FILE: prints the pid if the recorded process still lives.
recorded_pid() {
    local pid start
    [ -e "$1" ] && read -r pid start < "$1" || return 1
    [ "$(start_time "$pid")" = "$start" ] && echo "$pid"
}
init_pid() { recorded_pid "$STATE/$1/init"; }

# cgroup2 is at /sys/fs/cgroup on a usual machine and below it on a hybrid one.
cgroup_root() { awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts; }

lab_run() { "$LAB/lab" run "$@"; }
