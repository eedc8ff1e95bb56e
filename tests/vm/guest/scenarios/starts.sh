# Starts xfan on an interface that is down, with large MTUs, and in each mode.
run ip link set dev $iface down
if start; then
    run ip link set dev $iface up
    traffic "down at the start" mixed
fi
run ip link set dev $iface up
carrier

# The largest MTU that fits a frame, and one more byte, for frames of 2048 and of 4096 bytes.
for mtu in 1766 1770 1771 3818 3819 9000; do
    if ! run ip link set dev $iface mtu $mtu; then
        skip "mtu $mtu: more than the driver can"
    elif try_start; then
        traffic "mtu $mtu" sizes
    else
        refused "mtu $mtu" 4 '[Mm][Tt][Uu]'
    fi
done
run ip link set dev $iface mtu 1500
carrier

if start_with 'frame_size = 4096'; then traffic "frames of 4096 bytes" sizes; else fault "frames of 4096 bytes: $(tail -n 1 /tmp/log)"; fi

# asked SETTING WORD MODELS: checks that with SETTING xfan runs in a mode that contains WORD on
# these models (`all`: on every model), and refuses to start on all others.
asked() {
    case " $3 " in
        *" $vm_model "* | " all ")
            if ! start_with "$1"; then
                fault "$1: it does not start, exit $code: $(tail -n 1 /tmp/log)"
            else
                case $(mode) in
                    *$2*) traffic "$1" sizes ;;
                    *) fault "$1: it runs as $(mode)"; stop "$1" ;;
                esac
            fi
            ;;
        *)
            if start_with "$1"; then
                fault "$1: it runs as $(mode), on a driver without"
                stop "$1"
            else
                refused "$1" "1 4" "$2"
            fi
            ;;
    esac
    carrier
}
asked 'bind_mode = "copy"' copy all
asked 'xdp_mode = "generic"' generic all
zero_copy=virtio-zc
case $(uname -r) in
    5.* | 6.1.* | 6.12.*) ;;
    *) zero_copy="$zero_copy igb" ;;
esac
[ "$vm_model" != bond ] || zero_copy=
asked 'bind_mode = "zero-copy"' zero-copy "$zero_copy"
clean "after all starts"
