"""Every error kvsieve raises on purpose. Each also inherits the builtin a user would catch."""

from __future__ import annotations

__all__ = [
    "AccuracyError",
    "ArgumentError",
    "BackendError",
    "BankError",
    "BenchError",
    "BudgetError",
    "CacheMismatchError",
    "KvsieveError",
    "PaddingError",
    "PolicyError",
    "PromptTooLongError",
    "RangeError",
    "RecordingError",
    "SaveError",
    "ServiceBusyError",
    "ServiceClosedError",
    "ServiceError",
    "ServiceFullError",
    "SessionError",
    "SessionNotFoundError",
    "ShapeError",
    "StateError",
    "TierDamagedError",
    "TierError",
    "TierFullError",
    "UnsupportedError",
    "UnsupportedModelError",
]


class KvsieveError(Exception):
    """Base of every error that kvsieve raises on purpose."""


class ArgumentError(KvsieveError, TypeError, ValueError):
    """An argument that the call cannot mean: a flag that is no bool, a count that is no int, a path that is none."""


class PolicyError(KvsieveError, ValueError):
    """A policy's parameters, or a combination of policies, that cannot be right."""


class BudgetError(PolicyError):
    """A budget that is zero, negative, unreadable, or too small for the sinks and recent tokens."""


class RangeError(KvsieveError, ValueError):
    """A range of tokens, a row, a layer or a token id that is none: negative, reversed, empty, or past the end."""


class PaddingError(KvsieveError, ValueError):
    """An attention mask that is not left padding: right padding, holes, or a row of pads only."""


class ShapeError(KvsieveError, ValueError):
    """A tensor whose shape, dtype or device is not what the cache holds."""


class CacheMismatchError(KvsieveError, ValueError):
    """A cache used with another model, another batch, or past its end."""


class SessionError(CacheMismatchError):
    """A file that is no session file, or a damaged one, or one of another format. Nothing of it was used."""


class SessionNotFoundError(SessionError, FileNotFoundError):
    """There is no session file of that name."""


class SaveError(KvsieveError, OSError):
    """A file that cannot be written: the disk is full or fails, or what is there is no regular file. What was there before is as it
    was."""


class StateError(KvsieveError, RuntimeError):
    """A call at the wrong moment: a closed stream, a step that was never opened."""


class TierError(KvsieveError, OSError):
    """The file of a stream's blocks cannot be made, read or written. Blocks that were not written stay in memory."""


class TierFullError(TierError):
    """No space is left for a stream's blocks in their file. They stay in memory, and the stream goes on once there is space."""


class TierDamagedError(TierError):
    """A block in a stream's file is not what was written there."""


class BackendError(KvsieveError, RuntimeError):
    """A backend that cannot run here, or cannot hold or follow what a policy, a model or a call asks for, as ``cuda`` a selection
    over compressed tokens; the message says what to install, or what to use instead."""


class BankError(KvsieveError, OSError):
    """A bank's file that cannot be read, written or locked; what was saved before is as it was."""


class RecordingError(KvsieveError, ValueError):
    """A file that is no recording of a stream, is damaged, has another version, or holds nothing."""


class UnsupportedError(KvsieveError, NotImplementedError):
    """Something that is well defined but not supported; the message says what to use instead."""


class UnsupportedModelError(UnsupportedError):
    """A model whose attention kvsieve cannot serve; the message names the reason."""


class BenchError(KvsieveError, ValueError):
    """A measurement that cannot be made as asked: an unreadable shape, an unknown dtype, a length or a count that is too small."""


class AccuracyError(KvsieveError, ArithmeticError):
    """An answer that is further from float64 than it may be. What is wrong is not worth measuring."""


class ServiceError(KvsieveError, RuntimeError):
    """A request that a service did not answer."""


class ServiceBusyError(ServiceError):
    """As many requests wait as may; this one was not taken. Try again later."""


class ServiceClosedError(ServiceError):
    """The service is closing, closed, or was not started."""


class ServiceFullError(ServiceError, MemoryError):
    """A conversation, together with those that are being answered, needs more memory than the service may hold."""


class PromptTooLongError(ServiceError, ValueError):
    """A prompt, with the answer that is asked for, has more tokens than the service takes."""
