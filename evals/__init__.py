"""Other evaluations than asking POPE's questions, and scores of answers that exist already."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall where cores are shared
