# The primary is stopped (SIGSTOP) while packets arrive: some counter must have each lost packet.
overrun() {
    name="rx_ring = 64${1:+, $1}"
    if start_with 'rx_ring = 64' "$@"; then
        carrier
        kill -STOP $primary
        send mixed &
        sending=$!
        sleep 4
        kill -CONT $primary
        wait $sending
        sleep 3 # igb reads its counters every 2 s
        how=$(mode)
        stop "$name"
        case $vm_model:$how in
            igb:*zero-copy)
                skip "$name: QEMU's igb counts nowhere what it drops for a queue without buffers"
                ;;
            *zero-copy)
                # If the NIC has no buffers, QEMU queues the packets: none is lost.
                check "$name" mixed
                ;;
            *)
                check "$name" --losses mixed
                if grep -q 'counted lost 0;' /tmp/verdict; then
                    fault "$name: nothing was lost, so nothing was tested"
                fi
                ;;
        esac
    else
        fault "$name: it does not start, exit $code: $(tail -n 1 /tmp/log)"
    fi
    carrier
}
overrun
overrun 'bind_mode = "copy"'
overrun 'xdp_mode = "generic"'
clean "after overruns"
