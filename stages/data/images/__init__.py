"""Image sets: `digits` and `digit_scenes`, which are included, and the user's own files.

`config` holds their settings, and `load` reads all of them. `stages.latents` encodes images to latents.
"""
