"""What runs inside of a layer: attention, rotations, recurrences, MLPs, and what is kept for the backward."""
