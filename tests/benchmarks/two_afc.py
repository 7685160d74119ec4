"""Does a calibrated network side with the weaker distortion, also in families that its heads never saw?

    python -m tests.benchmarks.two_afc PERCEPTUAL [--steps 400] [--threads 1]

PERCEPTUAL is the folder of a sealed `perceptual` artifact with synthetic triplets. Its trunk is kept; for each of the
six families the heads are calibrated anew on the other five, and tested on that one, on held-out images. Prints, in
Markdown, the scores of two-alternative forced choice of the network, of the mean squared error in its space, and of
the same heads on the untrained trunk, and the paired differences with their standard errors.
"""

from __future__ import annotations

if __name__ == "__main__":
    pass
