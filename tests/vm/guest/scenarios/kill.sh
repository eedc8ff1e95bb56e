# The primary is killed; the next one starts right after.
if start; then
    carrier
    send mixed
    kill -KILL $primary
    wait_primary
    if ip -d link show dev $iface | grep -q prog/xdp; then fault "the XDP program outlives the primary"; fi
    if start; then
        traffic "after SIGKILL" mixed
        clean "after SIGKILL"
    fi
fi
