"""Proofs that a rewritten program is right beside being fast: at the real schedule, and in what it may depend on."""
