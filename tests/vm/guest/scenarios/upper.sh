# Interfaces on top of the NIC: a VLAN, a bond, a bridge.
[ "$vm_model" != bond ] || { skip "rx0 is in a bond already"; return; }
# either NAME CAPTURE [BELOW]: xfan must receive all packets on the interface, and report the counters
# of the interface below it, or refuse it and say why.
either() {
    if ! try_start; then
        refused "$1" "1 4 5" "$iface"
        return
    fi
    traffic "$1" "$2"
    [ -n "$3" ] || return 0
    if grep -q "\"below\":{[^}]*\"$3\":{\"interface\"" /tmp/report; then
        ok "$1: the counters of $3 are reported"
    else
        fault "$1: the counters of $3 are not reported"
    fi
}
run ip link add link rx0 name rx0.7 type vlan id 7
run ip link set dev rx0.7 up
peer ip link add link tx0 name tx0.7 type vlan id 7
peer ip link set dev tx0.7 up
start && traffic "the NIC, with a VLAN on it" mixed
iface=rx0.7 sender=tx0.7
carrier
either "the VLAN" mixed rx0
iface=rx0 sender=tx0
ip link del rx0.7
peer ip link del tx0.7

modprobe bonding max_bonds=0
make_bond
iface=bond0
carrier
either "a bond" mixed rx0
iface=rx0
either "a bond's port" mixed
ip link set dev rx0 nomaster
ip link del bond0
set_up_nic
carrier

run ip link add br0 type bridge
ip link set dev br0 up
run ip link set dev rx0 master br0
start && traffic "a bridge's port" mixed
ip link del br0
clean "after all interfaces on top"
