"""Programs to look and to talk: `python -m tools.chat`, explain, report, plots, mine, merge,
export, doctor."""
