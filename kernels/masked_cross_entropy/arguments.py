"""Arguments that more than one kernel leaves unspecialised, so that a new number of rows compiles none again."""

# One number a row or fewer: whether they begin at 16 bytes, which follows from the number of rows, gains nothing.
OF_ROWS = ["p_targets", "p_weights", "p_index", "p_count", "p_losses", "p_correct"]
