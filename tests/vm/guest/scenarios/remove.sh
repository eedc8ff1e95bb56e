# The device is removed while xfan runs, and comes back.
[ "$vm_model" != bond ] || { skip "a bond is no device"; return; }
device=$(readlink -f /sys/class/net/$iface/device)
case $device in */virtio*) device=${device%/virtio*} ;; esac
if start; then
    carrier
    send mixed
    settle
    echo 1 >"$device/remove"
    until_true 200 ended && said= || said="it goes on for 20 s"
    [ -z "$said" ] || kill -TERM $primary
    wait_primary
    told
    cat /tmp/totals
    [ $code != 0 ] || said="it ended with 0"
    tail -n 1 /tmp/log | grep -qE "$iface.*(gone|removed|vanished)" ||
        said="$said; it does not say that $iface is gone: $(tail -n 1 /tmp/log)"
    if [ -z "$said" ]; then ok "removed: exit $code: $(tail -n 1 /tmp/log)"; else fault "removed: $said"; fi
    check "removed" mixed
    left=$(pidof xfan xfan-flow)
    [ -z "$left" ] || fault "removed: processes left: $left"
    echo 1 >/sys/bus/pci/rescan
    sleep 2
    name_interface $receiver_mac rx0
    set_up_nic
    ip addr add 10.9.0.1/24 dev rx0
    if start; then
        traffic "back again" mixed
        clean "back again"
    fi
fi
