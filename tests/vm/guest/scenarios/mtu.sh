# The MTU is raised while xfan runs, and packets arrive that do not fit a frame.
peer ip link set dev tx0 mtu 3000
if start; then
    carrier
    send mixed
    if run ip link set dev $iface mtu 3000; then
        carrier
        sleep 2
        if tail -n "+$((told + 1))" /tmp/log | grep -qE 'WARN.*(MTU|mtu)'; then
            ok "mtu 3000: xfan says so"
        else
            fault "mtu 3000: xfan does not say that large packets will be lost"
        fi
        send jumbo
        send mixed 2
        stop "mtu 3000"
        check "mtu 3000" --losses mixedx3 jumbo
    else
        skip "mtu 3000: the driver refuses it while xfan runs"
        stop "mtu 1500"
        check "mtu 1500" mixed
    fi
fi
run ip link set dev $iface mtu 1500
peer ip link set dev tx0 mtu 1500
carrier
