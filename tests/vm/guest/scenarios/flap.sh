# The link goes down and comes up while xfan runs.
if start; then
    carrier
    send mixed
    settle
    run ip link set dev $iface down
    sleep 2
    run ip link set dev $iface up
    carrier
    sleep 1
    send mixed 2
    stop "link down and up"
    check "link down and up" mixedx3
    clean "link down and up"
fi
