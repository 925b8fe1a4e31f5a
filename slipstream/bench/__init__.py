"""What `slipstream bench` measures, one kind of measurement a file."""
