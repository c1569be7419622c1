"""Other people's files and ours: loading, saving, public layouts, vision towers."""
