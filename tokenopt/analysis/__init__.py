"""Read-only analyses of a Program: named axes, attention sites, cuts."""
