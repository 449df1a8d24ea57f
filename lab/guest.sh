# shellcheck shell=bash
# The guest: Debian's cloud kernel, a busybox initramfs with redis, e2fsck and guestd. `lab/lab guest build` makes it.

GUEST=$CACHE/guest           # vmlinuz and initrd.gz; bound to /var/lib/mcft-guest on both hosts
GUEST_MODULES="virtio_pci virtio_blk virtio_net virtio_scsi sd_mod ahci ext4 button evdev"
GUEST_PROGRAMS="/usr/bin/redis-server /sbin/e2fsck /sbin/mke2fs"

build_guest() {
    local want
    want="$(cat "$CACHE/tree.stamp") $(hash_of "$LAB"/guest/* "$LAB/guest.sh")"
    stamp_is guest "$want" && return
    say "building the guest"
    local w=$CACHE/guest.new root=$CACHE/guest.new/root
    rm -rf "$w" && mkdir -p "$w/kernel" "$root"/{bin,sbin,etc,mod,proc,sys,dev,run,tmp,data,lib,lib64}
    dpkg-deb -x "$(echo "$TREE"/root/linux-image-*.deb)" "$w/kernel"
    cp "$w"/kernel/boot/vmlinuz-* "$w/vmlinuz"
    guest_modules "$w/kernel" "$root/mod"
    guest_programs "$root"
    gcc -O2 -Wall -Wextra -static -pthread -o "$root/bin/guestd" "$LAB/guest/guestd.c" || die "guestd.c does not compile"
    cp "$TREE/usr/bin/busybox" "$root/bin/busybox"
    install -m 755 "$LAB/guest/init" "$root/init"
    cp "$LAB/guest/redis.conf" "$root/etc/redis.conf"
    printf 'root:x:0:0::/:/bin/sh\n' > "$root/etc/passwd"
    # Not compressed: under TCG copying is faster than inflating. (The kernel does not mind the name.)
    (cd "$root" && find . | "$TREE/usr/bin/busybox" cpio -o -H newc -R 0:0 2> /dev/null) > "$w/initrd.gz"
    # Into the folder that is there: running hosts have it bound.
    mkdir -p "$GUEST" && chmod 755 "$GUEST" && chmod 644 "$w/vmlinuz" "$w/initrd.gz"
    mv "$w/vmlinuz" "$w/initrd.gz" "$GUEST/"
    rm -rf "$w"
    echo "$want" > "$CACHE/guest.stamp"
}

# guest_modules KERNEL-TREE DEST: the drivers and what they need, unpacked, and the order to load them in.
guest_modules() {
    local version m
    [ -d "$1/lib/modules" ] || { mkdir -p "$1/lib" && mv "$1/usr/lib/modules" "$1/lib/modules"; }
    version=$(ls "$1/lib/modules")
    rm -rf "$TREE/tmp/kernel" && mkdir "$TREE/tmp/kernel" && mv "$1/lib" "$TREE/tmp/kernel/lib"
    in_tree depmod -b /tmp/kernel "$version"
    for m in $GUEST_MODULES; do in_tree modprobe -d /tmp/kernel -S "$version" --show-depends "$m"; done |
        awk '$1 == "insmod" && !seen[$2]++ { print $2 }' > "$2/../mods"
    while read -r m; do
        local name=${m##*/}
        case $m in
        *.xz) xz -dc "$TREE$m" > "$2/${name%.xz}" ;;
        *) cp "$TREE$m" "$2/$name" ;;
        esac
        echo "${name%.xz}" >> "$2/list"
    done < "$2/../mods"
    rm -rf "$2/../mods" "$TREE/tmp/kernel"
}

# guest_programs DEST: programs of the tree with the shared libraries that they load.
guest_programs() {
    local p lib
    for p in $GUEST_PROGRAMS; do cp "$TREE$p" "$1/bin/"; done
    # shellcheck disable=SC2086
    in_tree ldd $GUEST_PROGRAMS | grep -oE '/[^ ]*\.so[^ ]*' | sort -u | while read -r lib; do
        mkdir -p "$1${lib%/*}" && cp -L "$TREE$lib" "$1$lib"
    done
}
