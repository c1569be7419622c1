"""Progress bars where stderr is no terminal: a line now and then, and no carriage returns.

    tqdm(rows, "reading", **in_a_log_file())        # reading: 1200 of 5000, 00:30 gone, 01:35 left
"""
import sys

SECONDS = 30                    # between two lines
LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}"


class LogFile:
    """stderr for tqdm: each state of a bar is a line, and an erased bar is none."""

    def write(self, text):
        line = text.strip("\r\n ")
        sys.stderr.write(f"{line}\n" if line else "")

    def flush(self):
        sys.stderr.flush()


def in_a_log_file():
    """What tqdm has to be told where no terminal shows its bar; nothing where one does."""
    if sys.stderr.isatty():
        return {}
    # With miniters tqdm's own thread prints nothing: its lines would stand there twice.
    return {"file": LogFile(), "bar_format": LINE, "delay": SECONDS, "mininterval": SECONDS,
            "miniters": 1}
