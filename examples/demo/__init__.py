"""The main job, end to end, on the corpus of this repository: `python -m examples.demo --out demo-out`."""
