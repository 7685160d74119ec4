"""Pages and figures made of sealed artifacts: comparisons of evaluations, samples of datasets, images on demand.

Nothing here is a stage, and nothing here is ever sealed. An evaluation's own page is in `stages.evaluate`.
"""
