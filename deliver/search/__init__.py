"""The search for better options, and what it costs."""
