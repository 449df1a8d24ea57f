#!/bin/busybox sh
# PID 1 of lab/vm's initramfs: modules, the machine's root (9p, read-only) below an overlay in memory, then vminit.py.
B=/bin/busybox
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
$B mkdir -p /proc /dev /lower /more /job /memory /root
$B mount -t proc proc /proc
for module in /modules/*; do $B insmod "$module" 2> /dev/null; done
nine=trans=virtio,version=9p2000.L,msize=512000
$B mount -t 9p -o "$nine,ro,cache=loose" root /lower || $B poweroff -f
$B mount -t 9p -o "$nine,ro,cache=loose" more /more || $B poweroff -f
$B mount -t 9p -o "$nine" job /job || $B poweroff -f
$B mount -t tmpfs -o size=80% memory /memory
$B mkdir /memory/upper /memory/work
$B mount -t overlay -o "lowerdir=/more:/lower,upperdir=/memory/upper,workdir=/memory/work" overlay /root || $B poweroff -f
$B mkdir -p /root/run /root/dev /root/proc /root/sys
$B mount -t tmpfs run /root/run
$B mkdir /root/run/job && $B mount --move /job /root/run/job
exec $B switch_root /root /usr/bin/python3 -I /run/job/vminit.py
