"""Methods of early exit side by side, on one model and one set of rows."""
