"""What stops a training run."""


class TrainingError(Exception):
    """Training cannot go on; the message says what to change."""


class OutOfMemory(TrainingError):
    """The memory of this rank alone; the others do not know of it."""
