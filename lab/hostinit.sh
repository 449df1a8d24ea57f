#!/bin/bash
# The first process of a host, alone in its new namespaces: builds the root, moves into it, becomes init. Run by host_start only.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
. "$LAB/pki.sh"
. "$LAB/host.sh"
. "$LAB/modular.sh"
n=$1
cd "$(hdir "$n")"
r=$PWD/root

mount --make-rprivate /
hostname "$(hostname_of "$n")"
# Relative paths, so that no character of the checkout's path can confuse overlayfs.
mount -t overlay -o "lowerdir=../../tree,upperdir=upper,workdir=work" "lab-$n" root

mount -t proc proc "$r/proc"
mount --bind "$r/proc/sys" "$r/proc/sys" && mount -o remount,bind,ro "$r/proc/sys" # the machine's settings are not the lab's,
mount --bind /proc/sys/net "$r/proc/sys/net" && mount -o remount,bind,rw "$r/proc/sys/net" # but its network namespace is
mount --bind "$STATE/$n/boot_id" "$r/proc/sys/kernel/random/boot_id"
mount -t sysfs sysfs "$r/sys"
mkdir -p "$r/sys/fs/cgroup"
if [ "$(stat -f -c %T "$r/sys/fs/cgroup")" != cgroup2fs ]; then mount -t cgroup2 cgroup2 "$r/sys/fs/cgroup"; fi

mount -t tmpfs -o mode=755,nosuid tmpfs "$r/dev"
mkdir -p "$r"/dev/{pts,shm,net}
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts "$r/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$r/dev/shm"
for d in "null 1 3" "zero 1 5" "full 1 7" "random 1 8" "urandom 1 9" "tty 5 0" "net/tun 10 200" ${MCFT_LAB_KVM:+"kvm 10 232" "vhost-net 10 238"}; do
    set -- $d
    mknod -m 666 "$r/dev/$1" c "$2" "$3"
done
ln -s pts/ptmx "$r/dev/ptmx"
ln -s /proc/self/fd "$r/dev/fd"
for i in "0 stdin" "1 stdout" "2 stderr"; do set -- $i; ln -s "/proc/self/fd/$1" "$r/dev/$2"; done

mount -t tmpfs -o mode=755 tmpfs "$r/run"
mount -t tmpfs -o mode=1777 tmpfs "$r/tmp"
mount --bind "$REPO" "$r/opt/mcft" && mount -o remount,bind,ro "$r/opt/mcft"
mount --bind "$CACHE/pyc" "$r/var/cache/mcft-pyc"
if is_host "$n"; then
    mount --bind "$CACHE/guest" "$r/var/lib/mcft-guest" && mount -o remount,bind,ro "$r/var/lib/mcft-guest"
    mount --bind "$STATE/$n/store" "$r/var/lib/mcft"
    mount --bind images "$r/var/lib/libvirt/images"
    mount --bind "$CACHE/libvirt$INSTANCE/$n" "$r/var/cache/libvirt"
fi
host_files "$n" "$r"
if is_host "$n"; then
    # libvirt's remembered owners are void after a reboot; it tells one by the machine's boot time, which is not the lab's.
    chroot "$r" python3 - <<'FORGET'
import os
for top in ("/var/lib/libvirt/images", "/var/log/libvirt/qemu"):
    for folder, _, files in os.walk(top):
        for path in (os.path.join(folder, name) for name in files):
            for name in os.listxattr(path, follow_symlinks=False):
                if name.startswith("trusted.libvirt.security."):
                    os.removexattr(path, name, follow_symlinks=False)
FORGET
fi
: > "$r/run/mcft-lab-host"

cd "$r"
pivot_root . old-root
exec 2>&1
umount -l /old-root
mount --make-rshared / # as on any host: units with a view of their own see what is mounted later
if [ -e /etc/systemd/system/lab.target ]; then
    exec env -i container=other PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
        /lib/systemd/systemd --show-status=false
fi
# The others need only somebody who reaps: with SIGCHLD ignored the kernel does, and sleep inherits that.
trap '' CHLD
exec env -i PATH=/usr/bin:/bin sleep infinity
