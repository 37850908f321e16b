"""The user's data as a `Dataset` of model inputs: from folders of images, array files, and what Python can iterate."""

from tokenopt.data.dataset import Batch, Dataset, find_preprocessing, open_data
from tokenopt.data.preprocessing import Preprocessing

__all__ = ["Batch", "Dataset", "Preprocessing", "find_preprocessing", "open_data"]
