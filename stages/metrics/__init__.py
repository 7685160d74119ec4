"""Distances between sets: Fréchet and kernel distance, precision, recall, diversity, and two-alternative forced choice.

They take arrays and know no stage. Losses for training are in `stages.losses`.
"""
