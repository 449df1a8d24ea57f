# shellcheck shell=bash
# The cache: a Debian 13 tree, the agent's venv, the guest, the certificates. Each has a stamp; a stamp that fits is trusted.

TREE_VERSION=1
PACKAGES="systemd systemd-sysv dbus libvirt-daemon-system libvirt-clients qemu-system-x86 qemu-utils
 ovmf python3 python3-venv python3-libvirt iproute2 iputils-ping iputils-arping tcpdump redis-tools redis-server procps e2fsprogs
 sqlite3 gnutls-bin openssl etcd-server etcd-client busybox-static kmod netcat-openbsd curl ca-certificates util-linux strace less"
# What the agent imports, if the checkout has no requirements.lock yet.
PIP_NAMES="click rich pyroute2 aiohttp msgspec"

# Programs of this machine that building and running the lab needs: "program package" pairs.
NEEDED="mmdebstrap:mmdebstrap ip:iproute2 losetup:mount mkfs.ext4:e2fsprogs openssl:openssl gcc:gcc
 nsenter:util-linux unshare:util-linux setpriv:util-linux dpkg-deb:dpkg xz:xz-utils"

machine_packages() {
    local pair missing=
    for pair in $NEEDED; do command -v "${pair%%:*}" > /dev/null || missing+=" ${pair##*:}"; done
    [ -e /usr/include/stdio.h ] || missing+=" libc6-dev"
    /usr/bin/python3 -m pip --version > /dev/null 2>&1 || missing+=" python3-pip"
    [ -n "$missing" ] || return 0
    say "installing on this machine:$missing"
    thrice apt-get update -qq > /dev/null 2>&1 || die "apt-get update failed; the lab needs packages:$missing"
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive thrice apt-get install -y -qq --no-install-recommends $missing > "$CACHE/apt.log" 2>&1 ||
        die "apt-get install$missing failed, see $CACHE/apt.log"
}

