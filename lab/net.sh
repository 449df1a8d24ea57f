# shellcheck shell=bash
# The network: namespace mcft-sw (mcft-NAME-sw) holds two bridges (LAN and replication), every other one hangs on them by veth pairs.
#
#   h1: lan0 in br0 (10.77.0.1), rep0 (10.99.0.1)     h2: the same with .2     cl: lan0 (10.77.0.100)
#   arb: lan0 (10.77.0.200), rep0 (10.99.0.200)       sw: ports h1-lan, h1-rep, h2-lan, …

SW=${NS}sw

# In the namespace itself: loopback up, no IPv6 (its discovery traffic only blurs captures).
quiet_ns() {
    nsenter --net="/run/netns/$NS$1" sh -c 'echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6
        echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6; exec ip link set lo up' 2>/dev/null || :
}

net_switch_up() {
    ip netns add $SW
    quiet_ns sw
    ip -n $SW -batch - <<< "link add br-lan type bridge stp_state 0 forward_delay 0
link set br-lan up
link add br-rep type bridge stp_state 0 forward_delay 0
link set br-rep up"
}

# The far side of each pair is made inside the new namespace at once: nothing of it ever shows in the machine's own.
net_host_up() {
    local h=$1 lan rep ns=$NS$1
    [ "$h" = sw ] && return
    lan=$(lan_ip "$h") rep=$(rep_ip "$h")
    ip netns add "$ns"
    quiet_ns "$h"
    {
        echo "link add $h-lan type veth peer name lan0 netns $ns"
        echo "link set $h-lan master br-lan"
        link_is_down "lan:$h" || echo "link set $h-lan up"
        [ -z "$rep" ] || echo "link add $h-rep type veth peer name rep0 netns $ns
link set $h-rep master br-rep
link set $h-rep up"
    } | ip -n $SW -batch -
    {
        if is_host "$h"; then
            echo "link add br0 type bridge stp_state 0 forward_delay 0
link set lan0 master br0
link set br0 up
addr add $lan/24 dev br0"
        else
            echo "addr add $lan/24 dev lan0"
        fi
        echo "link set lan0 up"
        [ -z "$rep" ] || echo "addr add $rep/24 dev rep0
link set rep0 up"
    } | ip -n "$ns" -batch -
    apply_rep_cuts
}

# Deleting the switch's ends first is synchronous, deleting a namespace is not.
net_host_down() {
    local l
    if [ -e /run/netns/$SW ]; then
        for l in "$1-lan" "$1-rep"; do ip -n $SW link del "$l" 2>/dev/null || :; done
    fi
    [ ! -e "/run/netns/$NS$1" ] || ip netns del "$NS$1" 2>/dev/null || rm -f "/run/netns/$NS$1"
}

# Cut LINKS…: those switch ports forward nothing from the moment this returns; the host sees nothing of it.
# (The carrier is left for later: a host that loses its power does not watch its links go.)
net_cut() {
    local p
    # -force: a port that is down already must not keep the next one from being cut
    for p in "$@"; do echo "link set dev $p state disabled"; done | bridge -n $SW -force -batch - 2>/dev/null || :
}

# Single replication ports that are to be cut: a new port, and every port of a bridge set up again, starts as forwarding.
apply_rep_cuts() {
    local f
    for f in "$STATE"/links/rep:*; do [ ! -e "$f" ] || net_cut "${f##*/rep:}-rep"; done
}

link_is_down() { [ -e "$STATE/links/$1" ]; }

link_cmd() {
    local link=${1:-} to=${2:-}
    case $to in up | down) ;; *) die "usage: lab/lab link rep|lan:h1|lan:h2|lan:cl|lan:arb up|down" ;; esac
    [ -e /run/netns/$SW ] || die "the lab is not up (lab/lab up)"
    case $link in
    rep) ip -n $SW link set br-rep "$to" ;; # a bridge that is down forwards nothing, its ports keep their carrier: a silent cut
    rep:h1 | rep:h2 | rep:arb) # the same for one host's port only; the port must be up for its state to be set
        [ "$to" = down ] || bridge -n $SW link set dev "${link#rep:}-rep" state forwarding 2>/dev/null || : ;; # (off, or bridge down)
    lan:h1 | lan:h2 | lan:cl | lan:arb)
        if ip -n $SW link show "${link#lan:}-lan" > /dev/null 2>&1; then ip -n $SW link set "${link#lan:}-lan" "$to"; fi ;;
    *) die "no link '$link' (rep, rep:h1, rep:h2, lan:h1, lan:h2, lan:cl)" ;;
    esac
    # Remembered, so that a host which is powered on again finds its cable as it was left.
    mkdir -p "$STATE/links"
    if [ "$to" = down ]; then : > "$STATE/links/$link"; else rm -f "$STATE/links/$link"; fi
    apply_rep_cuts
}
