"""Triplets of a reference and two distorted images, with a judgement of which is closer: BAPPS, or synthetic ones.

`config` holds their settings. Training on them is in `stages.perceptual`.
"""
