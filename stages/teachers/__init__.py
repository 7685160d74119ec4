"""Where teachers come from: trained here, or adopted from a diffusers folder."""
