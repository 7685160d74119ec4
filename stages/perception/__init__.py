"""What `kind: perceptual` does: a trunk that classifies, heads that agree with judgements, and a test of both."""
