# shellcheck shell=bash
# oldinit.sh TREE NEWER CMD…: PID 1 of lab/old's namespaces. The daemon in TREE, whose changes stay in memory, with the QEMU of the tree
# NEWER if that is not empty; then CMD, and its exit code.
set -Eeuo pipefail
tree=$1 newer=$2 root=/run/old/root
shift 2

gone() {
    trap - ERR
    tail -n 20 /run/old/*.log >&2 || :
    echo "lab/old: libvirtd did not come up" >&2
    exit 125
}

# A network and a /sys of our own, one /run for both roots, and a /dev without /dev/kvm: its guests are QEMU's translator's.
roots() {
    local device
    mount --make-rprivate /
    ip link set lo up
    mount -t sysfs sysfs /sys
    mount -t tmpfs run /run
    mkdir -p /run/old/{memory,root} /run/lock
    mount -t tmpfs memory /run/old/memory
    mkdir /run/old/memory/{upper,work,lib-upper,lib-work}
    mount -t overlay -o "lowerdir=$tree,upperdir=/run/old/memory/upper,workdir=/run/old/memory/work" old $root
    mount -t proc proc $root/proc
    mount -t sysfs -o ro sysfs $root/sys
    mount -t tmpfs -o mode=755 dev $root/dev
    mkdir -p $root/dev/{net,pts,shm}
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts $root/dev/pts
    ln -s pts/ptmx $root/dev/ptmx
    for device in null zero full random urandom net/tun; do
        : > "$root/dev/$device"
        mount --bind "/dev/$device" "$root/dev/$device"
    done
    # libvirt's folders of its QEMUs are one and the same too; this machine may have none to mount them on.
    mount -t overlay -o lowerdir=/var/lib,upperdir=/run/old/memory/lib-upper,workdir=/run/old/memory/lib-work lib /var/lib
    mkdir -p /var/lib/libvirt
    mount --bind $root/var/lib/libvirt /var/lib/libvirt
    mount --make-shared /run # what CMD mounts there, the daemon sees
    mount --bind /run $root/run
}

# Without what is not here: polkit, AppArmor, cgroups. (QEMU's private /dev would be made of nodes, which need more than root of a
# container.) TCP on the loopback, as one of the ways of docs/engines.md.
configuration() {
    printf '%s\n' 'auth_unix_ro = "none"' 'auth_unix_rw = "none"' 'auth_tcp = "none"' 'listen_tls = 0' 'listen_tcp = 1' \
        'listen_addr = "127.0.0.1"' >> $root/etc/libvirt/libvirtd.conf
    printf '%s\n' 'security_driver = "none"' 'namespaces = []' 'cgroup_controllers = []' >> $root/etc/libvirt/qemu.conf
}

# A QEMU of another Debian, by that one's own linker and libraries.
newer_qemu() {
    local usr=/run/old/newer/usr
    mkdir /run/old/newer
    mount --bind -o ro "$newer" /run/old/newer
    printf '#!/bin/sh\nexec %s "$@"\n' "$usr/lib64/ld-linux-x86-64.so.2 --library-path $usr/lib/x86_64-linux-gnu \
        $usr/bin/qemu-system-x86_64 -L $usr/share/qemu -L $usr/share/seabios" > /run/old/qemu11
    chmod 755 /run/old/qemu11
}

inside() { exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot $root "$@" < /dev/null > "/run/old/$1.log" 2>&1; }

trap gone ERR
roots
configuration
[ -z "$newer" ] || newer_qemu
inside virtlogd & disown
inside libvirtd --listen & daemon=$!
disown
tries=0
until [ -S /run/libvirt/libvirt-sock ] && [ -S /run/libvirt/virtlogd-sock ]; do
    kill -0 $daemon 2> /dev/null && [ $((tries += 1)) -lt 1200 ] || gone
    sleep 0.05
done
trap - ERR
code=0
"$@" || code=$?
exit $code
