# Functions for the scenarios. For busybox sh.
#
# A scenario prints `ok NAME`, `FAIL NAME: why` or `skip NAME: why` for each check. scripts/test-vm
# evaluates these lines only. $iface is the interface under test. tx0, in the namespace `peer`,
# sends to it.

# busybox sh would run its own applets instead of these programs in /bin.
ip() { /bin/ip "$@"; }
ping() { /bin/ping "$@"; }
peer() { /bin/ip netns exec peer "$@"; }

say() { echo "== $* ($(cut -d' ' -f1 /proc/uptime) s)"; }
ok() { echo "ok $scenario: $*"; }
fault() { echo "FAIL $scenario: $*"; }
skip() { echo "skip $scenario: $*"; }
# run COMMAND...: prints a command, its output and its exit status.
run() {
    echo "\$ $*"
    "$@" 2>&1
    status=$?
    [ $status = 0 ] || echo "[exit $status]"
    return $status
}
# until_true TENTHS COMMAND...: waits until a command succeeds.
until_true() {
    tenths=$1
    shift
    until "$@"; do
        tenths=$((tenths - 1))
        [ $tenths -gt 0 ] || return 1
        sleep 0.1
    done
}
has_carrier() { [ "$(cat "/sys/class/net/${1:-$iface}/carrier" 2>/dev/null)" = 1 ]; }
carrier() { until_true 300 has_carrier "$@" || fault "no carrier on ${1:-$iface} after 30 s"; }

readonly receiver_mac=52:54:00:00:00:01 sender_mac=52:54:00:00:00:02
# name_interface MAC NAME
name_interface() {
    for folder in /sys/class/net/*; do
        [ "$(cat "$folder/address")" != "$1" ] || ip link set dev "${folder##*/}" name "$2"
    done
}
# Names the interfaces and sets them up as the README describes for a real one.
make_interfaces() {
    name_interface $receiver_mac rx0
    name_interface $sender_mac tx0
    ip netns add peer
    peer sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1
    ip link set dev tx0 netns peer
    peer ethtool -K tx0 tx off gro off tso off
    peer ip link set dev tx0 mtu 1500 up
    iface=rx0
    set_up_nic
    if [ "$vm_model" = bond ]; then
        modprobe bonding max_bonds=0
        iface=bond0
        make_bond
    fi
    ip addr add 10.9.0.1/24 dev $iface
    peer ip addr add 10.9.0.2/24 dev tx0
    carrier
    avoid_arp
    peer ping -c 2 -W 5 -A -q 10.9.0.1 >/tmp/ping 2>&1 || fault "no ping before the start: $(tail -n 2 /tmp/ping)"
    ethtool -i $iface
    ethtool -l $iface 2>/dev/null
    ip link show dev $iface
}
# Sets permanent neighbour entries, so that no ARP packet passes and every packet that passes is one
# of the test's. An interface that goes down loses its entries.
avoid_arp() {
    ip neigh replace 10.9.0.2 lladdr $sender_mac dev $iface nud permanent
    peer ip neigh replace 10.9.0.1 lladdr $receiver_mac dev tx0 nud permanent
}
set_up_nic() {
    ip link set dev rx0 mtu 1500 up promisc on
    ethtool -L rx0 combined "$vm_queues" 2>/dev/null
    ethtool -X rx0 equal "$vm_queues" 2>/dev/null
    for feature in gro lro rxvlan; do ethtool -K rx0 $feature off 2>/dev/null; done
}
# A bond of one NIC.
make_bond() {
    ip link set dev rx0 down
    ip link add bond0 type bond mode active-backup miimon 100
    ip link set dev rx0 master bond0
    ip link set dev bond0 up promisc on
}

