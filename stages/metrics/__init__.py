"""Metrics of sets of images or features: Fréchet and kernel distance, precision, recall, diversity, and the accuracy of
two-alternative forced choice.

The functions take arrays and do not depend on stages. Losses for training are in `stages.losses`.
"""
