# Frames of all sizes must arrive complete.
start && traffic "all sizes" sizes
