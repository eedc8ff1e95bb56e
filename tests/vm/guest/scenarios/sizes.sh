# Frames of all sizes arrive whole.
start && traffic "all sizes" sizes
