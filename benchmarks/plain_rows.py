"""Rows without the `datasets` package: imported before mezo, it stands in for what mezo asks of a data set in memory.

Machines for measurements are often bare. Where the package is installed nothing happens.
"""

import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any


class Dataset:
    """A list of dicts with the part of `datasets.Dataset` that mezo uses."""

    def __init__(self, rows: Iterable[dict[str, Any]]):
        self._rows = list(rows)
        self.column_names = list(dict.fromkeys(name for row in self._rows for name in row))

    @classmethod
    def from_list(cls, rows: Sequence[dict[str, Any]]) -> "Dataset":
        return cls(rows)

    def select(self, indices: Iterable[int]) -> "Dataset":
        return Dataset(self._rows[i] for i in indices)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({name: row.get(name) for name in self.column_names} for row in self._rows)

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return [row.get(key) for row in self._rows]
        return {name: self._rows[key].get(name) for name in self.column_names}


def stand_in() -> None:
    """Puts the module in place if there is none."""
    if "datasets" in sys.modules or importlib.util.find_spec("datasets") is not None:
        return
    module, exceptions = ModuleType("datasets"), ModuleType("datasets.exceptions")

    def load_dataset(*_: object, **__: object) -> None:
        raise OSError("the datasets package is not installed")

    class Other:
        pass

    module.__dict__.update(Dataset=Dataset, DatasetDict=Other, IterableDataset=Other, load_dataset=load_dataset)
    exceptions.__dict__.update(DatasetsError=OSError)
    module.__dict__.update(exceptions=exceptions, __version__="stand-in", __spec__=None)
    sys.modules |= {"datasets": module, "datasets.exceptions": exceptions}


stand_in()
