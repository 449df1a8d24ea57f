# shellcheck shell=bash
# libvirt's modular daemons (MCFT_LAB_MODULAR), which Debian does not package: built once, from the source of the very package that
# the tree has. Programs and units are all that is kept: libvirt.so and the drivers are the tree's own, which this source fits exactly.

MODULAR=$CACHE/modular # what hosts get, by its path in them; the tree that it was built in is not kept
MODULAR_VERSION=1
MODULAR_DAEMONS="virtqemud virtstoraged virtnetworkd virtnodedevd virtsecretd virtnwfilterd virtproxyd"
MODULAR_PACKAGES="gcc libc6-dev meson ninja-build pkgconf dpkg-dev patch xz-utils python3 xsltproc libxml2-utils rpcsvc-proto python3-docutils
 libglib2.0-dev libgnutls28-dev libxml2-dev libtirpc-dev libjson-c-dev libnl-3-dev libnl-route-3-dev libudev-dev libpciaccess-dev libsasl2-dev"
# As Debian's rules say it, as far as programs that only load drivers depend on it (SASL does: what libvirt.so exports).
MODULAR_OPTIONS="-Dprefix=/usr -Dlibdir=lib/$(uname -m)-linux-gnu -Dsysconfdir=/etc -Dlocalstatedir=/var -Drunstatedir=/run
 -Dinitconfdir=/etc/default -Dunitdir=/usr/lib/systemd/system -Dinit_script=systemd -Dno_git=true -Drpath=disabled -Dauto_features=disabled
 -Ddriver_libvirtd=enabled -Ddriver_remote=enabled -Ddriver_qemu=enabled -Ddriver_network=enabled -Ddriver_secrets=enabled -Dstorage_dir=enabled
 -Dstorage_fs=enabled -Djson_c=enabled -Dlibnl=enabled -Dudev=enabled -Dpciaccess=enabled -Dsasl=enabled -Dqemu_user=libvirt-qemu
 -Dqemu_group=libvirt-qemu -Dremote_default_mode=legacy -Dtls_priority=NORMAL"

# Into $MODULAR/root. (ninja makes a libvirt.so too, to link with.)
build_modular() {
    local want version new=$MODULAR.new src path options=() targets=
    version=$(dpkg-query --admindir="$TREE/var/lib/dpkg" -W -f '${source:Version}' libvirt-daemon)
    want="$MODULAR_VERSION $version $(echo $MODULAR_DAEMONS $MODULAR_PACKAGES $MODULAR_OPTIONS | sha256sum | cut -c1-16)"
    stamp_is modular/made "$want" && return
    say "building libvirt $version's modular daemons (once)"
    rm -rf "$new" "$MODULAR" && mkdir -p "$new"
    apt_sources | sed 'p; s/^deb /deb-src /' > "$new/sources.list"
    apt-config dump | grep -E '^Acquire::(http|https|ftp|Check|Retries)' > "$new/apt.conf" || :
    for path in man doc locale info; do options+=("--dpkgopt=path-exclude=/usr/share/$path/*"); done
    # (apt checks both tarballs by the archive's signed list. A mirror that lacks their .dsc and .asc makes it fail all the same.)
    contained nice -n 19 mmdebstrap --quiet --mode=root --variant=minbase --format=directory \
        --include="$(echo $MODULAR_PACKAGES | tr ' ' ,)" --aptopt="$new/apt.conf" --aptopt='Acquire::Languages "none"' "${options[@]}" \
        --skip=check/qemu --customize-hook="mkdir \"\$1/build\" && cd \"\$1/build\" &&
            { APT_CONFIG=\$MMDEBSTRAP_APT_CONFIG apt-get -qq source --download-only libvirt=$version || ls *.orig.tar.xz *.debian.tar.xz; }" \
        trixie "$new/tree" "$new/sources.list" > "$new/log" 2>&1 < /dev/null ||
        die "building the tree failed: $(grep -m1 '^E:' "$new/log" || tail -1 "$new/log") (all of it in $new/log)"
    for path in $MODULAR_DAEMONS; do targets+=" src/$path"; done
    TREE=$new/tree in_tree nice -n 19 sh -ec "cd /build && mkdir src && tar -xf *.orig.tar.xz -C src --strip-components 1
        cd src && tar -xf ../*.debian.tar.xz
        for patch in \$(grep -v '^#' debian/patches/series); do patch -sp1 < debian/patches/\$patch; done
        meson setup out $(echo $MODULAR_OPTIONS) && ninja -C out $targets" >> "$new/log" 2>&1 < /dev/null ||
        die "building the daemons failed: $(tail -1 "$new/log") (all of it in $new/log)"
    src=$new/tree/build/src/out/src
    install -d "$new"/root/usr/{sbin,lib/systemd/system}
    for path in $MODULAR_DAEMONS; do
        install -s "$src/$path" "$new/root/usr/sbin/"
        install -m 644 "$src/$path".service "$src/$path"*.socket "$new/root/usr/lib/systemd/system/"
    done
    rm -rf "$new/tree"
    mv "$new" "$MODULAR" && echo "$want" > "$MODULAR/made.stamp"
}

# A host has them instead of libvirtd, each behind its socket, as `systemctl enable` would do it.
modular_files() {
    local r=$1 s=$1/etc/systemd/system path
    cp -a "$MODULAR/root/." "$r/"
    for path in $MODULAR_DAEMONS; do
        install -m 644 "$LAB/files/libvirtd.conf" "$r/etc/libvirt/$path.conf"
        ln -sf "/usr/lib/systemd/system/$path.socket" "$s/sockets.target.wants/$path.socket"
    done
    for path in libvirtd.service libvirtd{,-ro,-admin,-tcp,-tls}.socket; do rm -f "$s/sockets.target.wants/$path" && : > "$s/$path"; done
    echo 'VIRTQEMUD_ARGS=' > "$r/etc/default/virtqemud" # as for libvirtd; the others may end when idle
}
