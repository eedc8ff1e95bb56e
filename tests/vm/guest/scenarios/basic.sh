# Start, mixed traffic, stop; then the same again.
for time in first second; do
    if start; then
        send mixed
        stop "$time run"
        check "$time run" mixed
        clean "$time run"
    fi
done