# start [ARGUMENT...]: starts xfan with two xfan-flow workers, and waits until it runs. It is a
# fault if xfan does not start.
start() {
    try_start "$@" && return
    fault "xfan $*: it does not start, exit $code: $(tail -n 1 /tmp/log)"
    return 1
}
# As start, but xfan may refuse to start; $code is then its exit code.
try_start() {
    rm -rf /tmp/flows /tmp/report
    mkdir -m 1777 /tmp/flows
    : >/tmp/log
    avoid_arp 2>/dev/null
    echo "\$ xfan run -i $iface -n 2 $* -- xfan-flow --output /tmp/flows/{member}.json"
    xfan run -i $iface -n 2 "$@" -- /bin/xfan-flow --output '/tmp/flows/{member}.json' >/tmp/totals 2>/tmp/log &
    primary=$!
    told=0
    until_true 600 started
    told
    if ! grep -q ' running ' /tmp/log; then
        wait_primary
        return 1
    fi
    socket=/run/xfan/$iface.sock
    take_report
    say "running: $(mode)"
}
# start_with SETTING...: as try_start, with these lines in its configuration.
start_with() {
    printf '%s\n' "$@" >/tmp/xfan.toml
    cat /tmp/xfan.toml
    try_start -c /tmp/xfan.toml
}
# refused NAME CODES PATTERN: checks that xfan ended with one of these codes, and that its last line
# matches PATTERN.
refused() {
    case $2 in
        *$code*) ;;
        *) fault "$1: refused with exit $code, not $2: $(tail -n 1 /tmp/log)"; return ;;
    esac
    if tail -n 1 /tmp/log | grep -qE "$3"; then
        ok "$1: refused: $(tail -n 1 /tmp/log)"
    else
        fault "$1: the refusal does not say $3: $(tail -n 1 /tmp/log)"
    fi
}
# Prints what xfan has logged since the last call.
told() {
    tail -n "+$((told + 1))" /tmp/log
    told=$(wc -l </tmp/log)
}
started() { grep -q ' running ' /tmp/log || ! kill -0 $primary 2>/dev/null; }
wait_primary() {
    until_true 600 ended || kill -KILL $primary
    wait $primary
    code=$?
    primary=
}
ended() { ! kill -0 $primary 2>/dev/null; }
end_primary() {
    [ -n "$primary" ] || return 0
    kill -TERM $primary 2>/dev/null
    wait_primary
}
mode() { sed -n 's/^[^:]*: \(.*\), primary .*/\1/p' /tmp/stats; }
take_report() {
    xfan stats --socket $socket >/tmp/stats 2>&1
    xfan stats --socket $socket --json >/tmp/report 2>&1
}
# Prints the counters without times and rates, which always change.
counters() { xfan stats --socket $socket | grep -E '^(xdp|kernel|packets|frames|default)' | sed 's/ *[0-9]*%$//'; }
settle() {
    before=
    for tries in $(seq 50); do
        now=$(counters)
        [ "$now" != "$before" ] || break
        before=$now
        sleep 0.3
    done
    # xfan reads the counters of the NIC once a second.
    sleep 2
    take_report
}
# traffic NAME CAPTURE: sends a capture, stops xfan, and checks that all packets arrived.
traffic() {
    carrier
    send "$2"
    stop "$1"
    check "$1" "$2"
}
# stop NAME: stops xfan and checks that it ends with 0.
stop() {
    settle
    kill -TERM $primary
    wait_primary
    told
    cat /tmp/totals
    if [ $code = 0 ]; then ok "$1: exit 0"; else fault "$1: xfan ended with $code: $(tail -n 1 /tmp/log)"; fi
}
# send CAPTURE [N]: sends a capture, N times.
send() {
    peer xfan-replay -i "${sender:-tx0}" --pps "${pps:-500}" --loops "${2:-1}" "/captures/$1.pcap" >/tmp/sent 2>&1 ||
        fault "xfan-replay of $1.pcap: $(cat /tmp/sent)"
}
# Whether the driver no longer receives anything, and xfan reports it. vmxnet3 was seen to do so
# after the link was down or the MTU changed; no counter has the packets then.
deaf() { [ "$vm_model" = vmxnet3 ] && grep -q 'ERROR .* receives packets, but the XDP program sees none' /tmp/log; }
# check NAME [--losses] CAPTURE[xN]...: compares records and counters with what was sent.
check() {
    name=$1 options=
    shift
    [ "$1" != --losses ] || { options=--losses && shift; }
    # The kernel removes the outer VLAN tag before a packet reaches the bond and its XDP program.
    [ $iface != bond0 ] || options="$options --untagged"
    captures=
    for capture in "$@"; do
        case $capture in
            *x[0-9]*) captures="$captures /captures/${capture%x*}.pcapx${capture##*x}" ;;
            *) captures="$captures /captures/$capture.pcap" ;;
        esac
    done
    if xfan-verify check --report /tmp/report --records /tmp/flows $options $captures >/tmp/verdict 2>&1; then
        ok "$name: $(cat /tmp/verdict)"
    elif deaf; then
        ok "$name: the driver receives nothing any more, and xfan says so"
    else
        fault "$name: $(cat /tmp/verdict)"
        drop_counters
    fi
}
# Prints where the guest's kernel and the NIC below $iface may have dropped packets.
drop_counters() {
    ip -s -s link show dev rx0
    ethtool -S rx0 2>/dev/null | grep -v ': 0$'
    [ $iface = rx0 ] || ip -s -s link show dev $iface
    peer ip -s -s link show dev tx0
    cat /proc/net/softnet_stat
}
# clean NAME: checks that xfan has left nothing behind, and that the interface works as before.
clean() {
    left=$(ip -d link show dev $iface | grep -o 'prog/xdp.*')
    left="$left$(ls /run/xfan 2>/dev/null)"
    left="$left$(pidof xfan xfan-flow)"
    left="$left$(ss --xdp 2>/dev/null | tail -n +2)"
    if [ -z "$left" ]; then ok "$1: nothing is left"; else fault "$1: left: $left"; fi
    carrier
    avoid_arp
    if peer ping -c 2 -W 5 -A -q 10.9.0.1 >/tmp/ping 2>&1; then
        ok "$1: the kernel has the interface again"
    else
        fault "$1: no ping: $(tail -n 2 /tmp/ping | tr '\n' ' ')"
    fi
}
