"""A user's images: folders, parquet files and datasets, checked and split, with labels or without."""
