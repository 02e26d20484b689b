"""Before a run: how many clusters, which seed phase, how many steps, by what was measured."""
