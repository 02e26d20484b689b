"""What every checkpoint must be made of before it counts, whoever sent it: pure checks, fed with bytes as they stream.

`architecture` is what a run's models look like, learned from its base model; `statistics` and `stream` read tensors in
bounded memory; `bounds` judges their sizes; `inspection` puts these together for one checkpoint. No database, no store,
no torch. Not covered: whether the weights are any good (somebody has to run them for that).
"""
