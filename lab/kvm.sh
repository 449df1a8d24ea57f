#!/bin/bash
# Inside lab/vm (its files are that VM's own): the whole lab with KVM, vhost-net and plug, and one take-over by power loss.
#   lab/lab build; MCFT_VM_MEMORY_MIB=6144 MCFT_VM_TIMEOUT_S=1000 lab/vm bash lab/kvm.sh
# Some three minutes; not a test yet: it tells what it saw, and ends with 1 if the guest did not answer again.
set -uo pipefail
export MCFT_LAB=vmk MCFT_LAB_SLOW=${MCFT_LAB_SLOW:-8} MCFT_LAB_BUILT=yes
cd "$(dirname "$0")/.." || exit 1

sed -i 's/"net\/tun 10 200"/& "kvm 10 232" "vhost-net 10 238"/' lab/hostinit.sh
sed -i "s/<domain type='qemu'>/<domain type='kvm'>/; s/<driver name='qemu'\/>/<driver name='vhost'\/>/" lab/vm1.xml
mkdir -p lab/.cache/hosts-vmk
mount -t tmpfs -o size=2500M hosts lab/.cache/hosts-vmk # an overlay's upper can't be an overlay

step() {
    local begun=$SECONDS
    echo "== $*"
    "$@" 2>&1 | tail -15
    echo "   exit code ${PIPESTATUS[0]} after $((SECONDS - begun)) s"
}

step lab/lab up
step lab/lab vm start
# shellcheck disable=SC2016
step lab/lab run h1 -- sh -c 'ls -la /proc/$(pidof qemu-system-x86_64)/fd | grep -E "kvm|vhost"'
step timeout 300 lab/lab run h1 -- mcft protect vm1 --to host2
step lab/lab run h1 -- mcft status vm1
step lab/lab power h1 off
begun=$SECONDS
until lab/lab guest say ping > /dev/null 2>&1; do
    [ $((SECONDS - begun)) -lt 120 ] || { echo "the guest does not answer"; exit 1; }
    sleep 1
done
echo "the guest answers $((SECONDS - begun)) s after its host lost power"
step lab/lab run h2 -- mcft status vm1
