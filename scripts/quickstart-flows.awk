# Reads xfan-flow's records, one JSON object per line. Prints the totals of each worker and its
# first three flows.

function text(key) {
    if (!match($0, "\"" key "\":\"[^\"]*\"")) return ""
    return substr($0, RSTART + length(key) + 4, RLENGTH - length(key) - 5)
}

function number(key) {
    if (!match($0, "\"" key "\":[0-9]+")) return 0
    return substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3) + 0
}

{
    member = text("member")
    if (!(member in flows)) order[++members] = member
    flows[member]++
    packets[member] += number("packets")
    bytes[member] += number("bytes")
    if (flows[member] <= 3)
        sample[++samples] = sprintf("%-10s  %s  %s %s:%d - %s:%d, %d packets", member, text("community_id"), \
            text("proto"), text("src"), number("sport"), text("dst"), number("dport"), number("packets"))
}

END {
    printf "%-10s %8s %10s %14s\n", "member", "flows", "packets", "bytes"
    for (n = 1; n <= members; n++)
        printf "%-10s %8d %10d %14d\n", order[n], flows[order[n]], packets[order[n]], bytes[order[n]]
    print ""
    for (n = 1; n <= samples; n++) print sample[n]
}
