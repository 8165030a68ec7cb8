"""Data sets as WebDataset shards with an index: writing, finding, random access, order, loading."""
