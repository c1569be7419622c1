"""The tiny world, and what a run without files trains on."""
