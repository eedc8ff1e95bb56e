# Starts, sends mixed traffic, stops; then again, with a real capture if there is one.
real=
[ ! -f /captures/tcpreplay__test.pcap ] || real=tcpreplay__test
if start; then
    traffic "first run" mixed
    clean "first run"
fi
if start; then
    send mixed
    [ -z "$real" ] || send $real
    stop "second run"
    check "second run" mixed $real
    clean "second run"
fi
