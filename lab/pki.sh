# shellcheck shell=bash
# Certificates, made once and kept in the cache: one CA, host1, host2, and two for tests (a stranger of the same CA, and one of another).

PKI=$CACHE/pki
PKI_VERSION=2

make_ca() { # make_ca DIR CN
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj "/CN=$2" \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign \
        -keyout "$1/ca-key.pem" -out "$1/ca-cert.pem" 2>/dev/null
}

make_cert() { # make_cert CA-DIR NAME SAN: NAME-cert.pem and NAME-key.pem in $PKI.new
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$2" \
        -keyout "$PKI.new/$2-key.pem" -out "$PKI.new/$2.csr" 2>/dev/null
    openssl x509 -req -in "$PKI.new/$2.csr" -CA "$1/ca-cert.pem" -CAkey "$1/ca-key.pem" -CAcreateserial -days 3650 \
        -extfile <(printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\nkeyUsage=digitalSignature,keyEncipherment\nbasicConstraints=CA:FALSE\n' "$3") \
        -out "$PKI.new/$2-cert.pem" 2>/dev/null
    rm "$PKI.new/$2.csr"
}

build_pki() {
    stamp_is pki $PKI_VERSION && return
    say "making the certificates"
    rm -rf "$PKI" "$PKI.new" && mkdir -p "$PKI.new/other"
    make_ca "$PKI.new" "mcft lab" && make_ca "$PKI.new/other" "mcft lab, another CA"
    make_cert "$PKI.new" host1 DNS:host1,DNS:h1,IP:10.99.0.1,IP:10.77.0.1
    make_cert "$PKI.new" host2 DNS:host2,DNS:h2,IP:10.99.0.2,IP:10.77.0.2
    make_cert "$PKI.new" host3 DNS:host3,DNS:h3,IP:10.99.0.3,IP:10.77.0.3
    make_cert "$PKI.new" stranger DNS:stranger,IP:10.77.0.100
    make_cert "$PKI.new/other" foreign DNS:host1,DNS:host2,IP:10.77.0.100
    mv "$PKI.new" "$PKI" && echo $PKI_VERSION > "$CACHE/pki.stamp"
}

# pki_files NAME ROOT: into a host's root, where libvirt, QEMU and the tests look for them.
pki_files() {
    local n=$1 r=$2 k gid
    if is_host "$n"; then
        n=$(hostname_of "$n")
        gid=$(awk -F: '$1 == "kvm" || $1 == "libvirt-qemu" { print $3 }' "$r/etc/group" | tail -1)
        install -D -m 644 "$PKI/ca-cert.pem" "$r/etc/pki/CA/cacert.pem"
        install -d -m 755 "$r/etc/pki/libvirt" && install -d -m 750 "$r/etc/pki/libvirt/private" && install -d -m 750 -g "$gid" "$r/etc/pki/qemu"
        install -m 644 "$PKI/ca-cert.pem" "$r/etc/pki/qemu/ca-cert.pem"
        for k in server client; do
            install -m 644 "$PKI/$n-cert.pem" "$r/etc/pki/libvirt/${k}cert.pem"
            install -m 640 "$PKI/$n-key.pem" "$r/etc/pki/libvirt/private/${k}key.pem"
            install -m 644 "$PKI/$n-cert.pem" "$r/etc/pki/qemu/$k-cert.pem"
            install -m 640 -g "$gid" "$PKI/$n-key.pem" "$r/etc/pki/qemu/$k-key.pem"
        done
    elif [ "$n" = cl ]; then
        install -d -m 755 "$r/etc/pki/test"
        install -m 644 "$PKI/ca-cert.pem" "$r/etc/pki/test/ca-cert.pem"
        install -m 644 "$PKI/other/ca-cert.pem" "$r/etc/pki/test/other-ca-cert.pem"
        install -m 644 "$PKI"/{stranger,foreign,host1,host2}-{cert,key}.pem "$r/etc/pki/test/"
    fi
}
