"""Image files to upright sRGB arrays, (H, W, 3) uint8, and back to files."""
