"""A node's data where they lie: Parquet, CSV, Arrow, folders of images; here or in a store."""
