"""What every pass and target stands on; names no pass and no target."""
