"""Calibration: the schedule that keeps most of a model's behaviour within a budget, fitted to data."""

from tokenopt.calibration.fitter import calibrate, candidates, fit
from tokenopt.calibration.price import Target, gate
from tokenopt.calibration.problem import LAYERWISE, Evaluation, Problem, cache_folder, places
from tokenopt.calibration.result import Calibration
from tokenopt.calibration.search import Calibrator, Search
from tokenopt.calibration.strategies import DecayCurve, ExitLayer, Stages, Thresholds
from tokenopt.calibration.workers import named_workers

__all__ = [
    "LAYERWISE", "Calibration", "Calibrator", "DecayCurve", "Evaluation", "ExitLayer", "Problem", "Search", "Stages",
    "Target", "Thresholds", "cache_folder", "calibrate", "candidates", "fit", "gate", "named_workers", "places",
]  # fmt: skip
