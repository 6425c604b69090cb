"""What a delivered model keeps of the trained one, and how fast it answers."""
