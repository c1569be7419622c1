"""Programs to look and to talk: `python -m tools.chat`, explain, report, plots, merge, export,
doctor."""
