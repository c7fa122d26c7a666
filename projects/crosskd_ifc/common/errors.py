"""What an error says, in one line."""


def said(error: BaseException) -> str:
    """The first line of what an error says; a KeyError would say the repr of its argument."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return (str(text).strip().splitlines() or [""])[0]


def one_line(error: BaseException) -> str:
    """Its type, and :func:`said`."""
    return f"{type(error).__name__} {said(error)}".strip()
