"""Names of the families of distortions of synthetic triplets. Imports no NumPy."""

from typing import Literal, get_args

Family = Literal["blur", "noise", "warp", "shift", "colour", "compression"]
FAMILIES: tuple[Family, ...] = get_args(Family)
