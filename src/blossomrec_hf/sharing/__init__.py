"""Cards, upload, export and conversion of checkpoints."""
