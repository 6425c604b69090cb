"""The same task, digits, in each framework: one file each."""
