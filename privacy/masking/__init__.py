"""The mathematics of secure sums: keys, masks, shares, graphs."""
