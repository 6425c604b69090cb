"""What keeps a coordinator's state folder in order: copies of it, and room on its disk."""
