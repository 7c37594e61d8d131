"""Errors that a user can mend; the command line prints them as one line. All others are bugs and show a traceback."""


class UserError(ValueError):
    """Input or options that cannot work; the message names the option, the value and the mend."""


class JournalError(UserError):
    """A journal that cannot be read, or that belongs to another run or model."""


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the weights are those of the last good step."""


class EngineError(RuntimeError):
    """An engine outside this process failed or refused; the journal and everything saved are intact."""


_OUT_OF_MEMORY = ("allocate memory", "STATUS_ALLOC_FAILED", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or, where PyTorch raises a plain RuntimeError, on a CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY))
    )
