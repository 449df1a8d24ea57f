#!/bin/sh
# libvirt's qemu hook: may this domain start on this host? Installed as /etc/libvirt/hooks/qemu.d/mcft (or .../qemu).
# A test of files, without agent, database or libvirt (a hook that calls libvirt hangs it).
#
#   $1 name   $2 operation   $3 sub-operation   XML on standard input
#
# STATE/start/UUID   "banned …": only with a token; "free" or absent: always
# RUN/token/UUID     "UUID PID GENERATION BOOT_ID PURPOSE EXPIRES" (EXPIRES: seconds of uptime)

state=${MCFT_STATE_DIR:-/var/lib/mcft}
run=${MCFT_RUN_DIR:-/run/mcft}

# Non-zero on reconnect would kill a running QEMU; after the end there is nothing to refuse.
case "$2" in
prepare | start | restore | migrate) ;;
started | release) ;;
*) exit 0 ;;
esac

# No markers at all: mcft protects nothing here.
[ -d "$state/start" ] || exit 0

# restore and migrate pass the XML on when the hook prints nothing. Only the uuid is read.
uuid=$(sed -n 's|.*<uuid>\([0-9a-fA-F-]*\)</uuid>.*|\1|p' | head -n 1)
[ -n "$uuid" ] || exit 0
marker=$state/start/$uuid
[ -e "$marker" ] || exit 0

case "$2" in
started | release)
	rm -f "$run/token/$uuid"
	exit 0
	;;
esac

read -r word _ <"$marker" || word=unreadable
[ "$word" = free ] && exit 0

refuse() {
	echo "mcft: $1 may not start here: $2 (see: mcft status $1)" >&2
	exit 1
}

[ -r "$run/token/$uuid" ] || refuse "$1" "it is protected by mcft, and this host does not own its newest generation"
read -r t_uuid _ _ t_boot _ t_expires <"$run/token/$uuid"
read -r boot </proc/sys/kernel/random/boot_id
read -r uptime _ </proc/uptime
[ "$t_uuid" = "$uuid" ] || refuse "$1" "the token is another domain's"
[ "$t_boot" = "$boot" ] || refuse "$1" "the token is of an earlier boot"
[ "${uptime%%.*}" -le "${t_expires:-0}" ] || refuse "$1" "the token has expired"
exit 0
