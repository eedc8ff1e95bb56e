# The primary gets no CPU while packets come: each packet that is lost is in some counter.
overrun() {
    name="overrun, $*"
    if start_with 'rx_ring = 64' "$@"; then
        carrier
        kill -STOP $primary
        send mixed
        kill -CONT $primary
        sleep 3 # igb reads its counters every 2 s
        stop "$name"
        check "$name" --losses mixed
        if grep -q 'counted lost 0;' /tmp/verdict; then fault "$name: nothing was lost, so nothing was tested"; fi
    else
        fault "$name: it does not start, exit $code: $(tail -n 1 /tmp/log)"
    fi
    carrier
}
overrun
overrun 'bind_mode = "copy"'
overrun 'xdp_mode = "generic"'
clean "after overruns"
