"""Calibration: the schedule that keeps most of a model's behaviour within a budget, fitted to data."""

from tokenopt.calibration.fit import Calibration, Calibrator, Search, calibrate, fit
from tokenopt.calibration.problem import Evaluation, Problem, cache_folder

__all__ = ["Calibration", "Calibrator", "Evaluation", "Problem", "Search", "cache_folder", "calibrate", "fit"]
