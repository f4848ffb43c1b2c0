"""Contents of a run folder, and reports about them."""
