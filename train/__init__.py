"""Experiments: configuration, training, evaluation, fusion. `python -m train.launch` is the door."""
