"""Takes each defence out once, and sees a test of the adversary's fail: `python -m tests.undefended`."""
