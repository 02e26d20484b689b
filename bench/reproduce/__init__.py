"""The study of whether the method works here: experts against a dense model that saw as many training tokens.

Everything is trained through a real coordinator by real workers. `python -m bench.reproduce --help`.
"""
