"""A text corpus of 25 domains out of packages of Debian, PyPI and npm: see `bench.corpus.__main__`."""
