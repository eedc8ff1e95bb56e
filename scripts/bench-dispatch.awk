# Prints medians of the output of `xfan-bench dispatch --json`. Each line begins with the number of
# workers and the CPUs.

function figure(name) {
    if (!match($0, "\"" name "\":[-0-9.e]+")) return 0
    return substr($0, RSTART + length(name) + 3, RLENGTH - length(name) - 3) + 0
}

# Sorts the figures of a variant and returns the quantile `part`, from 0 (least) to 1 (most).
function at(variant, name, part,    n, i, j, value, sorted) {
    n = rounds[variant]
    for (i = 0; i < n; i++) {
        value = figures[variant, name, i]
        for (j = i; j > 0 && sorted[j - 1] > value; j--) sorted[j] = sorted[j - 1]
        sorted[j] = value
    }
    return sorted[int((n - 1) * part + 0.5)]
}

{
    variant = $1 " " $2
    if (!(variant in rounds)) order[++variants] = variant
    round = rounds[variant]++ + 0
    figures[variant, "mpps", round] = figure("mpps")
    figures[variant, "lane", round] = figure("lane_busy_ns")
    figures[variant, "worker", round] = figure("worker_busy_ns")
    lost[variant] += figure("lost")
    match($0, /"line_rtt_ns":\[[^]]*/)
    split(substr($0, RSTART + 15, RLENGTH - 15), line, ",")
    figures[variant, "line", round] = (line[1] + line[2]) / 2
}

END {
    print "workers  CPUs   Mpps (least to most)      busy ns per packet   line ns  lost"
    print "         used                             lane     workers"
    for (i = 1; i <= variants; i++) {
        v = order[i]
        split(v, name, " ")
        rate = sprintf("%.1f (%.1f to %.1f)", at(v, "mpps", 0.5), at(v, "mpps", 0), at(v, "mpps", 1))
        printf "%-8s %-6s %-25s %-8.2f %-11.2f %-8.0f %d\n", name[1], name[2], rate, \
            at(v, "lane", 0.5), at(v, "worker", 0.5), at(v, "line", 0.5), lost[v]
    }
}
