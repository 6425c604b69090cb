"""Rules that make one result of a round's contributions, a file each."""
