"""Archives that hold clips: tar shards, HDF5, Arrow and Parquet."""
