"""A model made small: pruned, factored, distilled, rounded."""
