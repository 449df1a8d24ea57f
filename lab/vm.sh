# shellcheck shell=bash
# The domains vm1 and vm2, and talking to their guests. vm2 is vm1 with another name, uuid, disk and address, and no beacon.

image_of() { echo "/var/lib/libvirt/images/$1.img"; }
address_of() { case $1 in vm1) echo 10.77.0.10 ;; vm2) echo 10.77.0.20 ;; *) die "no guest '$1' (vm1, vm2)" ;; esac; }

# guest_say [@vm2] COMMAND…: one command to guestd's control port, from cl; prints its answer.
guest_say() {
    local vm=vm1
    case ${1:-} in @*) vm=${1#@}; shift ;; esac
    lab_run cl -- /usr/bin/python3 -ISc 'import socket, sys
s = socket.create_connection((sys.argv[2], 9000), timeout=float(sys.argv[1])); s.settimeout(120)
s.sendall(" ".join(sys.argv[3:]).encode() + b"\n"); print(s.makefile().readline(), end="")' "${SAY_TIMEOUT:-5}" "$(address_of "$vm")" "$@"
}

guest_cmd() {
    case ${1:-} in
    build) mkdir -p "$CACHE"; build_tree; build_guest; say "guest is in $GUEST" ;;
    say) shift; guest_say "$@" ;;
    *) die "usage: lab/lab guest build | say [@vm2] COMMAND…" ;;
    esac
}

vm_remove() {
    init_pid "$1" > /dev/null || return 0
    lab_run "$1" -- sh -c '
        virsh -q destroy "$1" > /dev/null 2>&1
        virsh -q undefine "$1" --nvram > /dev/null 2>&1
        rm -f "/var/lib/libvirt/images/$1.img"* "/var/log/libvirt/qemu/$1.serial"; :' sh "$2"
}

# vm_xml NAME: its definition. MCFT_LAB_KVM: with KVM and vhost-net (and without SVM of its own: the emulated processor's KVM does not
# always give nested state back, and QEMU then ends). MCFT_LAB_OLD: for a libvirt that knows no <cpu mode='maximum'/>.
# MCFT_LAB_GUEST_MIB: with less memory, where copying it takes half a minute.
vm_xml() {
    local edits=()
    [ -z "${MCFT_LAB_KVM:-}" ] || edits+=(-e "s/<domain type='qemu'>/<domain type='kvm'>/; s/<driver name='qemu'\/>/<driver name='vhost'\/>/"
        -e "s/<cpu mode='maximum'\/>/<cpu mode='maximum'><feature policy='disable' name='svm'\/><\/cpu>/")
    [ -z "${MCFT_LAB_GUEST_MIB:-}" ] || edits+=(-e "s/256<\/memory>/$MCFT_LAB_GUEST_MIB<\/memory>/")
    [ -z "${MCFT_LAB_OLD:-}" ] || edits+=(-e "/<cpu mode='maximum'/d")
    domain_xml "$1" | sed "${edits[@]}" -e ''
}

domain_xml() {
    case $1 in
    vm1) cat "$LAB/vm1.xml" ;;
    vm2) sed -e 's/vm1/vm2/g' -e 's/11111111-2222-3333-4444-555555555555/22222222-3333-4444-5555-666666666666/' \
        -e 's/52:54:00:00:00:10/52:54:00:00:00:20/' -e "s/panic=1/& guest_ip=$(address_of vm2) guest_beacon=off/" "$LAB/vm1.xml" ;;
    esac
}

vm_start() {
    local on=${1:-h1} vm=${2:-vm1} h
    is_host "$on" || die "usage: lab/lab vm start [h1|h2] [vm1|vm2]"
    address_of "$vm" > /dev/null
    init_pid "$on" > /dev/null || die "$on is not up"
    for h in $HOSTS $SPARE; do vm_remove "$h" "$vm"; done
    vm_xml "$vm" | lab_run "$on" -- sh -c "cat > /run/$vm.xml && truncate -s 64M $(image_of "$vm") &&
        virsh -q define /run/$vm.xml && virsh -q start $vm" > /dev/null
    SAY_TIMEOUT=1 wait_for "${VM_BOOT_SECONDS:-60}" "the guest to answer" guest_say "@$vm" ping ||
        die "see: lab/lab run $on -- cat /var/log/libvirt/qemu/$vm.serial"
    wait_for 30 "the guest's redis" lab_run cl -- redis-cli -e -t 1 -h "$vm" ping || die "the guest is up but its redis is not"
    say "$vm runs on $on, its guest and redis answer"
}

vm_cmd() {
    local h
    case ${1:-} in
    start) vm_start "${2:-h1}" "${3:-vm1}" ;;
    clean | stop) for h in $HOSTS $SPARE; do vm_remove "$h" "${2:-vm1}"; done ;;
    *) die "usage: lab/lab vm start [h1|h2] [vm1|vm2] | clean [vm1|vm2]" ;;
    esac
}
