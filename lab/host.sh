# shellcheck shell=bash
# One host: its files, its disks, its start and its sudden end.

CG=$(cgroup_root)/mcft-lab$INSTANCE    # every process of the lab is below it from its first instruction on
hdir() { echo "$CACHE/hosts$INSTANCE/$1"; } # what is on the host's disk: overlay, images, agent's store

# Units that have nothing to do in a lab host, or would touch the machine.
MASKED="systemd-udevd.service systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udev-trigger.service
 systemd-udev-load-credentials.service systemd-hwdb-update.service systemd-networkd.service systemd-networkd.socket
 systemd-logind.service systemd-machined.service systemd-sysctl.service systemd-modules-load.service
 systemd-binfmt.service systemd-journal-flush.service systemd-journald-audit.socket systemd-sysusers.service
 systemd-firstboot.service systemd-machine-id-commit.service systemd-random-seed.service systemd-pstore.service
 systemd-update-done.service systemd-journal-catalog-update.service ldconfig.service proc-sys-fs-binfmt_misc.automount
 proc-sys-fs-binfmt_misc.mount dev-hugepages.mount dev-mqueue.mount sys-kernel-config.mount sys-kernel-debug.mount
 sys-kernel-tracing.mount sys-fs-fuse-connections.mount tmp.mount kmod-static-nodes.service systemd-remount-fs.service
 systemd-tmpfiles-clean.timer systemd-tmpfiles-setup-dev.service systemd-tmpfiles-setup-dev-early.service
 systemd-user-sessions.service systemd-ask-password-console.path systemd-ask-password-wall.path getty.target console-getty.service
 polkit.service libvirt-guests.service qemu-vmsr-helper.socket redis-server.service e2scrub_reap.service
 systemd-hostnamed.socket systemd-creds.socket systemd-pcrextend.socket systemd-sysext.socket remote-fs.target
 systemd-tpm2-setup-early.service systemd-tpm2-setup.service sys-kernel-config.mount systemd-mountfsd.socket systemd-nsresourced.socket"

# host_files NAME ROOT: everything that the lab itself puts into a host. Again at every power on and by `lab/lab install`.
host_files() {
    local n=$1 r=$2
    hostname_of "$n" > "$r/etc/hostname"
    cp "$LAB/files/hosts" "$r/etc/hosts"
    : > "$r/etc/resolv.conf"
    install -m 755 "$LAB/files/mcft" "$r/usr/local/bin/mcft"
    ln -sf ../local/bin/mcft "$r/usr/bin/mcft"
    install -m 755 "$LAB/files/fence_lab" "$r/usr/local/sbin/fence_lab"
    pki_files "$n" "$r"
    if [ -n "${MCFT_LAB_PRELOAD:-}" ]; then # lab/uml
        install -m 755 "$MCFT_LAB_PRELOAD" "$r/usr/local/lib/mcft-lab-clock.so"
        echo /usr/local/lib/mcft-lab-clock.so > "$r/etc/ld.so.preload"
    fi
    is_host "$n" || return 0
    echo "$n mcft lab" | md5sum | cut -c1-32 > "$r/etc/machine-id"
    install -d -m 755 "$r/etc/libvirt/hooks" "$r/etc/mcft" "$r/etc/systemd/system/mcft-gate@.service.d" "$r/etc/systemd/system/mcft-agent.service.d"
    install -m 644 "$LAB/files/qemu.conf" "$LAB/files/libvirtd.conf" "$r/etc/libvirt/"
    rm -rf "$r/etc/libvirt/qemu/networks/autostart/default.xml" "$r/etc/systemd/system/libvirtd.service.d"
    [ -z "${MCFT_LAB_OLD:-}" ] || install -D -m 644 "$LAB/files/libvirtd-old.conf" "$r/etc/systemd/system/libvirtd.service.d/lab.conf"
    echo 'LIBVIRTD_ARGS=' > "$r/etc/default/libvirtd" # Debian's --timeout 120 would end an idle libvirtd
    mcft_files "$n" "$r"
    host_units "$r"
    [ -z "${MCFT_LAB_MODULAR:-}" ] || modular_files "$r"
}

