# The interface is renamed while xfan runs.
old=$iface new=other0
if start; then
    carrier
    send mixed
    if run ip link set dev $old name $new; then
        sleep 2
        send mixed
        stop "renamed"
        check "renamed" mixedx2
        iface=$new
        clean "renamed"
        ip link set dev $new name $old
        iface=$old
    else
        stop "not renamed"
        check "not renamed" mixed
        skip "this kernel does not rename an interface that is up"
    fi
fi
