"""Examples that run: the demo, and the corpus that it uses."""
