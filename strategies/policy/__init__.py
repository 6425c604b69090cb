"""What a node's owner allows: the keys of the file, how it is read, what follows from it."""
