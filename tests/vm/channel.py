"""Takes apart what comes out of the guest: the command's output, and marks where it starts and ends."""


class Channel:
    """The stream from one guest. A mark is a line `NUL token words`, anywhere in it."""

    def __init__(self, token: str) -> None:
        self.started = False
        self.status: int | None = None
        self._mark = f"\0{token} ".encode()
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Take a piece of the stream, return what of it the command printed."""
        self._held += data
        printed = b""
        while True:
            text, mark, rest = self._held.partition(self._mark)
            words, newline, after = rest.partition(b"\n")
            if not newline:
                break
            printed += self._release(text)
            self._take(words.decode())
            self._held = after
        whole = len(text) if mark else len(self._held) - self._unfinished_mark()
        printed += self._release(self._held[:whole])
        self._held = self._held[whole:]
        return printed

    def _release(self, text: bytes) -> bytes:
        return text if self.started and self.status is None else b""

    def _take(self, words: str) -> None:
        if words == "started":
            self.started = True
        else:
            self.status = int(words.removeprefix("exited "))

    def _unfinished_mark(self) -> int:
        """How many bytes at the end may be the beginning of a mark."""
        start = self._held.rfind(b"\0")
        tail = self._held[start:] if start >= 0 else b""
        return len(tail) if self._mark.startswith(tail) else 0
