"""What every room stands on: errors, options, records, the app folder, the adapter to Flower."""
