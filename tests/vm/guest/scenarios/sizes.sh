# Frames of all sizes arrive whole.
if start; then
    send sizes
    stop sizes
    check sizes sizes
fi