# mirror SUITE-PATTERN: the first archive in apt's own configuration that has such a suite with component main.
mirror() {
    cat /etc/apt/sources.list.d/*.sources 2>/dev/null | awk -v suite="$1" '
        BEGIN { RS = ""; FS = "\n" }
        found { next } # (read to the end: cat would die of a closed pipe, and `pipefail` count it)
        { uri = suites = comps = ""
          for (i = 1; i <= NF; i++) {
            if ($i ~ /^URIs:/) { split($i, a, /[ \t]+/); uri = a[2] }
            if ($i ~ /^Suites:/) suites = $i " "
            if ($i ~ /^Components:/) comps = $i " " }
          if (suites ~ (" " suite " ") && comps ~ / main /) { print uri; found = 1 } }' | grep . && return
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
        sed -E 's/\[[^]]*\]//' | awk -v suite="$1" '!found && $1 == "deb" && $3 ~ ("^" suite "$") && / main/ { print $2; found = 1 }' | grep .
}

apt_sources() {
    local code main sec
    # shellcheck source=/dev/null
    code=$(. /etc/os-release && echo "$VERSION_CODENAME")
    main=$(mirror "$code") || die "no mirror of Debian $code with 'main' in apt's configuration"
    sec=$(mirror "$code-security") || sec=
    echo "deb $main trixie main"
    echo "deb $main trixie-updates main"
    echo "deb $main trixie-backports main"
    [ -z "$sec" ] || echo "deb $sec trixie-security main"
}

stamp_is() { [ "$(cat "$CACHE/$1.stamp" 2>/dev/null)" = "$2" ]; }
hash_of() { { cat "$@" 2>/dev/null || :; } | sha256sum | cut -c1-16; }

# Whatever runs here dies with the lab's shell, and its mounts with it: a killed `up` leaves nothing behind.
contained() { setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --mount-proc -- "$@"; }

# In a fresh mount namespace with the tree's own /proc and /dev, run a command inside it.
in_tree() {
    # shellcheck disable=SC2016
    contained sh -c 't=$1; shift; mount -t proc p "$t/proc" && mount --rbind /dev "$t/dev" && exec chroot "$t" "$@"' sh "$TREE" "$@"
}

build_tree() {
    local want new=$CACHE/tree.new
    want=$(echo "$TREE_VERSION" $PACKAGES | sha256sum | cut -c1-16)
    if stamp_is tree "$want"; then return; fi
    say "building the Debian tree (the long part of a first up)"
    rm -rf "$new" "$TREE" "$CACHE"/*.stamp
    mkdir -p "$CACHE/build"
    apt_sources > "$CACHE/build/sources.list"
    apt-config dump | grep -E '^Acquire::(http|https|ftp|Check|Retries)' > "$CACHE/build/apt.conf" || :
    printf 'Package: src:qemu src:seabios src:ipxe\nPin: release n=trixie-backports\nPin-Priority: 600\n' > "$CACHE/build/pin"
    thrice make_tree "$new" > "$CACHE/tree.log" 2>&1 < /dev/null ||
        die "building the tree failed: $(grep -m1 '^E:' "$CACHE/tree.log" || tail -1 "$CACHE/tree.log") (all of it in $CACHE/tree.log)"
    mkdir -p "$new/opt/mcft" "$new/opt/mcft-venv" "$new/var/lib/mcft" "$new/var/lib/mcft-guest" "$new/var/cache/mcft-pyc" "$new/old-root"
    mv "$new" "$TREE"
    echo "$want" > "$CACHE/tree.stamp"
    say "the tree is $(du -sh "$TREE" | cut -f1)"
}

make_tree() {
    rm -rf "$1"
    contained mmdebstrap --quiet --mode=root --variant=minbase --format=directory \
        --include="$(echo $PACKAGES | tr ' ' ,)" --aptopt="$CACHE/build/apt.conf" --aptopt='Acquire::Languages "none"' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --skip=check/qemu \
        --setup-hook="install -D -m 644 '$CACHE/build/pin' \"\$1/etc/apt/preferences.d/lab\"" \
        --customize-hook='cd "$1/root" && APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get -qq download "$(APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-cache depends linux-image-cloud-amd64 | sed -n "s/.*Depends: \(linux-image-[^ ]*\).*/\1/p" | head -1)"' \
        trixie "$1" "$CACHE/build/sources.list"
}

# The machine's own pip fetches for the tree's Python, so that its index and certificates are those that pip is configured with here.
build_venv() {
    local lock=$REPO/requirements.lock want site
    want="$(cat "$CACHE/tree.stamp") $(hash_of "$lock") $PIP_NAMES"
    stamp_is venv "$want" && return
    say "building the agent's venv $([ -e "$lock" ] && echo "from requirements.lock" || echo "(no requirements.lock: by names)")"
    rm -rf "$TREE/opt/mcft-venv"
    in_tree python3 -m venv --without-pip --system-site-packages /opt/mcft-venv || die "python3 -m venv failed in the tree"
    site=$(echo "$TREE"/opt/mcft-venv/lib/python3*/site-packages)
    local what=($PIP_NAMES)
    [ -e "$lock" ] && what=(--require-hashes -r "$lock")
    PIP_NO_CACHE_DIR=1 thrice /usr/bin/python3 -m pip --quiet install --target "$site" --python-version 3.13 --implementation cp \
        --abi cp313 --abi abi3 --abi none --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
        --only-binary=:all: --no-compile --root-user-action ignore "${what[@]}" > "$CACHE/pip.log" 2>&1 ||
        die "pip could not install the agent's dependencies: $(grep -m1 ERROR "$CACHE/pip.log")"
    echo /opt/mcft > "$site/mcft-checkout.pth"
    in_tree /opt/mcft-venv/bin/python -m compileall -q /opt/mcft-venv/lib || :
    echo "$want" > "$CACHE/venv.stamp"
}
