"""Shards to tensors on the device: which sample is a pure function, how it becomes a tensor is one DALI graph."""
