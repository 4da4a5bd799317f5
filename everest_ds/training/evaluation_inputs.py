"""The inputs that only the test of a classifier reads, checked before its training, which takes days.

After training they could no longer be changed, because they belong to the run's config.
"""

from __future__ import annotations

from everest_ds.config import Experiment
from everest_ds.data.video_list import read_class_names
from everest_ds.errors import ConfigError, DataError


def class_names(config: Experiment) -> list[str]:
    """Return the class names from `data.class_names`; without that file, the class indices as text.

    Raises:
        DataError: if the file does not exist or is no list of names.
        ConfigError: if the number of names is not model.num_classes.
    """
    file, count = config.data.class_names, config.model.num_classes or 0
    if file is None:
        return [str(label) for label in range(count)]
    if not file.is_file():
        raise DataError("data.class_names: no such file", given=str(file.absolute()))
    names = read_class_names(file)
    if len(names) != count:
        raise ConfigError(
            f"{file}: the number of names differs from model.num_classes",
            given=f"{len(names)} names",
            allowed=f"{count} names, one per line",
        )
    return names


def check_evaluation_inputs(config: Experiment, planned: bool = False) -> None:
    """Check what `evaluate` will read after this run: the class names, and the manifest of the test videos.

    Args:
        config: config of the run.
        planned: True if the files need not exist yet.

    Raises:
        DataError: if a file does not exist.
        ConfigError: if the number of names is not model.num_classes.
    """
    data = config.data
    if config.task == "pretrain":
        return
    if data.test is not None and not planned and not data.test.is_file():
        raise DataError(
            "data.test: no such manifest",
            given=str(data.test.absolute()),
            fix="create it, or leave the run without a test: data.test=null",
        )
    if not planned or (data.class_names is not None and data.class_names.is_file()):
        class_names(config)
