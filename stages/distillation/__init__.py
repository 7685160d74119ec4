"""What `kind: distill` does: train a method's student, try it on the pairs held out, export it with its card."""
