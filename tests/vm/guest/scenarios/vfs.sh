# Virtual functions take queues from the NIC, so zero-copy may work for some of its queues only.
device=/sys/class/net/rx0/device
if ! [ -e $device/sriov_numvfs ]; then
    skip "rx0 has no virtual functions"
    return
fi
if ! run sh -c "echo 2 >$device/sriov_numvfs"; then
    skip "the driver makes no virtual functions here"
    return
fi
sleep 2
set_up_nic
carrier
run ethtool -l rx0
start && traffic "two virtual functions" mixed
run sh -c "echo 0 >$device/sriov_numvfs"
sleep 1
set_up_nic
carrier
clean "no virtual function is left"
