"""Everything kvsieve knows about `transformers`."""
