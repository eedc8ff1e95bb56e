# Runs the guest in QEMU without KVM, and makes the network around it. Sourced.
#
#   rx0, under test ── hub, or bridge between taps ── tx0, which sends
#
# Only virtio has several queues, which need taps: the taps and a bridge are in the test's own
# namespace. The other models are connected by a hub within QEMU.

readonly queues=4
readonly receiver_mac=52:54:00:00:00:01 sender_mac=52:54:00:00:00:02

# model_device MODEL: prints the QEMU device of the interface under test.
model_device() {
    local virtio="virtio-net-pci,mq=on,vectors=$((2 * queues + 2)),rss=on,hash=on,host_mtu=9000"
    case $1 in
        virtio | virtio-numa | bond | e2e) echo "$virtio" ;;
        # The driver has zero-copy only if the device uses the DMA API.
        virtio-zc) echo "$virtio,iommu_platform=on" ;;
        igb | e1000e | vmxnet3) echo "$1" ;;
        *) return 1 ;;
    esac
}

make_network() {
    namespace=xfan-vm-$$
    ip netns add "$namespace"
    inside sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1
    # The bridge floods all frames, and consumes none itself (no snooping, no STP).
    inside ip link add br0 type bridge mcast_snooping 0 stp_state 0
    # The setting does not exist without br_netfilter.
    inside sysctl -qw net.bridge.bridge-nf-call-iptables=0 2>/dev/null || true
    inside ip tuntap add dev rx0 mode tap multi_queue
    inside ip tuntap add dev tx0 mode tap
    local tap
    for tap in rx0 tx0; do
        # Packets that the guest has no buffers for wait in the tap's queue, as in QEMU's hubs. If
        # the tap dropped them, the guest could not count them.
        inside ip link set dev "$tap" mtu 9000 txqueuelen 10000 master br0
        inside ip link set dev "$tap" type bridge_slave learning off
        inside ip link set dev "$tap" up
    done
    inside ip link set br0 up
}

inside() { ip netns exec "$namespace" "$@"; }

# The time that a boot may take until the first scenario begins (some 10 s on an idle machine), and
# the most attempts.
readonly boot_seconds=120 boots=5

# Periodic ticks: under TCG a CPU sometimes misses an interrupt. After a missed one-shot timer it has
# no timers any more, and what sleeps on it sleeps for ever; after a missed tick comes the next.
# The watchdog would mark the TSC unstable because of the emulator's pauses, and the HPET is slow.
readonly clock="nohz=off highres=off tsc=nowatchdog"

# run_guest KERNEL MODEL INITRAMFS SECONDS LOG WORDS...: adds WORDS to the guest's kernel command
# line. The output of the tests goes to LOG, the kernel's console to the same path with the
# extension .console. Sometimes a guest's first process never starts, or `ip` waits in the kernel
# for ever, since the emulator has lost an interrupt. The function then boots the guest again, but
# only before the first scenario, when no part of xfan has run yet.
run_guest() {
    local boot status=0
    for boot in $(seq $boots); do
        : >"$5"
        boot_guest "$@"
        status=0
        watch_boot "$5" &
        local watcher=$!
        wait "$guest" || status=$?
        kill "$watcher" 2>/dev/null || true
        wait "$watcher" 2>/dev/null || true
        guest=''
        ! has_begun "$5" || break
        say "boot $boot of $boots did not reach the first scenario within $boot_seconds s"
    done
    return "$status"
}

# has_begun LOG: whether the first scenario has begun.
has_begun() { grep -q "^== scenario" "$1"; }

# watch_boot LOG: kills the guest if its scenarios do not begin in time.
watch_boot() {
    sleep $boot_seconds &
    trap "kill $! 2>/dev/null; exit" TERM
    wait $!
    has_begun "$1" || kill "$guest"
}

boot_guest() {
    local kernel=$root/target/vm/kernels/$1 model=$2 initramfs=$3 seconds=$4 log=$5
    shift 5
    local port=pcie.0 network=() sender=virtio-net-pci,csum=off,guest_csum=off,host_mtu=9000 numa=()
    if [ "$model" = virtio-numa ]; then
        numa=(
            -object memory-backend-ram,id=near,size=$((memory / 2))M -numa node,nodeid=0,cpus=0-1,memdev=near
            -object memory-backend-ram,id=far,size=$((memory / 2))M -numa node,nodeid=1,cpus=2-3,memdev=far
            -numa dist,src=0,dst=1,val=20
            -device pxb-pcie,id=far-bus,bus=pcie.0,bus_nr=0x40,numa_node=1
        )
        port=far-bus
    fi
    case $model in
        virtio* | bond | e2e)
            network=(
                -netdev "tap,id=rx0,ifname=rx0,queues=$queues,script=no,downscript=no,vhost=off"
                -netdev "tap,id=tx0,ifname=tx0,script=no,downscript=no,vhost=off"
            )
            ;;
        *) network=(-netdev hubport,id=rx0,hubid=0 -netdev hubport,id=tx0,hubid=0) ;;
    esac
    # Start the command directly, not through the function `inside`: $! must be its process, which
    # gets the signal.
    ip netns exec "$namespace" timeout --kill-after=5 "$seconds" qemu-system-x86_64 \
        -machine q35 -accel tcg,thread=multi -cpu max,la57=off -smp "$cpus${numa[0]:+,sockets=2}" -m "${memory}M" "${numa[@]}" \
        -nodefaults -no-user-config -no-reboot -display none \
        -device "pcie-root-port,id=port0,bus=$port,chassis=7,slot=7" \
        "${network[@]}" \
        -device "$(model_device "$model"),bus=port0,netdev=rx0,mac=$receiver_mac,romfile=" \
        -device "$sender,bus=pcie.0,netdev=tx0,mac=$sender_mac,romfile=" \
        -serial "file:${log%.log}.console" -serial "file:$log" \
        -kernel "$kernel/vmlinuz" -initrd "$initramfs" \
        -append "console=ttyS0 loglevel=5 panic=-1 mitigations=off net.ifnames=0 $clock vm.model=$model vm.queues=$queues $*" \
        </dev/null 2>"${log%.log}.qemu" &
    guest=$!
}
