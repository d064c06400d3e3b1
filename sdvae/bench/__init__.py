"""Measurements: speed and memory against rivals, memory against predictions, single kernels against the roofline."""
