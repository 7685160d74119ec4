"""One-step regression on the teacher's pairs (Luhman and Luhman 2021, 2101.02388)."""
