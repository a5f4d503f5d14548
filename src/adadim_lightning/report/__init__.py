"""Pictures and reports, made from what a run wrote."""
