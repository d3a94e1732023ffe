"""What can go wrong with an index that is not simply a wrong argument."""


class DocumentIndexError(Exception):
    """An index could not do what was asked; the base of the errors below."""


class IndexMismatchError(DocumentIndexError, ValueError):
    """The vectors, or the encoder they come from, do not belong to this index."""


class IndexMissingError(DocumentIndexError, FileNotFoundError):
    """There is no index where one should be opened."""


class IndexLockedError(DocumentIndexError):
    """Another writer holds the index."""


class IndexDamagedError(DocumentIndexError):
    """The database of an index cannot be read, in whole or in part."""
