"""Triplets of a reference and two distorted images, with a judgement of which is closer: BAPPS, or synthetic triplets.

`config` holds their settings. `stages.perceptual` trains on them.
"""
