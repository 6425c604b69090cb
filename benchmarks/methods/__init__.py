"""Methods side by side: over seeds, and over how unlike the nodes are."""
