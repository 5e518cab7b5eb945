"""From cached features to a student: refiners, targets, the loop, the folder of a run."""
