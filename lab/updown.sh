# shellcheck shell=bash
# Up, down, status, install.

# One `up` or `down` of an instance at a time. The lock is in the cache, as it must outlive the lab; hosts do not inherit it.
take_lock() {
    mkdir -p "$CACHE"
    exec 9> "$CACHE/lock$INSTANCE"
    flock -w "${1:-0}" 9 || die "another 'lab/lab up' or 'down' is running"
}

# What all instances share is built by one at a time, and the tree never under the hosts that another one runs on it.
build_shared() {
    local other
    [ -z "${MCFT_LAB_BUILT:-}" ] || return 0 # lab/uml has had it built, outside
    exec 8> "$CACHE/lock.build"
    flock -w 600 8 || die "another instance has been building for 10 minutes"
    machine_packages
    if [ -e "$CACHE/tree.stamp" ] && other=$(others_up); then # another checkout's instance has a tree of its own
        say "instance $other uses the tree and the venv: they stay as they are"
    else
        build_tree
        build_venv
    fi
    build_pki
    build_guest
    build_small
    exec 8>&-
}

others_up() {
    local s
    for s in /run/mcft-lab /run/mcft-lab-*; do
        [ "$s" = "$STATE" ] || [ ! -d "$s" ] || { echo "${s#/run/}"; return 0; }
    done
    return 1
}

lab_up() {
    local h
    take_lock
    if [ -e "$STATE/up" ] && ! any_host; then
        say "the recorded lab died with all its hosts (a reboot?): starting anew"
    elif [ -e "$STATE/up" ]; then
        [ "$(cat "$STATE/up")" = "$REPO" ] || die "the lab is up from another checkout, $(cat "$STATE/up") (lab/lab down there, or MCFT_LAB=NAME here)"
        for h in $ALL; do init_pid "$h" > /dev/null || die "the lab is up but $h is not (lab/lab power $h on, or lab/lab down)"; done
        say "already up"
        return 0
    fi
    tear_down # what a broken lab may have left
    build_shared
    [ -z "${MCFT_LAB_OLD:-}" ] || "$LAB/old" true
    [ -z "${MCFT_LAB_MODULAR:-}" ] || (exec 8> "$CACHE/lock.build" && flock 8 && build_modular)
    say "network and hosts"
    mkdir -p "$STATE/links" "$CG"
    net_switch_up
    for h in $ALL; do net_host_up "$h"; host_disk_new "$h"; done
    for h in $ALL; do host_start "$h"; done
    say "waiting for systemd and $LIBVIRTD"
    for h in $HOSTS; do host_ready "$h"; done
    echo "$REPO" > "$STATE/up"
    say "up"
}

any_host() {
    local h
    for h in $ALL; do ! init_pid "$h" > /dev/null || return 0; done
    return 1
}

build_small() {
    local want
    want=$(hash_of "$LAB/enter.c")
    if ! stamp_is enter "$want"; then
        gcc -O2 -Wall -Wextra -o "$CACHE/enter" "$LAB/enter.c" || die "enter.c does not compile"
        echo "$want" > "$CACHE/enter.stamp"
    fi
    [ -e "$CACHE/store.img" ] && return
    truncate -s 64M "$CACHE/store.new"
    mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0 "$CACHE/store.new"
    mv "$CACHE/store.new" "$CACHE/store.img"
}

# Everything by the lab's own records: its cgroup, its namespaces' names, its mounts, its loop files. In an order in which each
# step works whether or not the earlier ones had anything to do.
tear_down() {
    local h l
    if [ -d "$CG" ]; then
        kill_cgroup || die "processes of the lab do not end: $(cat "$CG"/cgroup.procs "$CG"/*/cgroup.procs 2>/dev/null | tr '\n' ' ')"
        find "$CG" -depth -type d -exec rmdir {} + 2>/dev/null || :
        [ ! -d "$CG" ] || wait_for 5 "the lab's cgroups to empty" remove_cgroups
    fi
    for h in $ALL $SPARE; do net_host_down "$h"; done
    # (the mount namespaces of the dead go with them; these are the machine's own)
    awk -v s="$STATE/" 'index($2, s) == 1 { print $2 }' /proc/mounts | tac | while read -r l; do umount "$l" || umount -l "$l"; done
    for h in $HOSTS $SPARE; do
        losetup -j "$(hdir "$h")/store.img" 2>/dev/null | cut -d: -f1 | while read -r l; do losetup -d "$l"; done
    done
    rm -rf "$STATE"
}

# Kills the whole tree of groups, and waits: the groups are empty when the last process is gone.
kill_cgroup() {
    if [ -e "$CG/cgroup.kill" ]; then
        echo 1 > "$CG/cgroup.kill"
    else
        find "$CG" -name cgroup.procs -exec cat {} + | while read -r l; do kill -KILL "$l" 2>/dev/null || :; done
    fi
    wait_for 10 "the lab's processes to end" grep -q '^populated 0' "$CG/cgroup.events"
}
remove_cgroups() { find "$CG" -depth -type d -exec rmdir {} + && [ ! -d "$CG" ]; }

lab_down() {
    take_lock 10
    tear_down
    for h in $ALL $SPARE; do rm -rf "$(hdir "$h")"; done
    say "down"
}

lab_status() {
    local h pid
    [ -d "$STATE" ] || { echo "the lab is down"; return 1; }
    [ -e "$STATE/up" ] || echo "the lab is only partly up (lab/lab down cleans it)"
    for h in $ALL $SPARE; do
        if pid=$(init_pid "$h"); then
            printf '%-4s up   pid %-7s %s %s' "$h" "$pid" "$(lan_ip "$h")" "$(rep_ip "$h")"
            if is_host "$h"; then
                printf ' %s=%s agent=%s domains=%s' $LIBVIRTD $(lab_run "$h" -- systemctl is-active $LIBVIRTD mcft-agent || :) \
                    "$(lab_run "$h" -- virsh -q list --all 2>/dev/null | awk '{ d = d sep $2 ":" $3; sep = "," } END { print d ? d : "none" }')"
            fi
            echo
        else
            printf '%-4s off\n' "$h"
        fi
    done
    for h in "$STATE"/links/*; do [ ! -e "$h" ] || echo "link ${h##*/} is down"; done
}

lab_install() {
    local h pid
    for h in $HOSTS $SPARE; do
        pid=$(init_pid "$h") || continue
        mcft_files "$h" "/proc/$pid/root"
        host_units "/proc/$pid/root"
        lab_run "$h" -- systemctl daemon-reload
        [ ! -e "$REPO/packaging/mcft-agent.service" ] || lab_run "$h" -- systemctl restart mcft-agent.service
    done
}
