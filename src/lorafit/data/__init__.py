"""Rows in, trainable documents out: reading, chat rendering, packing, preview."""
