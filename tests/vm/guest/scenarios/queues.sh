# The number of queues changes while xfan runs.
if ! ethtool -l $iface 2>/dev/null | grep -q "^Combined:[^0-9]*$vm_queues\$"; then
    skip "$iface has no $vm_queues queues whose number can be set"
    return
fi
channels() { run ethtool -X $iface equal "$1" && run ethtool -L $iface combined "$1"; }
if start; then
    carrier
    send mixed
    if channels 2; then
        carrier
        sleep 2
        send mixed
        stop "4 queues, then 2"
        check "4 queues, then 2" mixedx2
    else
        stop "4 queues, then 2"
        check "4 queues, then 2" mixed
        skip "4 queues, then 2: the driver refuses it while xfan runs"
    fi
fi
ethtool -X $iface default
run ethtool -L $iface combined 2
ethtool -X $iface equal 2
if start; then
    carrier
    send mixed
    if run ethtool -L $iface combined 4 && run ethtool -X $iface equal 4; then
        carrier
        sleep 2
        if tail -n "+$((told + 1))" /tmp/log | grep -qE 'WARN.*queue'; then
            ok "2 queues, then 4: xfan says so"
        else
            fault "2 queues, then 4: xfan does not say that queues have no lane"
        fi
        send mixed
        stop "2 queues, then 4"
        # Packets of the new queues pass to the kernel, and are counted as passed.
        check "2 queues, then 4" --losses mixedx2
    else
        stop "2 queues, then 4"
        check "2 queues, then 4" mixed
        skip "2 queues, then 4: the driver refuses it while xfan runs"
    fi
fi
ethtool -L $iface combined "$vm_queues"
ethtool -X $iface equal "$vm_queues"
clean "the number of queues changed"
