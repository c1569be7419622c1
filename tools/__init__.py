"""Programs to look and to talk: `python -m tools.chat`, explain, report, plots, merge, export,
doctor."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall where cores are shared
