# Reads the report of xfan-replay, the totals that xfan run printed, and xfan-flow's records. Prints
# whether every packet is accounted for, and exits with 1 if not.

function number(key) {
    if (!match($0, "\"" key "\":[0-9]+")) return 0
    return substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3) + 0
}

# The number that follows a word of the totals.
function after(word) {
    if (!match($0, word " [0-9]+")) return 0
    return substr($0, RSTART + length(word) + 1, RLENGTH - length(word) - 1) + 0
}

FILENAME == ARGV[1] { sent += number("packets"); next }
FILENAME == ARGV[2] && $1 == "xdp" { passed = after("passed") }
FILENAME == ARGV[2] && $1 == "kernel" { kernel = after("dropped") + after("RX ring full") }
FILENAME == ARGV[2] && $1 == "packets" { received = after("received"); dropped = after("dropped") }
FILENAME == ARGV[2] && $1 == "packets_unparsed" { unparsed += $2 }
FILENAME == ARGV[2] && $1 == "member" { members = 1 }
FILENAME == ARGV[2] && members && $1 ~ /\// { lost += $8 }
FILENAME == ARGV[2] { next }
{ flows++; recorded += number("packets") }

END {
    sum = passed + recorded + unparsed + dropped + kernel + lost
    good = sent > 0 && sum == sent
    printf "%s: %d packets sent %s %d left to the kernel + %d in %d flow records + %d of no flow + %d dropped\n", \
        good ? "OK" : "FAILED", sent, good ? "=" : "is not", passed, recorded, flows, unparsed, dropped + kernel + lost
    exit !good
}
