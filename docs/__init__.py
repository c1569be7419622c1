"""Documentation: one page answers one question; architecture.py draws its figure."""