# The checkout's part: configuration, hook, units. Any of them may not exist yet.
mcft_files() {
    local n=$1 r=$2 o u
    o=$([ "$n" = h1 ] && echo h2 || echo h1)
    sed -e "s/@NAME@/$(hostname_of "$n")/g" -e "s/@PEER@/$(hostname_of "$o")/g" -e "s/@REP@/$(rep_ip "$n")/g" -e "s/@LAN@/$(lan_ip "$n")/g" \
        -e "s/@PEER_REP@/$(rep_ip "$o")/g" -e "s/@PEER_LAN@/$(lan_ip "$o")/g" "$LAB/files/mcft.toml.in" > "$r/etc/mcft/mcft.toml"
    # (A gate's restart has to fit in, which takes Python 2 s over there.)
    [ "$SLOW" = 1 ] || printf '\n[keepalive]\nloss = "%sms"\n' $((1200 * SLOW)) >> "$r/etc/mcft/mcft.toml"
    # a test's own, which is to outlive a power cut
    [ ! -e "$STATE/$n/mcft.toml" ] || cp "$STATE/$n/mcft.toml" "$r/etc/mcft/mcft.toml"
    if [ -e "$REPO/mcft/hook.sh" ]; then install -m 755 "$REPO/mcft/hook.sh" "$r/etc/libvirt/hooks/qemu"; else rm -f "$r/etc/libvirt/hooks/qemu"; fi
    rm -f "$r"/etc/systemd/system/mcft-*.{service,socket,target,timer}
    for u in "$REPO"/packaging/*.service "$REPO"/packaging/*.socket "$REPO"/packaging/*.target; do
        [ ! -e "$u" ] || install -m 644 "$u" "$r/etc/systemd/system/"
    done
    install -m 644 "$LAB/files/mcft-gate-lab.conf" "$r/etc/systemd/system/mcft-gate@.service.d/lab.conf"
    install -m 644 "$LAB/files/mcft-agent-lab.conf" "$r/etc/systemd/system/mcft-agent.service.d/lab.conf"
}

host_units() {
    local r=$1 s=$1/etc/systemd/system u
    (cd "$s" && rm -f $MASKED && for u in $MASKED; do : > "$u"; done) # an empty file masks (systemd.unit(5)), and needs no process
    cp "$LAB/files/lab.target" "$s/lab.target"
    ln -sf lab.target "$s/default.target"
    mkdir -p "$s/lab.target.wants" "$r/etc/systemd/journald.conf.d"
    printf '[Journal]\nStorage=volatile\nRateLimitBurst=0\n' > "$r/etc/systemd/journald.conf.d/lab.conf"
    for u in mcft-agent.service mcft-shutdown.service; do
        if [ -e "$s/$u" ]; then ln -sf "../$u" "$s/lab.target.wants/$u"; else rm -f "$s/lab.target.wants/$u"; fi
    done
}

# A fresh disk for a host: nothing of an earlier lab is left on it.
host_disk_new() {
    local d
    d=$(hdir "$1")
    rm -rf "$d" && mkdir -p "$d"/{upper,work,root,images} "$CACHE/libvirt$INSTANCE/$1" "$CACHE/pyc"
    chmod 711 "$d/images" && chmod 755 "$d/upper"
    is_host "$1" && cp --sparse=always "$CACHE/store.img" "$d/store.img"
    return 0
}

# The agent's store is a small ext4 of its own, mounted here and bound into the host, so that this side decides when it is
# flushed. commit=600: the kernel writes nothing back behind the agent's back.
store_mount() {
    mkdir -p "$STATE/$1/store"
    mount -o loop,commit=600 "$(hdir "$1")/store.img" "$STATE/$1/store"
}

# Start the host's first process, in its cgroup and namespaces, and record it. files/hostinit builds the root and becomes init.
host_start() {
    local n=$1 spawner pid
    mkdir -p "$STATE/$n" "$CG/$n"
    cat /proc/sys/kernel/random/uuid > "$STATE/$n/boot_id"
    if is_host "$n"; then store_mount "$n"; fi
    (
        echo $BASHPID > "$CG/$n/cgroup.procs"
        exec 9>&- setsid nsenter --net="/run/netns/$NS$n" unshare --mount --uts --ipc --cgroup --pid --fork bash "$LAB/hostinit.sh" "$n"
    ) < /dev/null > "$STATE/$n/console" 2>&1 &
    spawner=$!
    wait_for 10 "the first process of $n" host_rooted "$n" $spawner || die "$n did not start: $(tail -1 "$STATE/$n/console")"
}

host_rooted() {
    local pid=
    read -r pid _ < "/proc/$2/task/$2/children" || : # the file has no newline
    [ -n "$pid" ] && [ -e "/proc/$pid/root/run/mcft-lab-host" ] && record_pid "$pid" "$STATE/$1/init"
}

# A host is up when systemd has finished and libvirtd answers.
host_ready() {
    is_host "$1" || return 0
    wait_for 60 "$1 to boot" lab_run "$1" -- sh -c 'systemctl is-active -q lab.target && virsh -q list'
}

host_kill() {
    local pid
    pid=$(init_pid "$1") || return 0
    kill -KILL "$pid" 2>/dev/null || :
    wait_for 10 "the processes of $1 to end" test ! -e "/proc/$pid"
    rm -f "$STATE/$1/init"
}

# Pull the plug: first nothing gets out any more, then every process dies in one go, and what the agent's store had not yet
# given to its disk is gone: the disk is copied as it is, before the umount which would flush.
power_off() {
    local n=$1 d pid t0 t1 t2
    d=$(hdir "$n")
    pid=$(init_pid "$n") || die "$n is off already"
    t0=$("$CACHE/enter" --clock)
    net_cut "$n-lan" "$n-rep"
    t1=$("$CACHE/enter" --clock)
    kill -KILL "$pid"
    wait_for 10 "the processes of $n to end" test ! -e "/proc/$pid" || :
    t2=$("$CACHE/enter" --clock)
    rm -f "$STATE/$n/init"
    net_host_down "$n"
    if is_host "$n"; then
        cp --sparse=always "$d/store.img" "$d/store.cut"
        umount "$STATE/$n/store"
        wait_for 5 "the loop device of $n" no_loop "$d/store.img" || :
        mv "$d/store.cut" "$d/store.img"
    fi
    echo "cut_begin=$t0 cut_done=$t1 dead=$t2 (seconds of CLOCK_BOOTTIME, which is the same in every host)"
}

no_loop() { [ -z "$(losetup -j "$1")" ]; }

# What a host that shut itself down (`systemctl poweroff` in it) leaves, unlike one whose plug was pulled.
host_went_down() {
    local n=$1
    [ -e "$STATE/$n/init" ] || return 0
    rm -f "$STATE/$n/init"
    net_host_down "$n"
    is_host "$n" || return 0
    umount "$STATE/$n/store"
    wait_for 5 "the loop device of $n" no_loop "$(hdir "$n")/store.img" || :
}

power_on() {
    local n=$1
    [ -d "$STATE" ] || die "the lab is not up (lab/lab up)"
    if init_pid "$n" > /dev/null; then die "$n is on already"; fi
    host_went_down "$n"
    net_host_up "$n"
    [ "$n" != $SPARE ] || host_disk_new "$n"
    host_start "$n"
    host_ready "$n"
}
