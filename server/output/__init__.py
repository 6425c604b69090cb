"""What a run leaves behind and shows: directory, progress, report."""
