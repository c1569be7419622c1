"""The tiny world, and what a run without files trains on."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall where cores are shared
