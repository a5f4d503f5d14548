"""Command lines. Hydra lives here and only here."""
