"""The one exception that a user of the harness is meant to read."""


class SetupError(Exception):
    """The harness cannot start: `what` is missing or wrong, `cure` is what to do about it."""

    def __init__(self, what: str, cure: str) -> None:
        super().__init__(f"{what}\n  {cure}")
