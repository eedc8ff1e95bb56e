# Runs the end-to-end tests and scripts/quickstart on this kernel.
programs=$(cat /vm/programs)
checkout=$(cat /vm/checkout)
cd "$checkout" || return
# Some tests open /dev/net/tun, and tests that run at once must not load veth at once.
modprobe tun
modprobe veth
# Namespaces have no interfaces but those that a test makes in them.
sysctl -qw net.core.fb_tunnels_only_for_init_net=1
export XFAN_REQUIRE_E2E=1 RUST_BACKTRACE=0 TMPDIR=/tmp

# Tests that take a quarter of an hour or more in the guest.
too_long=membership::ten_thousand_joins_leave_nothing_behind

# unable EXECUTABLE: prints why it cannot run in the guest; nothing if it can.
unable() {
    case $1 in
        capi-* | header-* | own_worker-*) echo "it needs a compiler, and the guest has none" ;;
    esac
}

while read -r executable; do
    name=$(basename "$executable")
    why=$(unable "$name")
    name=${name%-*}
    if [ -n "$why" ]; then
        skip "$name: $why"
        continue
    fi
    say "$name"
    for test in $too_long; do
        case $test in $name::*) skip "$test: a guest without KVM is too slow for it" ;; esac
    done
    # shellcheck disable=SC2086 # one word for each test
    $executable --test-threads 2 $(printf -- '--skip %s ' $too_long | sed 's/[a-z]*:://g') >/tmp/output 2>&1 </dev/null
    status=$?
    sed -n 's/^test \(.*\) \.\.\. ok$/ok e2e: '"$name"'::\1/p' /tmp/output
    sed -n 's/^test \(.*\) \.\.\. ignored,* *\(.*\)$/skip e2e: '"$name"'::\1: ignored \2/p' /tmp/output
    sed -n 's/^test \(.*\) \.\.\. FAILED$/FAIL e2e: '"$name"'::\1/p' /tmp/output
    grep -q '^test result:' /tmp/output || fault "$name ended early, with $status"
    [ $status = 0 ] || grep -v '\.\.\. ok$' /tmp/output | sed 's/^/  | /'
done </vm/tests

say quickstart
if XFAN_PROGRAMS=$programs bash scripts/quickstart </dev/null >/tmp/output 2>&1; then
    ok "quickstart: $(tail -n 1 /tmp/output)"
else
    fault "quickstart: $(tail -n 1 /tmp/output)"
fi
sed 's/^/  | /' /tmp/output
