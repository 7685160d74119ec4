"""Image sets: `digits` and `digit_scenes`, which are embedded, and your own files.

`config` holds their settings, `load` reads any of them. Encoding images to latents is in `stages.latents`.
"""
