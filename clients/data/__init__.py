"""A node's data: data sets, partitioners, features."""
