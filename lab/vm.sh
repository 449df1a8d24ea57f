# shellcheck shell=bash
# The domain vm1 and talking to its guest.

VM_IMAGE=/var/lib/libvirt/images/vm1.img

# guest_say COMMAND…: one command to guestd's control port, from cl; prints its answer.
guest_say() {
    lab_run cl -- /usr/bin/python3 -ISc 'import socket, sys
s = socket.create_connection(("10.77.0.10", 9000), timeout=float(sys.argv[1])); s.settimeout(120)
s.sendall(" ".join(sys.argv[2:]).encode() + b"\n"); print(s.makefile().readline(), end="")' "${SAY_TIMEOUT:-5}" "$@"
}

guest_cmd() {
    case ${1:-} in
    build) mkdir -p "$CACHE"; build_tree; build_guest; say "guest is in $GUEST" ;;
    say) shift; guest_say "$@" ;;
    *) die "usage: lab/lab guest build | say COMMAND…" ;;
    esac
}

vm_remove() {
    init_pid "$1" > /dev/null || return 0
    lab_run "$1" -- sh -c '
        virsh -q destroy vm1 > /dev/null 2>&1
        virsh -q undefine vm1 --nvram > /dev/null 2>&1
        rm -f /var/lib/libvirt/images/vm1.img* /var/log/libvirt/qemu/vm1.serial; :'
}

vm_start() {
    local on=${1:-h1} h
    is_host "$on" || die "usage: lab/lab vm start [h1|h2]"
    init_pid "$on" > /dev/null || die "$on is not up"
    for h in $HOSTS; do vm_remove "$h"; done
    lab_run "$on" -- sh -c "truncate -s 64M $VM_IMAGE && virsh -q define /opt/mcft/lab/vm1.xml && virsh -q start vm1" > /dev/null
    SAY_TIMEOUT=1 wait_for "${VM_BOOT_SECONDS:-60}" "the guest to answer" guest_say ping || die "see: lab/lab run $on -- cat /var/log/libvirt/qemu/vm1.serial"
    wait_for 30 "the guest's redis" lab_run cl -- redis-cli -t 1 -h vm1 ping || die "the guest is up but its redis is not"
    say "vm1 runs on $on, its guest and redis answer"
}

vm_cmd() {
    case ${1:-} in
    start) vm_start "${2:-h1}" ;;
    clean | stop) for h in $HOSTS; do vm_remove "$h"; done ;;
    *) die "usage: lab/lab vm start [h1|h2] | clean" ;;
    esac
}
