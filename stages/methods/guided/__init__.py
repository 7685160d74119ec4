"""Progressive distillation with the strength of guidance as an input (Meng et al. 2023, 2210.03142)."""
