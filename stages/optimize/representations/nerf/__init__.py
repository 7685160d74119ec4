"""The representation `nerf`: a radiance field for each particle.

`config` holds the settings, `field` the network of positions, and `volume` renders it along the rays of cameras.
"""
